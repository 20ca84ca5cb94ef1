import asyncio

import pytest

from shared.bus import sending
from shared.bus.port import RECORD_OVERHEAD_BYTES, BusUnavailable, record_bytes
from shared.bus.sending import AppendFailed, SendingProducer
from shared.wire.topics import MAX_RECORD_BYTES


class Log:
    """Appends as told: each entry of `outcomes` is for one append; when they are used up all goes well."""

    def __init__(self, *outcomes):
        self.values = []
        self.batch_lengths = []
        self.num_failures = 0
        self.open = asyncio.Event()
        self.open.set()
        self._outcomes = list(outcomes)

    async def append(self, topic, partition, records):
        await self.open.wait()
        outcome = self._outcomes.pop(0) if self._outcomes else "acknowledged"
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome == "refused":
            raise AppendFailed(outcome)
        self.values += [record.value for record in records]
        self.batch_lengths.append(len(records))
        if outcome == "unknown":
            raise AppendFailed(outcome)
        return len(self.values) - len(records)

    def note_failure(self, topic, partition):
        self.num_failures += 1


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(sending, "FIRST_BACKOFF_S", 0.001)


def a_producer(log):
    return SendingProducer(log.append, log.note_failure)


async def test_what_waits_goes_together():
    log = Log()
    log.open.clear()
    producer = a_producer(log)
    for number in range(5):
        producer.post("t", 0, b"%d" % number)
    await asyncio.sleep(0)
    for number in range(5, 8):
        producer.post("t", 0, b"%d" % number)
    log.open.set()
    assert await producer.flush(1.0) == 0
    assert log.batch_lengths == [5, 3]
    await producer.close()


async def test_a_batch_is_bounded_and_a_larger_record_goes_alone(monkeypatch):
    monkeypatch.setattr(sending, "MAX_BATCH_BYTES", 2 * (RECORD_OVERHEAD_BYTES + 10))
    log = Log()
    producer = a_producer(log)
    for size in (10, 10, 10, 500, 10):
        producer.post("t", 0, bytes(size))
    assert await producer.flush(1.0) == 0
    assert log.batch_lengths == [2, 1, 1, 1]
    await producer.close()


async def test_an_unknown_outcome_is_sent_again_with_all_behind_it():
    log = Log("acknowledged", "unknown", "refused")
    producer = a_producer(log)
    assert await producer.send("t", 0, b"a") == 0
    later = [asyncio.create_task(producer.send("t", 0, value)) for value in (b"b", b"c")]
    assert await asyncio.gather(*later) == [3, 4], "offsets of the copies that were acknowledged"
    assert log.values == [b"a", b"b", b"c", b"b", b"c"]
    assert log.num_failures == 2
    await producer.close()


async def test_a_failing_partition_does_not_hold_up_others():
    log = Log()

    async def append(topic, partition, records):
        if partition == 0:
            raise AppendFailed("always")
        return await log.append(topic, partition, records)

    producer = SendingProducer(append, log.note_failure)
    producer.post("t", 0, b"stuck")
    assert await asyncio.wait_for(producer.send("t", 1, b"x"), 1) == 0
    assert await producer.flush(0.01) == 1
    await producer.close()


@pytest.mark.parametrize("error", [ValueError("a defect"), asyncio.CancelledError("an inner task's")])
async def test_whatever_an_append_raises_its_partition_goes_on_and_the_loop_is_told(error):
    log = Log(error)
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    producer = a_producer(log)
    assert await asyncio.wait_for(producer.send("t", 0, b"x"), 5) == 0
    assert told == [error]
    assert log.num_failures == 1
    await producer.close()


async def test_the_buffer_is_bounded_by_records_and_by_bytes(monkeypatch):
    monkeypatch.setattr(sending, "MAX_BUFFERED_RECORDS", 3)
    monkeypatch.setattr(sending, "MAX_BUFFERED_BYTES", 1000)
    log = Log()
    log.open.clear()
    producer = a_producer(log)
    for _ in range(3):
        producer.post("t", 0, b"x")
    with pytest.raises(asyncio.QueueFull):
        producer.post("t", 0, b"x")

    producer.post("t", 1, bytes(2000))
    with pytest.raises(asyncio.QueueFull):
        producer.post("t", 1, b"behind one that is larger than the buffer")

    waiting = asyncio.create_task(producer.send("t", 0, b"y"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    log.open.set()
    await asyncio.wait_for(waiting, 1)
    assert log.values[-1] == b"y"
    await producer.close()


async def test_closing_tells_all_who_wait(monkeypatch):
    monkeypatch.setattr(sending, "MAX_BUFFERED_RECORDS", 1)
    log = Log()
    log.open.clear()
    producer = a_producer(log)
    unacknowledged = asyncio.create_task(producer.send("t", 0, b"x"))
    await asyncio.sleep(0)
    without_room = asyncio.create_task(producer.send("t", 0, b"y"))
    cancelled = asyncio.create_task(producer.send("t", 1, b"z"))
    await asyncio.sleep(0.01)
    cancelled.cancel()

    assert await producer.flush(0.01) == 2
    await producer.close()

    for task in (unacknowledged, without_room):
        with pytest.raises(BusUnavailable):
            await asyncio.wait_for(task, 1)
    with pytest.raises(BusUnavailable):
        await producer.send("t", 0, b"x")
    assert log.values == []


async def test_the_size_of_a_record_counts_key_and_headers():
    assert record_bytes(b"abc", b"k", (("h", b"12"),)) == 3 + 1 + 1 + 2 + 10 + RECORD_OVERHEAD_BYTES
    producer = a_producer(Log())
    with pytest.raises(ValueError, match=str(MAX_RECORD_BYTES)):
        producer.post("t", 0, bytes(MAX_RECORD_BYTES), headers=())
