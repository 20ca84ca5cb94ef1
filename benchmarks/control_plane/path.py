"""The whole stack under the same loads: what its clients see, and where the time and the processors' work go."""

import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from traceback import format_exception
from typing import Any

import httpx

from benchmarks.control_plane.exposition import Histogram, added_to, read_histograms
from benchmarks.control_plane.loads import Load, Setup
from benchmarks.control_plane.log_cost import end_offsets, per_token, raw_hop, volumes
from benchmarks.control_plane.machine import cpu_shares, cpu_times
from benchmarks.control_plane.profiler import profiled
from benchmarks.control_plane.samples import Sample, hops, served_itl_mean_ms, summary
from infra.local.composition import HAND_OVER_ALWAYS, SERVICES, Composition, Service
from infra.local.kafka import MAX_COPIES
from infra.local.stack import Report, Stack, local_stack
from shared.bus.kafka import KafkaBus
from shared.errors import StartupError

FRAME_AGE = "baton_frame_age_seconds"
"""From a frame's making in the worker to its reading at the edge."""

STEP_SECONDS = "baton_step_seconds"
STEP_TOKENS = "baton_step_tokens"

WARM_UP_STREAMS = 16
WARM_UP_S = 3.0
"""Before all loads so many streams run for so long, unmeasured."""

CLIENT_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PathOptions:
    """How the stack is made up.

    Attributes:
        counts: processes of each service.
        brokers: of Kafka.
        gpus: the GPU that workers of a service see, by service; empty: they see all.
        env: more settings of every service.
        streams_per_client: streams that one client process serves.
        profile: folder for profiles of the services under the load `profiled_load`; None for none.
    """

    counts: Mapping[str, int]
    brokers: int = 1
    gpus: Mapping[str, str] = field(default_factory=dict[str, str])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    streams_per_client: int = 16
    profile: Path | None = None
    profiled_load: str = ""


async def measure_path(
    setup: Setup, loads: Sequence[Load], options: PathOptions, run_dir: Path, say: Report
) -> dict[str, Any]:
    """Starts a stack, runs every load against it, stops it.

    What was measured before something failed is kept: `error` says what failed, None if nothing did.
    """
    measured: dict[str, Any] = {"log_hop": None, "results": {}, "error": None}
    composition = Composition(
        counts=options.counts,
        brokers=options.brokers,
        model=setup.model,
        model_name=setup.model_name,
        device=setup.device,
        dtype=setup.dtype,
        num_pages=setup.num_pages,
        gpus=options.gpus,
        max_restarts=0,
        env={
            "BATON_MAX_RUNNING": str(setup.max_running),
            "BATON_MAX_BATCH_TOKENS": str(setup.max_batch_tokens),
            **HAND_OVER_ALWAYS,
            **options.env,
        },
        kafka_port=None,
        redis_port=None,
    )
    try:
        async with local_stack(composition, run_dir, services=services(setup), report=say) as stack:
            say("measuring the log's own hop")
            measured["log_hop"] = await raw_hop(stack.kafka_address, num_copies=min(MAX_COPIES, options.brokers))
            run = _Run(setup, options, stack, run_dir, say)
            await run.warm_up()
            for load in loads:
                measured["results"][load.name] = await run.measure(load)
    except Exception as error:  # noqa: BLE001 - minutes of measuring must not be lost to whatever failed at their end
        measured["error"] = "".join(format_exception(error))
        say(measured["error"])
    return measured


def services(setup: Setup) -> list[Service]:
    """The stack's services; paced workers take the place of those with a model."""
    made: list[Service] = []
    for service in SERVICES:
        command = service.command
        if setup.fake_step_ms is not None and service.name in ("prefill", "decode"):
            command = (sys.executable, "-m", "benchmarks.control_plane.paced", service.name, str(setup.fake_step_ms))
        made.append(Service(service.name, command, service.default_port))
    return made


@dataclass(frozen=True, slots=True)
class Look:
    """What all processes had done at one moment."""

    at_s: float
    cpu: Mapping[str, Any]
    histograms: Mapping[str, Mapping[str, Histogram]]


class _Run:
    """Loads against one running stack."""

    def __init__(self, setup: Setup, options: PathOptions, stack: Stack, run_dir: Path, say: Report) -> None:
        self._setup = setup
        self._options = options
        self._stack = stack
        self._run_dir = run_dir
        self._say = say
        self._bus = KafkaBus(stack.kafka_address, client_id="control-plane")
        self._run_id = secrets.token_hex(4)

    async def warm_up(self) -> None:
        streams = min(WARM_UP_STREAMS, self._setup.max_running)
        load = Load(
            name="warm-up",
            streams=streams,
            rate_per_s=None,
            lead_s=0.0,
            seconds=WARM_UP_S,
            trail_s=0.0,
            pause_s=0.0,
            first_index=900_000_000,
        )
        self._say("warming up")
        async with self._clients(load) as clients:
            await clients.begin()
            told = await clients.told()
        if not told.samples:
            raise StartupError(f"no request of the warm-up was answered: {dict(told.failures)}")

    async def measure(self, load: Load) -> dict[str, Any]:
        rate = f"{load.rate_per_s:.3f} requests a second" if load.rate_per_s else "closed"
        self._say(f"path, load {load.name}: {load.streams} streams, {rate}, {load.total_s:.0f} s")
        ends_before = await end_offsets(self._bus)
        async with self._clients(load) as clients:
            await clients.begin()
            await asyncio.sleep(load.lead_s)
            before = await self._look(clients.pids)
            async with self._profiled(load):
                await asyncio.sleep(max(0.0, before.at_s + load.seconds - time.monotonic()))
            after = await self._look(clients.pids)
            told = await clients.told()
        ends_after = await end_offsets(self._bus)
        num_tokens = sum(sample.output_tokens for sample in told.samples)
        if not num_tokens:
            raise StartupError(f"no request of load {load.name} was answered: {dict(told.failures)}")
        samples = told.samples
        return {
            **summary(samples, load),
            "failures": dict(told.failures),
            "itl_mean_by_servers_ms": served_itl_mean_ms(samples, load),
            "hops_ms": hops(samples, load),
            **_frame_age(before, after),
            "workers": _workers(before, after),
            "cpu_percent": cpu_shares(before.cpu, after.cpu, after.at_s - before.at_s),
            "log_per_output_token": per_token(await volumes(self._bus, ends_before, ends_after), num_tokens),
            "profiled": self._is_profiled(load),
        }

    def _is_profiled(self, load: Load) -> bool:
        return self._options.profile is not None and self._options.profiled_load == load.name

    @asynccontextmanager
    async def _profiled(self, load: Load) -> AsyncGenerator[None]:
        folder = self._options.profile
        if folder is None or not self._is_profiled(load):
            yield
            return
        pids = {name: pid for name, pid in self._pids().items() if name != "redis" and not name.startswith("kafka")}
        async with profiled(pids, folder, load.seconds):
            yield

    def _pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self._stack.record().processes}

    async def _look(self, clients: Mapping[str, int]) -> Look:
        cpu = cpu_times({**self._pids(), **clients})
        at_s = time.monotonic()
        addresses = {
            process.name: process.address
            for process in self._stack.record().processes
            if process.address.startswith("http")
        }
        async with httpx.AsyncClient(trust_env=False) as http:
            pages = await asyncio.gather(*(http.get(f"{address}/metrics") for address in addresses.values()))
        histograms = {name: read_histograms(page.text) for name, page in zip(addresses, pages, strict=True)}
        return Look(at_s, cpu, histograms)

    @asynccontextmanager
    async def _clients(self, load: Load) -> AsyncGenerator["Clients"]:
        shares = max(1, -(-load.streams // self._options.streams_per_client))
        async with AsyncExitStack() as started:
            processes = [
                await started.enter_async_context(
                    self._client({"load": asdict(load), "share": share, "shares": shares}, share)
                )
                for share in range(shares)
            ]
            yield Clients(processes)

    @asynccontextmanager
    async def _client(self, job: Mapping[str, Any], share: int) -> AsyncGenerator["Client"]:
        job_path, out_path = self._run_dir / f"client-{share}.job", self._run_dir / f"client-{share}.out"
        whole = {**job, "setup": asdict(self._setup), "edges": self._stack.addresses("edge"), "run_id": self._run_id}
        job_path.write_text(json.dumps(whole))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.control_plane.client", str(job_path), str(out_path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield Client(f"client-{share}", process, out_path)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@dataclass(frozen=True, slots=True)
class Told:
    """What the clients of one load saw."""

    samples: list[Sample]
    failures: Counter[str]


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    process: asyncio.subprocess.Process
    out_path: Path


class Clients:
    """The client processes of one load."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients

    @property
    def pids(self) -> dict[str, int]:
        return {client.name: client.process.pid for client in self._clients}

    async def begin(self) -> None:
        """Waits until all have made their requests, then lets them send. Raises StartupError."""
        async with asyncio.timeout(CLIENT_START_TIMEOUT_S):
            for client in self._clients:
                assert client.process.stdout is not None
                if await client.process.stdout.readline() != b"ready\n":
                    raise StartupError(f"{client.name} ended before its load began")
        for client in self._clients:
            assert client.process.stdin is not None
            client.process.stdin.write(b"go\n")

    async def told(self) -> Told:
        """Waits for the end of all. Raises StartupError."""
        samples: list[Sample] = []
        failures: Counter[str] = Counter()
        for client in self._clients:
            if await client.process.wait() != 0:
                raise StartupError(f"{client.name} failed with status {client.process.returncode}")
            told = json.loads(client.out_path.read_text())
            samples += [Sample(**sample) for sample in told["samples"]]
            failures.update(told["failures"])
        return Told(samples, failures)


def _frame_age(before: Look, after: Look) -> dict[str, Any]:
    """By edge, in milliseconds; nothing where edges do not tell."""
    ages = {
        name: _in_ms(age)
        for name, histograms in after.histograms.items()
        if (age := added_to(before.histograms.get(name, {}), histograms, FRAME_AGE)) is not None
    }
    return {"frame_age_ms": ages} if ages else {}


def _workers(before: Look, after: Look) -> dict[str, Any]:
    """Steps of every worker by its own clock."""
    told: dict[str, Any] = {}
    for name, histograms in after.histograms.items():
        then = before.histograms.get(name, {})
        steps = added_to(then, histograms, STEP_SECONDS)
        if steps is None:
            continue
        tokens = added_to(then, histograms, STEP_TOKENS)
        told[name] = {
            "steps": steps["count"],
            "step_mean_ms": _in_ms(steps)["mean"],
            "token_rows_mean": tokens["mean"] if tokens else None,
        }
    return told


def _in_ms(seconds: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: value if name == "count" or value is None else round(value * 1000, 4) for name, value in seconds.items()
    }
