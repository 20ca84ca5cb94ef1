"""Reads what a run left in the topics."""

import asyncio
from collections.abc import Sequence

from shared.bus.port import Bus, Record, Start
from shared.wire.topics import DEAD_LETTER, INGEST, INGEST_RESUME, RESULTS, STREAM_OUT, Topic
from tests.faults.capture import Capture
from tests.faults.history import Fault, History

READ_TIMEOUT_S = 0.2


async def read_topic(bus: Bus, topic: Topic) -> list[Record]:
    """All records that stand in it now, each partition in order. Raises BusUnavailable."""
    records: list[Record] = []
    partitions = range(topic.num_partitions)
    async with bus.reader(topic.name, group="history") as reader:
        ends = {partition: await reader.end_offset(partition) for partition in partitions}
        firsts = {partition: await reader.beginning_offset(partition) for partition in partitions}
        left = {partition for partition in partitions if firsts[partition] < ends[partition]}
        await reader.assign(dict.fromkeys(left, Start.BEGINNING))
        while left:
            for record in await reader.read(READ_TIMEOUT_S):
                if record.offset < ends[record.partition]:
                    records.append(record)
                if record.offset >= ends[record.partition] - 1:
                    left.discard(record.partition)
    return records


async def until_all_ended(bus: Bus, timeout_s: float, *, poll_s: float = 1.0) -> set[bytes]:
    """Wait until each job has a result, for so long at most; keys of those that have none."""
    ends_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        jobs = {record.key for record in await read_topic(bus, INGEST) if record.key is not None}
        missing = jobs - {record.key for record in await read_topic(bus, RESULTS)}
        if not missing or asyncio.get_running_loop().time() > ends_s:
            return missing
        await asyncio.sleep(poll_s)


async def read_history(bus: Bus, captures: Sequence[Capture] = (), faults: Sequence[Fault] = ()) -> History:
    """The whole run so far. Raises BusUnavailable."""
    return History(
        ingest=await read_topic(bus, INGEST),
        stream_out=await read_topic(bus, STREAM_OUT),
        results=await read_topic(bus, RESULTS),
        dead_letters=await read_topic(bus, DEAD_LETTER),
        resumes=await read_topic(bus, INGEST_RESUME),
        captures=captures,
        faults=faults,
    )
