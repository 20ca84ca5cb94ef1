"""Single records by their place in the log."""

from collections.abc import Sequence

from shared.bus.port import Bus, Record

READ_TIMEOUT_S = 1.0


async def record_at(bus: Bus, topic: str, partition: int, offset: int, *, group: str) -> Record | None:
    """The record that stands there; None if nothing does (any more). Raises BusUnavailable."""
    records = await records_from(bus, topic, partition, offset, group=group)
    return records[0] if records and records[0].offset == offset else None


async def records_from(bus: Bus, topic: str, partition: int, offset: int, *, group: str) -> Sequence[Record]:
    """Some records, in order, from the first that stands there or behind; none if nothing stands there any more, or not
    yet. Raises BusUnavailable."""
    async with bus.reader(topic, group=group) as reader:
        if not await reader.beginning_offset(partition) <= offset < await reader.end_offset(partition):
            return ()
        await reader.assign({partition: offset})
        while not (records := await reader.read(READ_TIMEOUT_S)):
            continue
        return records
