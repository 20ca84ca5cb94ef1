"""What a local stack consists of. A new service is one more entry of SERVICES."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from infra.local.probes import http_ready
from infra.local.process import ProcessSpec

HOST = "127.0.0.1"

CPU_PAGES = 512

GPU_MEMORY_SHARE = 0.9
"""Of a GPU's memory, for all workers on it together."""

HAND_OVER_ALWAYS = {"BATON_LOCAL_PREFILL": "false"}
"""Settings of a stack in which every prompt goes from a prefill to a decode worker, as what looks at that wants it."""

WORKERS = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Service:
    """One kind of process.

    Attributes:
        name: its processes are `<name>-0`, `<name>-1`, ...
        default_port: HTTP port of `<name>-0`, the next for the next; any free port where taken.
    """

    name: str
    command: tuple[str, ...]
    default_port: int


def python_service(name: str, module: str, default_port: int) -> Service:
    """A service of this repository."""
    return Service(name, (sys.executable, "-m", module), default_port)


# In the order in which they are started; the reverse order stops them, so that the edge closes first.
SERVICES = (
    python_service("prefill", "services.prefill", 8200),
    python_service("decode", "services.decode", 8300),
    python_service("ingest", "services.ingest", 8100),
    python_service("edge", "services.stream_out", 8000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """How many of what, and with which model.

    Attributes:
        counts: processes of each service, by its name.
        model: folder of the model.
        model_name: what clients call it; the folder's name if empty.
        device: of the workers, "cpu" or "cuda".
        gpus: numbers of the GPUs of a service's processes, by its name, as in "0,1"; each process sees one of them,
            in turn. Where a service has none, its processes see what this one sees and use the first.
        dtype: "float32" or "bfloat16".
        num_pages: KV pages of each worker; None: CPU_PAGES, and on GPUs as many as fit.
        max_restarts: how often a process that died is started again before it is left dead.
        env: further settings of every service.
        brokers: of Kafka; with three, each record is on all of them and acknowledged by two.
        kafka_port, redis_port: wished ports, of the first broker; any free port where taken.
    """

    counts: Mapping[str, int]
    model: str
    model_name: str = ""
    device: str = "cpu"
    gpus: Mapping[str, str] = field(default_factory=dict[str, str])
    dtype: str = "bfloat16"
    num_pages: int | None = None
    max_restarts: int = 3
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    brokers: int = 1
    kafka_port: int | None = 9092
    redis_port: int | None = 6379


def service_spec(
    service: Service, index: int, composition: Composition, *, kafka_address: str, redis_url: str, http_port: int
) -> ProcessSpec:
    """The process `<service>-<index>` with everything it is told."""
    return ProcessSpec(
        name=f"{service.name}-{index}",
        command=service.command,
        address=f"http://{HOST}:{http_port}",
        is_ready=partial(http_ready, HOST, http_port),
        env={
            "BATON_KAFKA": kafka_address,
            "BATON_REDIS": redis_url,
            "BATON_MODEL": composition.model,
            "BATON_MODEL_NAME": composition.model_name,
            "BATON_DEVICE": composition.device,
            "BATON_DTYPE": composition.dtype,
            **_memory_env(service, index, composition),
            "BATON_HTTP_HOST": HOST,
            "BATON_HTTP_PORT": str(http_port),
            # Two busy processes with two OpenMP threads each wait for one another at every barrier.
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            # UCX reports a variable that it sets itself, on the standard output that carries the logs.
            "UCX_WARN_UNUSED_ENV_VARS": "n",
            **_gpu_env(_gpu_of(composition, service.name, index)),
            **composition.env,
        },
    )


def _gpu_env(gpu: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}


def _memory_env(service: Service, index: int, composition: Composition) -> dict[str, str]:
    """Pages where they are given, else each worker's share of its GPU."""
    if composition.num_pages is not None:
        return {"BATON_NUM_PAGES": str(composition.num_pages)}
    if composition.device == "cpu":
        return {"BATON_NUM_PAGES": str(CPU_PAGES)}
    own = _gpu_of(composition, service.name, index)
    neighbours = [
        (name, number)
        for name in WORKERS
        for number in range(composition.counts.get(name, 0))
        if _gpu_of(composition, name, number) == own
    ]
    return {"BATON_GPU_MEMORY_SHARE": f"{GPU_MEMORY_SHARE / max(1, len(neighbours)):.3f}"}


def _gpu_of(composition: Composition, service: str, index: int) -> str:
    """The GPU that a process uses; "" is the first that this process sees."""
    numbers = composition.gpus.get(service, "").split(",")
    return numbers[index % len(numbers)].strip()
