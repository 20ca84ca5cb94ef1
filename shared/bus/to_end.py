"""What stands in partitions now, and not what comes behind it."""

from collections.abc import Callable, Mapping

from shared.bus.port import Reader, Record

READ_TIMEOUT_S = 0.2


async def read_to_end(reader: Reader, starts: Mapping[int, int], see: Callable[[Record], None]) -> dict[int, int]:
    """Let `see` have all records from the `starts` to where the partitions end now, and perhaps some that came since;
    where they ended. Raises BusUnavailable.

    The reader is assigned these partitions, as far as there is something to read.
    """
    ends = {partition: await reader.end_offset(partition) for partition in starts}
    positions = {partition: max(start, await reader.beginning_offset(partition)) for partition, start in starts.items()}
    await reader.assign({p: position for p, position in positions.items() if position < ends[p]})
    while any(position < ends[partition] for partition, position in positions.items()):
        for record in await reader.read(READ_TIMEOUT_S):
            positions[record.partition] = record.offset + 1
            see(record)
    return ends
