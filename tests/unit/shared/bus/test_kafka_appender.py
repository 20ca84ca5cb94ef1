"""What an appender sends over its connections, and what becomes of appends whose connection is given up."""

import asyncio
from types import SimpleNamespace

import pytest
import structlog
from aiokafka.errors import (
    KafkaConnectionError,
    NodeNotReadyError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
)

from shared.bus import kafka_client
from shared.bus.kafka_appender import KafkaAppender
from shared.bus.kafka_client import BusCounters
from shared.bus.sending import AppendFailed, Unsent

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))
TOPIC = "topic"
RECORDS = (Unsent(b"value", None, (), 100, None),)


def acknowledged(*of_partitions):
    answers = [(partition, error, first, -1, 0) for partition, error, first in of_partitions]
    return SimpleNamespace(topics=[(TOPIC, answers)])


class Client:
    """Opens a connection for its first send; connections and answers wait until the test lets them go on."""

    def __init__(self, leaders, *, connects):
        self.cluster = SimpleNamespace(leader_for_partition=lambda place: leaders[place.partition])
        self.connects = connects
        self.num_open = 0
        self.tells = True
        self.sent = asyncio.Queue()

    async def bootstrap(self):
        pass

    def add_topic(self, topic):
        pass

    async def force_metadata_update(self):
        return self.tells

    async def close(self):
        self.num_open = 0
        await asyncio.sleep(0.002)

    async def send(self, node, request):
        if not self.num_open:
            await self.connects.wait()
            self.num_open = 1
        reply = asyncio.get_running_loop().create_future()
        partitions = [partition for _, batches in request._topics for partition, _ in batches]
        self.sent.put_nowait((node, partitions, reply))
        return await reply


class World:
    """Clients that lead partition p from broker `leaders[p]`."""

    def __init__(self, monkeypatch):
        self.leaders = {0: 0, 1: 0, 2: 1}
        self.connects = asyncio.Event()
        self.connects.set()
        self.clients = []
        self.counters = BusCounters()
        monkeypatch.setattr(kafka_client, "AIOKafkaClient", self.client)
        self.appender = KafkaAppender("nowhere:1", "test", SILENT, self.counters)

    def client(self, **_):
        self.clients.append(Client(self.leaders, connects=self.connects))
        return self.clients[-1]

    def append(self, partition):
        return asyncio.create_task(self.appender.append(TOPIC, partition, RECORDS))

    async def sent(self):
        """Broker, partitions and the future that answers the next request."""
        async with asyncio.timeout(5):
            return await self.clients[-1].sent.get()


@pytest.fixture
async def world(monkeypatch):
    world = World(monkeypatch)
    yield world
    await world.appender.close()
    assert [client.num_open for client in world.clients] == [0] * len(world.clients)


async def connected(world):
    """A new connection over which one record was appended."""
    num_clients = len(world.clients)
    appending = world.append(0)
    while len(world.clients) == num_clients:
        await asyncio.sleep(0)
    _, _, reply = await world.sent()
    reply.set_result(acknowledged((0, 0, 0)))
    assert await appending == 0


async def failed(appending):
    async with asyncio.timeout(5):
        with pytest.raises(AppendFailed):
            await appending


async def test_appends_of_one_turn_share_a_request_to_each_broker(world):
    await connected(world)
    appending = [world.append(partition) for partition in range(3)]
    first, second = await world.sent(), await world.sent()
    assert [sent[:2] for sent in (first, second)] == [(0, [0, 1]), (1, [2])]
    second[2].set_result(acknowledged((2, 0, 30)))
    first[2].set_result(acknowledged((1, 0, 20), (0, 0, 10)))
    assert await asyncio.gather(*appending) == [10, 20, 30]


async def test_what_was_acknowledged_stands_beside_what_was_refused(world):
    await connected(world)
    appending = [world.append(partition) for partition in range(2)]
    _, _, reply = await world.sent()
    reply.set_result(acknowledged((0, NotLeaderForPartitionError.errno, -1), (1, 0, 20)))
    assert await appending[1] == 20
    await failed(appending[0])
    assert world.counters.num_producers_replaced == 0, "the connection is as good for the others as before"


async def test_a_partition_that_is_always_refused_leaves_the_others_their_connection(world):
    await connected(world)
    world.leaders[1] = 1
    under_way = world.append(0)
    _, _, kept = await world.sent()
    for error in (NotLeaderForPartitionError, NotEnoughReplicasError) * 2:
        refused = world.append(1)
        _, _, reply = await world.sent()
        reply.set_result(acknowledged((1, error.errno, -1)))
        await failed(refused)
    absent = world.append(2)
    _, _, reply = await world.sent()
    reply.set_exception(NodeNotReadyError())
    await failed(absent)

    kept.set_result(acknowledged((0, 0, 7)))
    assert await under_way == 7
    assert (len(world.clients), world.counters.num_producers_replaced) == (1, 0)


async def test_a_connection_that_no_longer_tells_who_leads_is_given_up(world):
    await connected(world)
    world.clients[0].tells = False
    refused = world.append(1)
    _, _, reply = await world.sent()
    reply.set_result(acknowledged((1, NotLeaderForPartitionError.errno, -1)))
    await failed(refused)
    assert world.counters.num_producers_replaced == 1


async def test_an_append_that_the_answer_does_not_name_has_failed(world):
    await connected(world)
    appending = [world.append(partition) for partition in range(2)]
    _, _, reply = await world.sent()
    reply.set_result(acknowledged((0, 0, 10)))
    assert await appending[0] == 10
    await failed(appending[1])


async def test_a_connection_that_is_given_up_fails_all_that_is_on_its_way(world):
    await connected(world)
    other = world.append(1)
    await world.sent()
    failing = world.append(2)
    _, _, reply = await world.sent()
    reply.set_exception(KafkaConnectionError())
    await failed(failing)
    await failed(other)
    assert world.counters.num_producers_replaced == 1

    await connected(world)
    assert len(world.clients) == 2


async def test_what_a_request_opens_while_its_client_is_closed_is_closed(world):
    await connected(world)
    world.clients[0].num_open = 0
    world.connects.clear()
    waiting = world.append(1)
    await asyncio.sleep(0.001)
    closing = asyncio.create_task(world.appender.close())
    await asyncio.sleep(0)
    world.connects.set()
    await closing
    await failed(waiting)


async def test_an_append_that_learns_its_leader_too_late_opens_nothing(world):
    await connected(world)
    world.leaders[1] = None
    waiting = world.append(1)
    await asyncio.sleep(0.001)
    await world.appender.close()
    world.leaders[1] = 0
    await failed(waiting)


async def test_an_append_whose_request_had_not_begun_fails_with_its_connection(world):
    await connected(world)
    waiting = world.append(1)
    closing = asyncio.create_task(world.appender.close())  # in the turn in which the request's task is made
    await closing
    await failed(waiting)


async def test_a_connection_is_closed_although_who_gave_it_up_is_cancelled(world):
    await connected(world)
    failing = world.append(2)
    _, _, reply = await world.sent()
    reply.set_exception(KafkaConnectionError())
    while not world.counters.num_producers_replaced:
        await asyncio.sleep(0)
    failing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await failing
