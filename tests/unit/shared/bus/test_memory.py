import asyncio
from random import Random

import pytest

from shared.bus import memory, sending
from shared.bus.memory import Fate, MemoryBus, MemoryLog
from shared.bus.port import BusUnavailable, Committed, Start


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(sending, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(memory, "RECONNECT_BACKOFF_S", 0.001)
    monkeypatch.setattr(memory, "CALL_TIMEOUT_S", 0.01)


@pytest.fixture
def log():
    return MemoryLog(clock=lambda: 12.5, random=Random(1))


def values(log, partition=0):
    return [record.value for record in log.records("t", partition)]


def fates(**by_client):
    """The next fates of each client, then none."""
    queues = {client: list(queue) for client, queue in by_client.items()}

    def fate(append):
        queue = queues.get(append.client_id, [])
        return queue.pop(0) if queue else Fate()

    return fate


async def test_time_comes_from_the_clock(log):
    async with MemoryBus(log, client_id="a").producer() as producer:
        await producer.send("t", 0, b"x")
    assert log.records("t", 0)[0].timestamp_s == 12.5


async def test_a_delay_lets_other_producers_pass_but_not_one_s_own_records(log):
    log.fate = fates(slow=[Fate(delay_s=0.02)])
    async with (
        MemoryBus(log, client_id="slow").producer() as slow,
        MemoryBus(log, client_id="quick").producer() as quick,
    ):
        slow.post("t", 0, b"s1")
        await asyncio.sleep(0.005)
        slow.post("t", 0, b"s2")
        await quick.send("t", 0, b"q")
    assert values(log) == [b"q", b"s1", b"s2"]


async def test_fates_of_an_append(log):
    bus = MemoryBus(log, client_id="a")
    log.fate = fates(a=[Fate(lands=False), Fate(acked=False), Fate(late_copy_s=0.01)])
    async with bus.producer() as producer:
        assert await producer.send("t", 0, b"1") == 1
        await producer.send("t", 0, b"2")
        await asyncio.sleep(0.02)
    assert values(log) == [b"1", b"1", b"2", b"1"]
    assert bus.num_failed_appends == 2


async def test_a_killed_process_sends_nothing_more(log):
    bus = MemoryBus(log, client_id="a")
    async with bus.producer() as producer:
        producer.post("t", 0, b"x")
        bus.kill()
        await asyncio.sleep(0.01)
    assert values(log) == []
    assert not await bus.reachable()


async def test_a_zombie_lands_an_ordered_part_of_its_buffer_later():
    lengths = set()
    for seed in range(20):
        log = MemoryLog(clock=lambda: 0.0, random=Random(seed))
        dying, living = MemoryBus(log, client_id="dying"), MemoryBus(log, client_id="living")
        async with living.producer() as survivor:
            async with dying.producer() as producer:
                for number in range(3):
                    producer.post("t", 0, b"%d" % number)
                dying.kill(zombie_after_s=0.002)
            await survivor.send("t", 0, b"living")
            await asyncio.sleep(0.004)
        assert values(log)[0] == b"living"
        assert values(log)[1:] == [b"0", b"1", b"2"][: len(values(log)) - 1]
        lengths.add(len(values(log)) - 1)
    assert lengths == {0, 1, 2, 3}


async def test_a_process_that_cannot_send_keeps_its_records(log):
    bus = MemoryBus(log, client_id="a")
    async with bus.producer() as producer:
        bus.can_send = False
        sent = asyncio.create_task(producer.send("t", 0, b"x"))
        await asyncio.sleep(0.01)
        assert values(log) == []
        bus.can_send = True
        assert await sent == 0


async def test_a_reader_that_stalls_goes_on_where_it_was(log):
    bus = MemoryBus(log, client_id="a")
    async with bus.producer() as producer, bus.reader("t", group="g") as reader:
        await reader.assign({0: Start.END})
        bus.can_read = False
        await producer.send("t", 0, b"x")
        assert not await reader.read(0.01)
        bus.can_read = True
        assert [record.value for record in await reader.read(1.0)] == [b"x"]


async def test_while_the_log_is_away_calls_end_unavailable(log):
    bus = MemoryBus(log, client_id="a")
    async with bus.reader("t", group="g") as reader:
        await reader.assign({0: 0})
        log.away = True
        assert not await bus.reachable()
        with pytest.raises(BusUnavailable):
            await reader.commit({0: Committed(1)})
        log.away = False
        assert await reader.committed(0) is None


def test_a_note_is_bounded():
    with pytest.raises(ValueError, match="4097 bytes, the limit is 4096"):
        Committed(0, "x" * 4097)


async def test_a_bus_that_hears_nothing_knows_since_when():
    now_s = 100.0
    log = MemoryLog(clock=lambda: now_s, random=Random(1))
    deaf, other = MemoryBus(log, client_id="deaf"), MemoryBus(log, client_id="other")
    deaf.can_read = False
    now_s += 2
    log.away = True
    now_s += 3
    assert (deaf.silent_s(), other.silent_s()) == (5.0, 3.0)
    log.away, deaf.can_read = False, True
    assert (deaf.silent_s(), other.silent_s()) == (0.0, 0.0)
