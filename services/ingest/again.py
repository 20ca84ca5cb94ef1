"""Records that were read before and are wanted again, by their place in the log."""

import asyncio
from collections import defaultdict

from services.ingest.partitions import GROUP
from shared.bus.one_record import records_from
from shared.bus.port import Bus, BusUnavailable, Record
from shared.observe.log import Logger
from shared.state.keys import BEAT_INTERVAL_S
from shared.wire.to_ingest import LogPosition

MAX_KEPT_BYTES = 16 * 2**20

_Place = tuple[str, LogPosition]


class RecordsAgain:
    """What stands behind a record that was looked up comes with it, and is kept for a while: jobs that were handed in
    together are wanted one after the other, and a connection for each would take longer than to place it."""

    def __init__(self, bus: Bus, log: Logger) -> None:
        self._bus = bus
        self._log = log
        self._kept: dict[_Place, Record] = {}
        self._num_bytes = 0
        self._locks: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def at(self, topic: str, position: LogPosition) -> Record | None:
        """The record that stands there; None: it is gone. Waits while the log is away."""
        async with self._locks[topic, position.partition]:
            if (topic, position) not in self._kept:
                await self._read_patiently(topic, position)
            return self._kept.get((topic, position))

    async def _read_patiently(self, topic: str, position: LogPosition) -> None:
        while True:
            try:
                records = await records_from(self._bus, topic, position.partition, position.offset, group=GROUP)
            except BusUnavailable as error:
                self._log.warning("looking up a record waits for the log", error=str(error))
                await asyncio.sleep(BEAT_INTERVAL_S)
            else:
                # The one that is wanted last, so that it is among those kept.
                for record in reversed(records):
                    self._keep((topic, LogPosition(record.partition, record.offset)), record)
                return

    def _keep(self, place: _Place, record: Record) -> None:
        if place in self._kept:
            return
        self._kept[place] = record
        self._num_bytes += len(record.value)
        while self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            self._num_bytes -= len(self._kept.pop(next(iter(self._kept))).value)
