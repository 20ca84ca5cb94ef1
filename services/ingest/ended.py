"""Which of the jobs in hand have their result already: they are not placed.

A job may wait for hours, and meanwhile be cancelled, or run by another ingest that had its partition before. The owner
of a request knows late copies of its records for void, but only for a while. So every result that comes is held
against the jobs in hand. Whoever takes a partition over also reads again what stood behind the last commit, of which
some may have ended before: such a job, unless it is young, is not placed before those results were looked through that
may be its own.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from services.ingest.jobs import Job
from services.ingest.partitions import CLOCKS_DIFFER_S, GROUP
from shared.bus.port import Bus, BusUnavailable, Record
from shared.bus.to_end import read_to_end
from shared.observe.log import Logger
from shared.request import Priority, RequestId
from shared.state.keys import BEAT_INTERVAL_S
from shared.wire.topics import RESULTS

OLD_AFTER_S = 30.0
"""A job that came so long ago may have been answered. Far less than the time for which owners know what ended: what is
sent of a younger one may be late."""


_Lane = tuple[int, bool]
"""Partition, and whether for batch: that has waited longest, and takes longest to look through."""


@dataclass(slots=True)
class _Held:
    """A request that is in hand.

    Attributes:
        lane: of its job.
        num: how often: its job may stand in the log twice, and a choice of it may be placed again.
        ended_s: by the log's clock, when a result of it came; of an earlier request of that name it says nothing.
    """

    lane: _Lane
    num: int = 0
    ended_s: float = 0.0


class EndedJobs:
    """Args:
        clock_s: unix seconds.

    Attributes:
        follows: to be set once `see` gets every result that comes.
    """

    def __init__(self, bus: Bus, *, clock_s: Callable[[], float], log: Logger) -> None:
        self.follows = asyncio.Event()
        self._bus = bus
        self._clock_s = clock_s
        self._log = log
        self._held: dict[RequestId, _Held] = {}
        self._unsure: defaultdict[_Lane, dict[RequestId, tuple[float, float]]] = defaultdict(dict)
        """Who may have ended before it was taken in hand; since when it may, and when it was (unix seconds)."""
        self._locks: defaultdict[_Lane, asyncio.Lock] = defaultdict(asyncio.Lock)

    def hold(self, job: Job, unsure_since_s: float | None = None) -> None:
        """The job is taken in hand.

        Args:
            unsure_since_s: others had it in hand before, and may have ended it since then (unix seconds).
        """
        held = self._held.setdefault(job.request_id, _Held((job.position.partition, job.priority is Priority.BATCH)))
        held.num += 1
        if unsure_since_s is not None:
            self._unsure[held.lane][job.request_id] = unsure_since_s, self._clock_s()

    def let_go(self, request_id: RequestId) -> None:
        """Its job is not in hand any more."""
        held = self._held[request_id]
        held.num -= 1
        if not held.num:
            del self._held[request_id]
            self._unsure[held.lane].pop(request_id, None)

    def see(self, result: Record) -> None:
        """A record of `results` was read."""
        held = self._held.get(RequestId((result.key or b"").decode("utf-8", "replace")))
        if held is not None:
            held.ended_s = max(held.ended_s, result.timestamp_s)

    def has_seen(self, job: Job) -> bool:
        """Whether a result came of the job, which is in hand."""
        return self._held[job.request_id].ended_s >= job.accepted_s

    async def has(self, job: Job) -> bool:
        """Whether the job, which is in hand, has its result. Waits while the log is away."""
        await self.follows.wait()
        if self._clock_s() - job.accepted_s >= OLD_AFTER_S:
            await self._look_through(self._held[job.request_id].lane, job.request_id)
        return self.has_seen(job)

    async def look_back(self) -> None:
        """Look through for all of whom that is not known yet: who was young waits perhaps for longer than owners know
        what ended."""
        for lane, unsure in list(self._unsure.items()):
            if unsure:
                await self._look_through(lane, next(iter(unsure)))

    async def _look_through(self, lane: _Lane, request_id: RequestId) -> None:
        """Once for all of a lane that are in hand by now."""
        async with self._locks[lane]:
            unsure = self._unsure[lane]
            while request_id in unsure:
                asked = list(unsure)
                since_s = min(since_s for since_s, _ in unsure.values())
                held_s = max(held_s for _, held_s in unsure.values())
                try:
                    await self._read(lane[0], since_s, held_s + CLOCKS_DIFFER_S)
                except BusUnavailable as error:
                    self._log.warning("looking for results waits for the log", error=str(error))
                    await asyncio.sleep(BEAT_INTERVAL_S)
                else:
                    for each in asked:
                        unsure.pop(each, None)

    async def _read(self, partition: int, since_s: float, until_s: float) -> None:
        """See the partition's results of that time. Raises BusUnavailable."""
        async with self._bus.reader(RESULTS.name, group=GROUP) as reader:
            start = await reader.offset_since(partition, since_s)
            end = await reader.offset_since(partition, until_s)
            await read_to_end(reader, {partition: start}, self.see, {partition: end})
