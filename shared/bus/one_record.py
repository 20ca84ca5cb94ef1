"""One record by its place in the log."""

from shared.bus.port import Bus, Record

READ_TIMEOUT_S = 1.0


async def record_at(bus: Bus, topic: str, partition: int, offset: int, *, group: str) -> Record | None:
    """The record that stands there; None if nothing does (any more). Raises BusUnavailable."""
    async with bus.reader(topic, group=group) as reader:
        if not await reader.beginning_offset(partition) <= offset < await reader.end_offset(partition):
            return None
        await reader.assign({partition: offset})
        while not (records := await reader.read(READ_TIMEOUT_S)):
            continue
        return records[0] if records[0].offset == offset else None
