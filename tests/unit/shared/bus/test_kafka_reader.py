"""What a reader asks brokers for, and what it makes of their answers."""

import asyncio
import struct
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog
from aiokafka.errors import (
    CorruptRecordException,
    FetchSessionIdNotFound,
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    NotCoordinatorForGroupError,
    NotLeaderForPartitionError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.fetch import FetchRequest_v11
from aiokafka.record.util import calc_crc32c

from shared.bus import kafka_client, kafka_reader
from shared.bus.kafka_client import BusCounters
from shared.bus.kafka_reader import FetchSession, KafkaReader, unpacked
from shared.bus.port import BusUnavailable, Committed
from tests.unit.shared.bus.brokers import SESSION, TOPIC, Brokers, answer, asked_for, batch, news

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


def control_batch(offset):
    data = bytearray(batch(offset, b"commit"))
    struct.pack_into(">h", data, 21, 0x20)
    struct.pack_into(">I", data, 17, calc_crc32c(bytes(data[21:])))
    return bytes(data)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kafka_reader, "RECONNECT_BACKOFF_S", 0.001)
    monkeypatch.setattr(kafka_reader, "RETRY_BACKOFF_MS", 1)


@asynccontextmanager
async def reading(monkeypatch, brokers, counters=None):
    monkeypatch.setattr(kafka_client, "AIOKafkaClient", brokers.client)
    reader = KafkaReader("nowhere:1", "test", TOPIC, "group", SILENT, counters or BusCounters())
    running = asyncio.create_task(reader.run())
    try:
        yield reader
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def seen(records):
    return [(record.partition, record.offset, record.value) for record in records]


def test_records_are_unpacked_as_they_were_appended():
    (record,), position = unpacked(TOPIC, 3, 5, batch(5, b"value"))
    assert (record.topic, record.partition, record.offset, record.timestamp_s) == (TOPIC, 3, 5, 2.5)
    assert (record.key, record.value, record.headers) == (b"key", b"value", (("name", b"header"),))
    assert position == 6


def test_records_before_the_position_are_left_out():
    records, position = unpacked(TOPIC, 0, 6, batch(5, b"a", b"b", b"c") + batch(8, b"d"))
    assert seen(records) == [(0, 6, b"b"), (0, 7, b"c"), (0, 8, b"d")]
    assert position == 9


def test_control_batches_are_passed_over():
    records, position = unpacked(TOPIC, 0, 0, batch(0, b"a") + control_batch(1) + batch(2, b"b") + control_batch(3))
    assert seen(records) == [(0, 0, b"a"), (0, 2, b"b")]
    assert position == 4


def test_a_header_whose_name_is_no_text_keeps_nobody_from_what_is_behind_it():
    data = bytearray(batch(5, b"a", b"b" * 300).replace(b"name", b"\xffame"))
    struct.pack_into(">I", data, 17, calc_crc32c(bytes(data[21:])))
    records, position = unpacked(TOPIC, 3, 5, batch(4, b"x") + bytes(data) + batch(7, b"y"))
    assert seen(records) == [(3, 5, b"a"), (3, 6, b"b" * 300), (3, 7, b"y")]
    assert position == 8
    (plain, *_), _ = unpacked(TOPIC, 3, 5, batch(5, b"a", b"b" * 300))
    assert records[0] == replace(plain, headers=(("\ufffdame", b"header"),))


def test_a_batch_that_was_cut_off_is_left_for_the_next_fetch():
    records, position = unpacked(TOPIC, 0, 0, batch(0, b"a") + batch(1, b"b")[:-1])
    assert seen(records) == [(0, 0, b"a")]
    assert position == 1


def test_a_wrong_checksum_is_found():
    data = bytearray(batch(4, b"value"))
    data[-1] ^= 1
    with pytest.raises(CorruptRecordException, match="topic/0"):
        unpacked(TOPIC, 0, 4, bytes(data))


def test_a_session_names_only_what_moved():
    session = FetchSession(TOPIC)
    first = session.request({0: 5, 1: 0})
    assert asked_for(first) == {0: 5, 1: 0}
    session.answered(answer())
    second = session.request({0: 6, 1: 0})
    assert asked_for(second) == {0: 6}
    session.answered(answer())
    assert asked_for(session.request({0: 6, 1: 0})) == {}

    sent = [request.build(FetchRequest_v11) for request in (first, second)]
    assert [(request.session_id, request.session_epoch) for request in sent] == [(0, 0), (SESSION, 1)]


def test_without_a_session_everything_is_named_each_time():
    session = FetchSession(TOPIC)
    for _ in range(2):
        request = session.request({0: 5, 1: 0})
        assert asked_for(request) == {0: 5, 1: 0}
        assert request.build(FetchRequest_v11).session_epoch == 0
        session.answered(answer(session_id=0))


def test_a_session_that_the_broker_forgot_is_an_error():
    with pytest.raises(FetchSessionIdNotFound):
        FetchSession(TOPIC).answered(answer(error_code=FetchSessionIdNotFound.errno))


async def test_the_next_fetch_leaves_before_the_records_are_read(monkeypatch):
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0, 1: 0})
        positions, reply = await brokers.asked()
        assert positions == {0: 0, 1: 0}
        reply.set_result(answer(news(1, batch(0, b"a"), end=1)))

        assert (await brokers.asked())[0] == {1: 1}
        assert seen(await reader.read(5)) == [(1, 0, b"a")]


async def test_a_fetch_that_ends_without_a_word_is_missed(monkeypatch):
    monkeypatch.setattr(kafka_reader, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(kafka_reader, "STANDSTILL_S", 0.05)
    brokers, counters = Brokers(), BusCounters()
    async with reading(monkeypatch, brokers, counters) as reader:
        await reader.assign({0: 0})
        _, reply = await brokers.asked()
        reply.cancel()  # as a library's inner task that was cancelled: a task group takes it for the end of our own
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, batch(0, b"a"), end=1)))
        assert seen(await reader.read(5)) == [(0, 0, b"a")]
    assert counters.num_consumers_replaced == 1


async def test_a_broker_that_is_silent_holds_up_no_other(monkeypatch):
    brokers = Brokers(num_brokers=2)
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0, 1: 3, 2: 0})
        assert (await brokers.asked(0))[0] == {0: 0, 2: 0}
        for offset in (3, 4):
            _, reply = await brokers.asked(1)
            reply.set_result(answer(news(1, batch(offset, b"a"), end=offset + 1)))
            assert seen(await reader.read(5)) == [(1, offset, b"a")]


async def test_nothing_is_fetched_while_too_much_waits_to_be_read(monkeypatch):
    monkeypatch.setattr(kafka_reader, "MAX_AHEAD_BYTES", 100)
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, batch(0, b"a" * 100), end=5)))
        await asyncio.sleep(0.02)
        assert brokers.fetches[0].empty()
        assert reader.num_behind() == 5
        assert len(await reader.read(5)) == 1
        assert reader.num_behind() == 4
        assert (await brokers.asked())[0] == {0: 1}


async def test_giving_up_what_waits_to_be_read_makes_room(monkeypatch):
    monkeypatch.setattr(kafka_reader, "MAX_AHEAD_BYTES", 100)
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, batch(0, b"a" * 100), end=5)))
        await asyncio.sleep(0.02)
        await reader.assign({1: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(1, batch(0, b"b"), end=1)))
        assert seen(await reader.read(5)) == [(1, 0, b"b")]


async def test_only_the_records_of_partitions_that_stay_are_handed_out(monkeypatch):
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0, 1: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, batch(0, b"a")), news(1, batch(0, b"b"))))
        positions, reply = await brokers.asked()
        assert positions == {0: 1, 1: 1}

        await reader.assign({1: 0, 2: 4})
        reply.set_result(answer(news(0, batch(1, b"c"))))
        assert (await brokers.asked())[0] == {1: 1, 2: 4}
        assert seen(await reader.read(5)) == [(1, 0, b"b")]


async def test_an_answer_from_before_a_partition_was_taken_anew_is_void(monkeypatch):
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0, 1: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, batch(0, b"a")), news(1, batch(0, b"b"))))
        await reader.assign({1: 0})
        await reader.assign({0: 7, 1: 0})

        assert (await brokers.asked())[0] == {0: 7, 1: 1}
        assert seen(await reader.read(5)) == [(1, 0, b"b")]


async def test_assignments_that_follow_each_other_wait_for_one_poll(monkeypatch):
    brokers = Brokers()
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        _, reply = await brokers.asked()
        for partition in range(1, 5):
            await reader.assign({0: 0, partition: 0})
            await asyncio.sleep(0.001)
        assert brokers.fetches[0].empty()
        reply.set_result(answer())
        assert (await brokers.asked())[0] == {0: 0, 4: 0}


async def test_an_offset_that_is_not_in_the_log_reads_from_the_beginning(monkeypatch):
    brokers, counters = Brokers(), BusCounters()
    brokers.beginning = 40
    async with reading(monkeypatch, brokers, counters) as reader:
        await reader.assign({0: 3})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, end=-1, error=OffsetOutOfRangeError)))
        assert (await brokers.asked())[0] == {0: 40}
    assert counters.num_consumers_replaced == 0


@pytest.mark.parametrize(
    "failure",
    [
        answer(news(0, error=NotLeaderForPartitionError)),
        answer(error_code=FetchSessionIdNotFound.errno),
        KafkaConnectionError(),
        AssertionError("inside the library"),
    ],
)
async def test_a_client_with_which_a_fetch_fails_is_replaced(monkeypatch, failure):
    brokers, counters = Brokers(), BusCounters()
    async with reading(monkeypatch, brokers, counters) as reader:
        await reader.assign({0: 3})
        _, reply = await brokers.asked()
        reply.set_exception(failure) if isinstance(failure, Exception) else reply.set_result(failure)
        assert (await brokers.asked())[0] == {0: 3}
    assert (counters.num_consumers_replaced, brokers.num_clients) == (1, 2)


async def test_a_client_that_cannot_connect_is_tried_again(monkeypatch):
    brokers, counters = Brokers(), BusCounters()

    async def fail():
        if brokers.num_clients < 3:
            raise AssertionError("inside the library")

    monkeypatch.setattr(brokers, "bootstrap", fail)
    async with reading(monkeypatch, brokers, counters) as reader:
        await reader.assign({0: 3})
        assert (await brokers.asked())[0] == {0: 3}
    assert counters.num_consumers_replaced == 0


async def test_a_coordinator_that_moved_is_looked_up_again(monkeypatch):
    brokers = Brokers()
    brokers.coordinator_says = [NotCoordinatorForGroupError, GroupCoordinatorNotAvailableError]
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        await reader.commit({0: Committed(7, "note")})
        assert await reader.committed(0) == Committed(7, "note")
    assert brokers.num_lookups == 3


async def test_a_refusal_that_no_retry_mends_ends_the_call(monkeypatch):
    brokers = Brokers()
    brokers.coordinator_says = [TopicAuthorizationFailedError]
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        with pytest.raises(BusUnavailable, match="TopicAuthorizationFailed"):
            await reader.commit({0: Committed(7)})


async def test_a_call_that_is_retried_in_vain_says_what_failed(monkeypatch):
    monkeypatch.setattr(kafka_reader, "CALL_TIMEOUT_S", 0.05)
    brokers = Brokers()
    brokers.coordinator_says = [NotCoordinatorForGroupError] * 1000
    async with reading(monkeypatch, brokers) as reader:
        with pytest.raises(BusUnavailable, match="NotCoordinatorForGroup"):
            await reader.committed(0)


async def test_what_a_call_opens_on_a_client_that_was_given_up_is_closed(monkeypatch):
    brokers = Brokers()
    num_open = 0
    lookup_goes_on = asyncio.Event()
    send = brokers.send

    async def connect_and_send(node, request, *, group=None):
        nonlocal num_open
        if isinstance(request, FindCoordinatorRequest) and not brokers.num_lookups:
            await lookup_goes_on.wait()
            num_open += 1
        return await send(node, request, group=group)

    async def close():
        nonlocal num_open
        num_open = 0

    monkeypatch.setattr(brokers, "send", connect_and_send)
    monkeypatch.setattr(brokers, "close", close)
    async with reading(monkeypatch, brokers) as reader:
        await reader.assign({0: 0})
        calling = asyncio.create_task(reader.committed(0))
        _, reply = await brokers.asked()
        reply.set_exception(KafkaConnectionError())
        await brokers.asked()
        lookup_goes_on.set()
        assert await calling == Committed(7, "note")
        assert num_open == 0
