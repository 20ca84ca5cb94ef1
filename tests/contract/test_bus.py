"""What every log does: the real Kafka and the twin in memory."""

import asyncio
import socket

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError

from shared.bus import kafka_reader, sending
from shared.bus.kafka import KafkaBus
from shared.bus.port import RECORD_OVERHEAD_BYTES, BusUnavailable, Committed, Start
from shared.bus.to_end import read_to_end
from shared.wire.topics import MAX_RECORD_BYTES
from tests.contract.bus_worlds import KafkaWorld, MemoryWorld, drain, first_copies, values


@pytest.fixture(params=["memory", "kafka"])
def world(request, monkeypatch):
    monkeypatch.setattr(sending, "FIRST_BACKOFF_S", 0.01)
    if request.param == "memory":
        return MemoryWorld()
    return KafkaWorld(request.getfixturevalue("kafka_address"), monkeypatch)


@pytest.fixture
def kafka_world(kafka_address, monkeypatch):
    monkeypatch.setattr(sending, "FIRST_BACKOFF_S", 0.01)
    return KafkaWorld(kafka_address, monkeypatch)


@pytest.fixture
async def topic(world):
    return await world.topic()


@pytest.fixture
async def producer(world):
    async with world.bus("producer").producer() as producer:
        yield producer


@pytest.fixture
async def reader(world, topic):
    async with world.bus("reader").reader(topic, group="readers") as reader:
        yield reader


async def test_a_record_comes_back_as_it_was_sent(world, topic, producer, reader):
    started_s = world.now_s()
    offsets = [
        await producer.send(topic, 1, b"value", key=b"key", headers=(("a", b"1"), ("b", b""))),
        await producer.send(topic, 1, b""),
    ]

    await reader.assign({1: Start.BEGINNING})
    first, second = await drain(reader, 2)

    assert offsets == [0, 1]
    assert (first.topic, first.partition, first.offset) == (topic, 1, 0)
    assert (first.key, first.value, first.headers) == (b"key", b"value", (("a", b"1"), ("b", b"")))
    assert (second.offset, second.key, second.value, second.headers) == (1, None, b"", ())
    assert started_s - 1 < first.timestamp_s <= second.timestamp_s < world.now_s() + 1


async def test_what_one_producer_sends_stands_in_order(topic, producer, reader):
    sent = [f"{number}".encode() for number in range(3000)]
    sending_them = []
    for number, value in enumerate(sent):
        if number % 3:
            producer.post(topic, 0, value)
        else:
            sending_them.append(asyncio.create_task(producer.send(topic, 0, value)))
            await asyncio.sleep(0)

    offsets = await asyncio.gather(*sending_them)
    await reader.assign({0: 0})

    assert values(await drain(reader, len(sent))) == sent
    assert offsets == list(range(0, 3000, 3))


async def test_partitions_and_producers_each_keep_their_order(world, topic, producer, reader):
    async with world.bus("other").producer() as other:
        for number in range(300):
            producer.post(topic, number % 2, f"a{number}".encode())
            other.post(topic, number % 2, f"b{number}".encode())
            if not number % 50:
                await asyncio.sleep(0.001)
    await reader.assign({0: 0, 1: 0})
    records = await drain(reader, 600)

    for partition in (0, 1):
        for name in ("a", "b"):
            mine = [value for value in values(records, partition) if value.startswith(name.encode())]
            assert mine == [f"{name}{number}".encode() for number in range(partition, 300, 2)]


async def test_a_reader_from_the_end_sees_all_that_is_sent_after_its_assignment(topic, producer, reader):
    await producer.send(topic, 0, b"before")

    await reader.assign({0: Start.END, 1: Start.END})
    await producer.send(topic, 0, b"after")
    await producer.send(topic, 1, b"after")

    assert values(await drain(reader, 2)) == [b"after", b"after"]
    assert await reader.read(0.05) in ([], ())


async def test_a_reader_starts_where_it_is_told(topic, producer, reader):
    for partition in (0, 1):
        for number in range(3):
            await producer.send(topic, partition, f"{number}".encode())

    await reader.assign({0: Start.BEGINNING, 1: 2})

    records = await drain(reader, 4)
    assert values(records, 0) == [b"0", b"1", b"2"]
    assert values(records, 1) == [b"2"]


async def test_reassigned_partitions_go_on_where_they_are(topic, producer, reader):
    for partition in (0, 1, 2):
        for number in range(2):
            await producer.send(topic, partition, f"{number}".encode())
    await reader.assign({0: 0, 1: 0})
    await drain(reader, 4)

    for partition in (0, 1, 2):
        await producer.send(topic, partition, b"2")
    await reader.assign({0: Start.BEGINNING, 2: 1})

    records = await drain(reader, 3)
    assert values(records, 0) == [b"2"], "kept: goes on, whatever start is named"
    assert values(records, 1) == [], "given up"
    assert values(records, 2) == [b"1", b"2"]


async def test_a_partition_given_up_and_taken_again_starts_anew(topic, producer, reader):
    await producer.send(topic, 0, b"0")
    await reader.assign({0: 0})
    await drain(reader, 1)

    await reader.assign({})
    assert not await reader.read(0.05)
    await reader.assign({0: 0})

    assert values(await drain(reader, 1)) == [b"0"]


async def test_a_reader_without_partitions_or_records_waits(reader):
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    assert not await reader.read(0.1)
    assert loop.time() - started_s >= 0.09

    await reader.assign({0: Start.BEGINNING})
    started_s = loop.time()
    assert not await reader.read(0.1)
    assert loop.time() - started_s >= 0.09


async def test_an_assignment_wakes_a_waiting_reader(topic, producer, reader):
    await producer.send(topic, 0, b"0")
    reading = asyncio.create_task(reader.read(10))
    await asyncio.sleep(0.02)

    await reader.assign({0: 0})

    assert values(await asyncio.wait_for(reading, 5)) == [b"0"]


async def test_a_reader_that_waits_through_an_assignment_misses_nothing(topic, producer, reader):
    await reader.assign({0: Start.END})
    for number in range(5):
        waiting = asyncio.create_task(reader.read(5.0))
        await asyncio.sleep(0.05)
        await reader.assign({0: Start.END, 1: Start.BEGINNING} if number % 2 == 0 else {0: Start.END})
        await producer.send(topic, 0, f"{number}".encode())
        records = list(await waiting) or await drain(reader, 1)
        assert values([record for record in records if record.partition == 0]) == [f"{number}".encode()]


async def test_cancelled_reads_lose_nothing(topic, producer, reader):
    await reader.assign({0: 0})
    sent = [f"{number}".encode() for number in range(200)]
    records = []

    async def send_all():
        for value in sent:
            await producer.send(topic, 0, value)

    sending_them = asyncio.create_task(send_all())
    while len(records) < len(sent):
        reading = asyncio.create_task(reader.read(1.0))
        await asyncio.wait({reading}, timeout=0.003)
        reading.cancel()
        await asyncio.wait({reading})
        records += [] if reading.cancelled() else reading.result()

    await sending_them
    assert values(records) == sent


async def test_commits_keep_offset_and_note(world, topic, reader):
    await reader.assign({0: 0, 1: 0})
    assert await reader.committed(0) is None

    await reader.commit({0: Committed(7, "half of it"), 1: Committed(1)})
    await reader.commit({0: Committed(5)})

    async with (
        world.bus().reader(topic, group="readers") as same_group,
        world.bus().reader(topic, group="others") as other_group,
    ):
        assert await same_group.committed(0) == Committed(5), "a commit may go back"
        assert await same_group.committed(1) == Committed(1)
        assert await same_group.committed(2) is None
        assert await other_group.committed(0) is None


async def test_a_note_survives(world, topic, reader):
    await reader.assign({2: 0})
    await reader.commit({2: Committed(3, "käse\n" * 100)})
    assert await reader.committed(2) == Committed(3, "käse\n" * 100)


async def test_only_assigned_partitions_are_committed(reader):
    await reader.assign({0: 0})
    with pytest.raises(ValueError, match=r"\[2\]"):
        await reader.commit({0: Committed(0), 2: Committed(0)})
    assert await reader.committed(0) is None


async def test_offsets_of_the_log(topic, producer, reader):
    assert (await reader.beginning_offset(0), await reader.end_offset(0)) == (0, 0)
    for _ in range(4):
        await producer.send(topic, 0, b"x")
    assert (await reader.beginning_offset(0), await reader.end_offset(0)) == (0, 4)


async def test_the_offset_since_a_time(topic, producer, reader):
    for _ in range(3):
        await producer.send(topic, 0, b"x")
        await asyncio.sleep(0.05)
    await reader.assign({0: 0})
    times_s = [record.timestamp_s for record in await drain(reader, 3)]
    assert await reader.offset_since(0, 0.0) == 0
    assert [await reader.offset_since(0, time_s) for time_s in times_s] == [0, 1, 2]
    assert await reader.offset_since(0, times_s[1] - 0.01) == 1
    assert await reader.offset_since(0, times_s[2] + 1) == 3
    assert await reader.offset_since(1, 0.0) == 0


async def test_a_start_that_is_no_longer_kept_reads_from_the_oldest_record(world, topic, producer, reader):
    for number in range(5):
        await producer.send(topic, 0, f"{number}".encode())
        await producer.send(topic, 1, f"{number}".encode())
    await world.trim(topic, 0, 3)
    await world.trim(topic, 1, 2)

    await reader.assign({0: 1, 1: Start.BEGINNING})

    records = await drain(reader, 5)
    assert values(records, 0) == [b"3", b"4"]
    assert values(records, 1) == [b"2", b"3", b"4"]
    assert (await reader.beginning_offset(0), await reader.end_offset(0)) == (3, 5)


async def test_what_stands_now_is_read_to_its_end(world, topic, producer, reader):
    for number in range(5):
        await producer.send(topic, 0, f"{number}".encode())
        await producer.send(topic, 1, f"{number}".encode())
    await producer.send(topic, 2, b"not asked for")
    await world.trim(topic, 0, 3)
    records = []
    assert await read_to_end(reader, {0: 1, 1: 4}, records.append) == {0: 5, 1: 5}
    assert (values(records, 0), values(records, 1), len(records)) == ([b"3", b"4"], [b"4"], 3)
    assert await read_to_end(reader, {0: 5}, records.append) == {0: 5}
    assert len(records) == 3


async def test_the_largest_record_passes_and_a_larger_one_is_refused(topic, producer, reader):
    largest = bytes(MAX_RECORD_BYTES - RECORD_OVERHEAD_BYTES)
    with pytest.raises(ValueError, match=f"{MAX_RECORD_BYTES + 1} bytes"):
        await producer.send(topic, 0, largest + b"x")
    with pytest.raises(ValueError, match="limit"):
        producer.post(topic, 0, largest, key=b"k")

    await producer.send(topic, 0, largest)
    await producer.send(topic, 0, b"next")

    await reader.assign({0: 0})
    assert [len(value) for value in values(await drain(reader, 2))] == [len(largest), 4]


async def test_cancelling_does_not_unsend(topic, producer, reader):
    sending_it = asyncio.create_task(producer.send(topic, 0, b"x"))
    await asyncio.sleep(0)
    sending_it.cancel()
    await asyncio.wait({sending_it})

    await reader.assign({0: 0})
    assert values(await drain(reader, 1)) == [b"x"]


async def test_posting_beyond_the_buffer_is_refused_and_sending_waits(topic, producer, reader, monkeypatch):
    monkeypatch.setattr(sending, "MAX_BUFFERED_RECORDS", 10)
    for number in range(10):
        producer.post(topic, 0, f"{number}".encode())
    with pytest.raises(asyncio.QueueFull):
        producer.post(topic, 0, b"one too many")
    await producer.send(topic, 0, b"patient")

    await reader.assign({0: 0})
    assert values(await drain(reader, 11)) == [*(f"{number}".encode() for number in range(10)), b"patient"]


async def test_leaving_the_producer_waits_for_what_was_posted(world, topic, reader):
    async with world.bus().producer() as producer:
        for number in range(1000):
            producer.post(topic, 0, f"{number}".encode())
    assert await reader.end_offset(0) == 1000
    with pytest.raises(BusUnavailable):
        producer.post(topic, 0, b"x")


async def test_lost_answers_double_records_but_never_lose_or_reorder_them(world, topic, producer, reader):
    world.lose_answers(0.4)
    sent = [f"{number}".encode() for number in range(60)]
    for value in sent:
        producer.post(topic, 0, value)
        await asyncio.sleep(0.002)
    last = await producer.send(topic, 0, b"last")

    end = await reader.end_offset(0)
    await reader.assign({0: 0})
    records = await drain(reader, end)

    assert first_copies(records) == [*sent, b"last"]
    assert records[last].value == b"last"
    assert len(records) > len(sent) + 1, "the test must have lost an answer"


async def test_reachable(world):
    assert await world.bus().reachable()
    assert not await world.cut_off_bus().reachable()


async def test_an_idle_log_answers_all_the_same(world, topic):
    bus = world.bus()
    assert bus.silent_s() == 0.0
    async with bus.reader(topic, group="g") as reader:
        await reader.assign({0: Start.END})
        for _ in range(3):
            assert not await reader.read(0.5)
            assert bus.silent_s() < 2.5
    assert bus.silent_s() == 0.0


async def test_a_log_that_is_away_gives_nothing_and_takes_nothing_in(world, topic, monkeypatch):
    monkeypatch.setattr("shared.bus.kafka_reader.CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr("shared.bus.memory.CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr("shared.bus.kafka.FLUSH_TIMEOUT_S", 0.1)
    monkeypatch.setattr("shared.bus.memory.FLUSH_TIMEOUT_S", 0.1)
    bus = world.cut_off_bus()
    async with bus.producer() as producer, bus.reader(topic, group="g") as reader:
        sending_it = asyncio.create_task(producer.send(topic, 0, b"x"))
        assigning = asyncio.create_task(reader.assign({0: Start.END}))
        assert not await reader.read(0.1)
        for call in (reader.committed(0), reader.end_offset(0), reader.beginning_offset(0)):
            with pytest.raises(BusUnavailable):
                await call
        assert not sending_it.done()
        assert not assigning.done()
        assigning.cancel()
    with pytest.raises(BusUnavailable):
        await sending_it


async def test_sends_wait_for_a_log_that_comes_up_later(kafka_world):
    topic = await kafka_world.topic()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bus = KafkaBus(f"127.0.0.1:{port}", client_id="early")
    async with bus.producer() as producer, bus.reader(topic, group="g") as reader:
        sent = [asyncio.create_task(producer.send(topic, 0, f"{number}".encode())) for number in range(3)]
        assigning = asyncio.create_task(reader.assign({0: Start.BEGINNING}))
        await asyncio.sleep(0.1)
        async with forwarding(port, kafka_world.address):
            assert await asyncio.wait_for(asyncio.gather(*sent), 10) == [0, 1, 2]
            await asyncio.wait_for(assigning, 10)
            assert values(await drain(reader, 3)) == [b"0", b"1", b"2"]
    assert bus.counters.num_failed_appends > 0


async def test_cut_connections_lose_and_reorder_nothing(kafka_world):
    topic = await kafka_world.topic()
    bus = kafka_world.bus()
    sent = [f"{number}".encode() for number in range(400)]
    async with kafka_world.bus().reader(topic, group="g") as reader:
        await reader.assign({0: 0})
        records = []

        async def read_all():
            while len(set(values(records))) < len(sent):
                records.extend(await reader.read(0.5))

        async with bus.producer() as producer, asyncio.timeout(20):
            reading = asyncio.create_task(read_all())
            for number, value in enumerate(sent):
                producer.post(topic, 0, value)
                await asyncio.sleep(0.002)
                if number % 100 == 50:
                    cut_connections(producer._append.__self__._connection.client)
                if number % 100 == 99:
                    await reader._connected.wait()
                    cut_connections(reader._client)
            await reading
    assert first_copies(records) == sent
    assert [record.offset for record in records] == list(range(len(records)))


async def fail_inside(*_):
    raise AssertionError("inside the library")


async def test_a_client_that_fails_in_an_unforeseen_way_is_replaced(kafka_world, monkeypatch):
    topic = await kafka_world.topic()
    bus = kafka_world.bus()
    async with bus.producer() as producer:
        assert await producer.send(topic, 0, b"0") == 0
        monkeypatch.setattr(producer._append.__self__._connection.client, "send", fail_inside)
        assert await asyncio.wait_for(producer.send(topic, 0, b"1"), 10) == 1
    assert bus.counters.num_producers_replaced == 1


async def test_a_fetch_that_is_never_answered_is_given_up(kafka_world, monkeypatch):
    monkeypatch.setattr(kafka_reader, "FETCH_MAX_WAIT_MS", 100)
    monkeypatch.setattr(kafka_reader, "REQUEST_TIMEOUT_MS", 500)
    topic = await kafka_world.topic()
    bus = kafka_world.bus()
    async with bus.producer() as producer, bus.reader(topic, group="g") as reader:
        await reader.assign({0: 0})
        await producer.send(topic, 0, b"0")
        await drain(reader, 1)

        for connection in reader._client._conns.values():
            connection._writer.transport.pause_reading()
        await producer.send(topic, 0, b"1")

        assert values(await drain(reader, 1)) == [b"1"]
    assert bus.counters.num_consumers_replaced == 1


async def test_an_idle_reader_keeps_its_connection(kafka_world, monkeypatch):
    monkeypatch.setattr(kafka_reader, "FETCH_MAX_WAIT_MS", 100)
    monkeypatch.setattr(kafka_reader, "REQUEST_TIMEOUT_MS", 500)
    topic = await kafka_world.topic()
    bus = kafka_world.bus()
    async with bus.reader(topic, group="g") as reader:
        await reader.assign({0: 0, 1: Start.END})
        for _ in range(8):
            assert not await reader.read(0.2)
    assert bus.counters.num_consumers_replaced == 0


async def test_a_reader_that_is_never_asked_takes_in_only_so_much(kafka_world, monkeypatch):
    monkeypatch.setattr(kafka_reader, "MAX_AHEAD_BYTES", 10_000)
    monkeypatch.setattr(kafka_reader, "MAX_ANSWER_BYTES", 20_000)
    topic = await kafka_world.topic()
    bus = kafka_world.bus()
    async with bus.producer() as producer, bus.reader(topic, group="g") as reader:
        sent = [f"{number}".encode() * 1000 for number in range(100)]
        for value in sent:
            await producer.send(topic, 0, value)
        await reader.assign({0: 0})
        async with asyncio.timeout(10):
            while reader._room.is_set():
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert 0 < len(reader._records) <= 30

        await reader.assign({1: 0})
        await producer.send(topic, 1, b"other")
        assert values(await drain(reader, 1)) == [b"other"]
        await reader.assign({0: 0})
        assert values(await drain(reader, len(sent))) == sent


def cut_connections(client):
    for connection in client._conns.values():
        if connection._writer is not None:
            connection._writer.transport.abort()


class forwarding:  # noqa: N801 - used like a function
    """Connections to `port` end up at `address`."""

    def __init__(self, port, address):
        self._port = port
        self._host, _, target = address.partition(":")
        self._target = int(target)
        self._pumps = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def __aexit__(self, *_):
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader, writer):
        there_reader, there_writer = await asyncio.open_connection(self._host, self._target)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source, sink):
        while data := await source.read(65536):
            sink.write(data)
        sink.close()


async def test_the_broker_unpacks_what_applications_compress(kafka_world):
    """A record in a codec that our readers lack would stop its partition for good; a small bomb would fill them."""
    topic = await kafka_world.topic()
    async with (
        AIOKafkaProducer(
            bootstrap_servers=kafka_world.address, compression_type="gzip", max_request_size=4 * MAX_RECORD_BYTES
        ) as application,
        kafka_world.bus().reader(topic, group="readers") as reader,
    ):
        with pytest.raises(MessageSizeTooLargeError):
            await application.send_and_wait(topic, b"0" * (2 * MAX_RECORD_BYTES), partition=1)
        await application.send_and_wait(topic, b"small", partition=1)
        await reader.assign({1: Start.BEGINNING})
        assert values(await drain(reader, 1)) == [b"small"]
