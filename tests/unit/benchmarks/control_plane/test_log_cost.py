import itertools
from random import Random

from benchmarks.control_plane.log_cost import Volume, end_offsets, per_token, volumes
from shared.bus.memory import MemoryBus, MemoryLog


def test_per_token_counts_every_topic_and_the_whole():
    found = {"stream-out": Volume(30, 9000), "results": Volume(10, 1000), "dead-letter": Volume(0, 0)}
    assert per_token(found, 100) == {
        "stream-out": {"records": 30, "records_per_token": 0.3, "bytes_per_token": 90.0},
        "results": {"records": 10, "records_per_token": 0.1, "bytes_per_token": 10.0},
        "all": {"records": 40, "records_per_token": 0.4, "bytes_per_token": 100.0},
    }


async def test_volumes_are_what_was_appended_between_two_looks():
    bus = MemoryBus(MemoryLog(clock=itertools.count().__next__, random=Random(1)), client_id="test")
    async with bus.producer() as producer:
        await producer.send("stream-out", 3, b"before")
        before = await end_offsets(bus)
        await producer.send("stream-out", 3, b"12345")
        await producer.send("stream-out", 4, b"123")
        await producer.send("results", 0, b"1")
        after = await end_offsets(bus)
        await producer.send("stream-out", 3, b"after")
    found = await volumes(bus, before, after)
    assert {name: volume for name, volume in found.items() if volume.records} == {
        "stream-out": Volume(2, 8),
        "results": Volume(1, 1),
    }
