"""Each row of the failure matrix in docs/runbook.md that needs real processes: one thing goes wrong under load, every
client gets its whole answer, and the history over topics and captures finds nothing wrong.

All share one cluster. `BATON_FAULTS_KAFKA_AWAY_S` makes Kafka's absence longer: 180 is the runbook's row.
"""

import asyncio
import os
from contextlib import asynccontextmanager
from itertools import count

import pytest
import pytest_asyncio

from shared.bus.kafka import KafkaBus
from tests.faults.capture import Manner, Outcome
from tests.faults.clients import Mix, Want
from tests.faults.cluster.cluster import MODEL, Shape, running_cluster
from tests.faults.cluster.faults import LEASE_S, Injector, Kind, unexplained_ends
from tests.faults.cluster.proxy import Path
from tests.faults.cluster.run import Load, impatient_clients, judge

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # aiokafka leaves a socket when the broker that it connects to is killed in that moment.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KAFKA_AWAY_S = float(os.environ.get("BATON_FAULTS_KAFKA_AWAY_S", "20"))

TIMEOUT_S = KAFKA_AWAY_S + 90.0
NUM_STREAMS = 6
STREAM_TOKENS = 150
BEGUN_EVENTS = 5
CUT_S = 2 * LEASE_S + 1
ROLES = ("decode", "prefill", "ingest", "edge")

BACKGROUND = Mix(MODEL, rate_per_s=3.0, timeout_s=TIMEOUT_S, deletes=0.0, leaves=0.0, tight=0.0, keyed=1.0)


class Scene:
    """A cluster, what was done to it, and all that its clients saw."""

    def __init__(self, cluster, producer):
        self.cluster = cluster
        self.injector = Injector(cluster)
        self._producer = producer
        self._captures = []
        self._known = set()
        self._numbers = count()

    def some(self, role, index=0):
        return self.cluster.of(role)[index]

    @asynccontextmanager
    async def under_load(self):
        """Streams that have all begun and short requests that come and go; at the end all are answered, and right."""
        number = next(self._numbers)
        clients = impatient_clients(self.cluster, self._producer, number)
        load = Load(clients)
        load.begin(BACKGROUND, f"matrix-{number}")
        streams = [asyncio.create_task(clients.run(_long(f"long-{number}-{k}", k))) for k in range(NUM_STREAMS)]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not self._all_begun(clients):
                    ends = unexplained_ends(self.cluster, self.injector.faults)
                    assert [end for end in ends if f"ended by itself: {end}" not in self._known] == []
                    await asyncio.sleep(0.05)
            yield clients
            captures = await asyncio.gather(*streams)
            await load.end()
        finally:
            await load.cancel()
            for stream in streams:
                stream.cancel()
        self._captures += clients.captures
        await self.injector.over()
        self.cluster.restore_all()
        await self.cluster.all_ready()
        assert {capture.outcome for capture in captures} == {Outcome.DONE}
        unanswered = {c.name: c.outcome for c in clients.captures if c.outcome not in {Outcome.DONE, Outcome.SENT}}
        assert not unanswered
        outcome = await judge(self.cluster, self.injector, self._captures)
        new = [finding for finding in outcome.broken if finding not in self._known]
        self._known.update(new)
        assert new == []

    async def one_of_each_cut(self, kind):
        """A decode worker whose connections fall silent, and a prefill worker whose connections are reset."""
        async with self.under_load():
            await asyncio.gather(
                self.injector.cut(kind, self.some("decode"), Path.FROZEN, CUT_S),
                self.injector.cut(kind, self.some("prefill"), Path.RESET, CUT_S),
            )

    def _all_begun(self, clients):
        long = [capture for capture in clients.captures if capture.name.startswith("long-")]
        return len(long) == NUM_STREAMS and all(len(capture.events) >= BEGUN_EVENTS for capture in long)


def _long(name, number):
    body = {
        "model": MODEL,
        "user": name,
        "prompt": [300 + number] * 100,
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    return Want(name, 0.0, Manner.STREAM, "/v1/completions", body, TIMEOUT_S, key=f"key of {name}")


@asynccontextmanager
async def open_scene(folder, shape):
    async with (
        running_cluster(folder, shape) as cluster,
        KafkaBus(cluster.kafka_address, client_id="clients").producer() as producer,
    ):
        yield Scene(cluster, producer)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory):
    async with open_scene(tmp_path_factory.mktemp("matrix"), Shape()) as opened:
        yield opened


async def test_killed(scene):
    async with scene.under_load():
        for role in ROLES:
            await scene.injector.kill(scene.some(role))
            await scene.cluster.all_ready()


async def test_stopped_for_longer_than_the_lease_and_woken(scene):
    async with scene.under_load():
        for role in ROLES:
            await scene.injector.pause(scene.some(role, 1), 2 * LEASE_S)
            await scene.cluster.all_ready()


async def test_hung_engine_step(scene):
    async with scene.under_load():
        for role in ("decode", "prefill"):
            await scene.injector.hang(scene.some(role))
            await scene.cluster.all_ready()


async def test_rolling_restart(scene):
    async with scene.under_load():
        for role in ROLES:
            for seat in scene.cluster.of(role):
                await scene.injector.term(seat)
                await scene.cluster.all_ready()


async def test_edge_killed_while_clients_stream_and_resume_on_the_other(scene):
    async with scene.under_load() as clients:
        edge = scene.some("edge", 1)
        there = [capture for capture in clients.captures if capture.attempts[-1].edge == edge.url]
        await scene.injector.kill(edge, down_s=3.0)
    assert all(capture.num_resumes for capture in there if capture.name.startswith("long-"))


async def test_redis_killed_and_restarted(scene):
    async with scene.under_load():
        await scene.injector.kill_server(Kind.REDIS_KILL, scene.cluster.redis, 1.0)


async def test_redis_emptied(scene):
    async with scene.under_load():
        await scene.injector.flush()


async def test_the_only_broker_killed_and_restarted(scene):
    async with scene.under_load():
        await scene.injector.kill_server(Kind.BROKER_KILL, scene.cluster.brokers[0], 0.5)


async def test_kafka_away_for_long(scene):
    async with scene.under_load():
        await scene.injector.kill_server(Kind.BROKER_KILL, scene.cluster.brokers[0], KAFKA_AWAY_S)


async def test_worker_cut_from_only_redis(scene):
    await scene.one_of_each_cut(Kind.CUT_REDIS)


async def test_worker_cut_from_only_kafka(scene):
    await scene.one_of_each_cut(Kind.CUT_KAFKA)


async def test_prefill_workers_cut_from_only_their_peers(scene):
    for how in (Path.RESET, Path.FROZEN):
        async with scene.under_load():
            cuts = [scene.injector.cut(Kind.CUT_PEERS, seat, how, CUT_S) for seat in scene.cluster.of("prefill")]
            await asyncio.gather(*cuts)


async def test_one_broker_of_three_killed_and_restarted(tmp_path):
    shape = Shape(brokers=3, edges=1, ingests=1, prefills=1, decodes=2)
    async with open_scene(tmp_path, shape) as scene, scene.under_load():
        await scene.injector.kill_server(Kind.BROKER_KILL, scene.cluster.brokers[0], 1.0)
