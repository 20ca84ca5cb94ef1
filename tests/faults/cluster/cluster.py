"""Kafka, Redis and all services as processes of this machine, with a proxy between each service and each of the two."""

import asyncio
import os
import random
import signal
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import uvloop

from infra.kafka.create_topics import create_topics
from infra.local.composition import HAND_OVER_ALWAYS
from infra.local.kafka import Listener, Quorum, kafka_spec
from infra.local.ports import PortPicker
from infra.local.probes import http_ready
from infra.local.process import Child
from infra.local.redis import redis_spec
from tests.fake_tokeniser import write_fake_model
from tests.faults.cluster.faults import STEP_S
from tests.faults.cluster.proxy import HOST, Paths, Proxy
from tests.faults.cluster.seats import Seat, Template, describe_end
from tests.faults.cluster.worker import PEERS_REACH_IT_AT, ROLE

READY_TIMEOUT_S = 90.0
POLL_S = 0.1
MODEL = "fake"

GRACE_S = 15.0
"""A client whose edge stands still notices by its silence; it must be back before its request is cancelled."""

KEEP_ALIVE_S = 1.0
DRAIN_S = 2.0

HOST_CACHE_GB = "0.0005"
"""Of the first worker of each role: twice as many pages as its cache has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many of what.

    Attributes:
        step_s: an engine's step takes so long: it and not the CPU limits what the cluster carries.
    """

    brokers: int = 1
    edges: int = 2
    ingests: int = 2
    prefills: int = 2
    decodes: int = 3
    num_pages: int = 256
    max_running: int = 16
    step_s: float = 0.03

    def names(self, role):
        count = {"edge": self.edges, "ingest": self.ingests, "prefill": self.prefills, "decode": self.decodes}[role]
        return [f"{role}-{index}" for index in range(count)]


class Server:
    """Kafka or Redis: killed, it comes back with its data.

    Attributes:
        lost: how it ended where nobody killed it.
    """

    def __init__(self, name, spec, log_path):
        self.name = name
        self.spec = spec
        self.lost = []
        self._log_path = log_path
        self._child = None

    @property
    def is_alive(self):
        return self._child is not None

    @property
    def pid(self):
        return self._child.pid

    async def start(self):
        self._child = await Child.start(self.spec, self._log_path)
        await self._child.until_ready()

    async def kill(self):
        child, self._child = self._child, None
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
        status = await child.wait()
        if status != -signal.SIGKILL:
            self.lost.append(child.obituary())

    def stop(self):
        self._child.send_signal(signal.SIGSTOP)

    def wake(self):
        with suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGCONT)

    def __str__(self):
        return self.name


@dataclass(slots=True)
class Cluster:
    """What runs.

    Attributes:
        kafka_address, redis_url: without a proxy between.
    """

    shape: Shape
    folder: object
    model_folder: object
    brokers: list
    redis: Server
    seats: dict
    kafka_address: str
    redis_url: str

    def of(self, *roles):
        return [seat for seat in self.seats.values() if seat.role in roles]

    @property
    def workers(self):
        return self.of("prefill", "decode")

    @property
    def edge_urls(self):
        return [seat.url for seat in self.of("edge")]

    async def all_ready(self, timeout_s=READY_TIMEOUT_S):
        """Wait until every process says that it has what it needs."""
        missing = list(self.seats.values())
        try:
            async with asyncio.timeout(timeout_s):
                while missing := [seat for seat in missing if not await _is_ready(seat)]:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            ends = [describe_end(life) for seat in missing for life in seat.lives if life.ended_s is not None]
            raise AssertionError(f"not ready: {', '.join(map(str, missing))}; ended: {ends}") from None

    def restore_all(self):
        """Every path is open, nobody stands still; who is dead comes back by himself."""
        for seat in self.seats.values():
            for paths in seat.paths.values():
                paths.restore()
            if seat.is_alive and seat.life.is_stopped:
                seat.wake()


async def _is_ready(seat):
    return seat.is_alive and not seat.life.is_stopped and await http_ready(HOST, int(seat.env["BATON_HTTP_PORT"]))


@asynccontextmanager
async def running_cluster(folder, shape=Shape()):
    """Starts everything, enters when all is ready; at the end nothing of it is left."""
    ports = PortPicker(random.Random())
    async with AsyncExitStack() as stack:
        light, heavy = await asyncio.gather(
            stack.enter_async_context(Template("edge", "ingest").running(folder / "services.log")),
            stack.enter_async_context(Template("prefill", "decode").running(folder / "workers.log")),
        )
        node_ids = range(1, shape.brokers + 1)
        controllers = {node: ports.pick() for node in node_ids}
        mains = {node: ports.pick() for node in node_ids}
        listeners = {node: [] for node in node_ids}
        redis_port = ports.pick()
        kafka_address = ",".join(f"{HOST}:{mains[node]}" for node in node_ids)

        async def laid(target_port):
            proxy = Proxy(target_port)
            await proxy.open(ports.pick())
            stack.push_async_callback(proxy.close)
            return proxy

        async def kafka_paths(name):
            proxies = []
            for node in node_ids:
                port = ports.pick()
                proxies.append(await laid(port))
                listeners[node].append(Listener(name.replace("-", "").upper(), port, proxies[-1].port))
            return Paths(proxies)

        model_folder = write_fake_model(folder / "model")
        seats = {}
        for role in ("prefill", "decode", "ingest", "edge"):
            for name in shape.names(role):
                paths = {"kafka": await kafka_paths(name), "redis": Paths([await laid(redis_port)])}
                env = {
                    "BATON_KAFKA": ",".join(f"{HOST}:{proxy.port}" for proxy in paths["kafka"].proxies),
                    "BATON_REDIS": f"redis://{HOST}:{paths['redis'].proxies[0].port}/0",
                    "BATON_MODEL": str(model_folder),
                    "BATON_MODEL_NAME": MODEL,
                    "BATON_HTTP_PORT": str(ports.pick()),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                }
                if name == "ingest-0":
                    env |= HAND_OVER_ALWAYS  # the others have prompts computed where they decode: both ways are gone
                elif role == "edge":
                    env |= {"BATON_GRACE_S": str(GRACE_S), "BATON_KEEP_ALIVE_S": str(KEEP_ALIVE_S)}
                elif role in {"prefill", "decode"}:
                    transfer_port = ports.pick()
                    paths["peers"] = Paths([await laid(transfer_port)])
                    env |= {
                        "BATON_NAME": name,
                        ROLE: role,
                        "BATON_TRANSFER_PORT": str(transfer_port),
                        PEERS_REACH_IT_AT: f"{HOST}:{paths['peers'].proxies[0].port}",
                        "BATON_DTYPE": "",
                        "BATON_NUM_PAGES": str(shape.num_pages),
                        "BATON_MAX_RUNNING": str(shape.max_running),
                        "BATON_MAX_BATCH_TOKENS": "256",
                        "BATON_HOST_CACHE_GB": HOST_CACHE_GB if name.endswith("-0") else "0",
                        "BATON_FAKE_STEP_S": str(shape.step_s),
                        "BATON_STEP_S": str(STEP_S),
                        "BATON_DRAIN_S": str(DRAIN_S),
                        "BATON_HOLD_S": "5",
                        "BATON_PULL_TIMEOUT_S": "3",
                    }
                template = heavy if role in {"prefill", "decode"} else light
                seats[name] = Seat(name, role, template, env, paths, folder)

        redis = Server("redis", redis_spec(folder / "redis", redis_port), folder / "redis.log")
        brokers = [
            Server(
                f"kafka-{node}",
                await asyncio.to_thread(
                    kafka_spec,
                    folder / f"kafka-{node}",
                    mains[node],
                    controllers[node],
                    quorum=Quorum(node, controllers),
                    listeners=listeners[node],
                ),
                folder / f"kafka-{node}.log",
            )
            for node in node_ids
        ]
        servers = [redis, *brokers]
        stack.push_async_callback(_kill_all, servers)
        await asyncio.gather(*(server.start() for server in servers))
        await create_topics(kafka_address, replication_factor=min(3, shape.brokers))
        cluster = Cluster(
            shape, folder, model_folder, brokers, redis, seats, kafka_address, f"redis://{HOST}:{redis_port}/0"
        )
        for seat in seats.values():
            stack.push_async_callback(seat.leave)
            await seat.start()
        await cluster.all_ready()
        yield cluster


async def _kill_all(servers):
    for server in servers:
        if server.is_alive:
            await server.kill()


def run_in_loop(main):
    """`asyncio.run` on uvloop; SIGTERM ends it as Ctrl-C does, so that nothing is left behind."""

    async def guarded():
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    os.environ["OMP_NUM_THREADS"] = "1"
    return uvloop.run(guarded())
