"""All of the topic `results`, as every ingest reads it by itself: from a little before its start on.

Nothing is committed: what ended before is looked up where somebody must know it (`ended`).
"""

import asyncio
from collections.abc import Callable

from services.ingest.partitions import GROUP
from shared.bus.port import Bus, BusUnavailable, Reader, Record
from shared.observe.log import Logger
from shared.wire.topics import RESULTS

NUM_READ_BACK = 256
"""Of each partition's last results, at a start: 4096 in all."""

READ_TIMEOUT_S = 1.0
RETRY_S = 1.0

NUM_AT_ONCE = 16
"""So many results are taken before others get their turn."""


async def follow_results(bus: Bus, see: Callable[[Record], None], begun: asyncio.Event, log: Logger) -> None:
    """Let `see` have each result, for ever; once `begun` is set none that comes is missed."""
    async with bus.reader(RESULTS.name, group=GROUP) as reader:
        await reader.assign(await _starts(reader, log))
        begun.set()
        while True:
            for number, record in enumerate(await reader.read(READ_TIMEOUT_S), 1):
                see(record)
                if number % NUM_AT_ONCE == 0:
                    await asyncio.sleep(0)


async def _starts(reader: Reader, log: Logger) -> dict[int, int]:
    while True:
        try:
            return {
                partition: max(
                    await reader.beginning_offset(partition), await reader.end_offset(partition) - NUM_READ_BACK
                )
                for partition in range(RESULTS.num_partitions)
            }
        except BusUnavailable as error:
            log.warning("results not followed yet", error=str(error))
            await asyncio.sleep(RETRY_S)
