"""Which jobs have their result already, of those that are read again long after they came.

Whoever takes a partition over reads again what stood behind the last commit, and while the log is away nobody commits.
The owner of a request knows late copies of its records for void, but only for a while: an older job is not placed
before the results since it came were looked through.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from services.ingest.jobs import Job
from services.ingest.partitions import GROUP
from shared.bus.port import Bus, BusUnavailable, Record
from shared.bus.to_end import read_to_end
from shared.observe.log import Logger
from shared.request import RequestId
from shared.state.keys import BEAT_INTERVAL_S
from shared.wire.topics import RESULTS

OLD_AFTER_S = 30.0
"""A job that came so long ago may have been answered. Far less than the time for which owners know what ended: what is
sent of a younger one may be late."""


@dataclass(slots=True)
class _Tail:
    """The results of one partition that the log took in since `since_s`.

    Attributes:
        position: up to where it was read.
        read_s: when that was.
    """

    since_s: float
    position: int
    read_s: float = 0.0
    ids: set[RequestId] = field(default_factory=set[RequestId])

    def see(self, record: Record) -> None:
        self.ids.add(RequestId((record.key or b"").decode("utf-8", "replace")))


class EndedJobs:
    """Args:
    clock_s: unix seconds.
    """

    def __init__(self, bus: Bus, *, clock_s: Callable[[], float], log: Logger) -> None:
        self._bus = bus
        self._clock_s = clock_s
        self._log = log
        self._tails: dict[int, _Tail] = {}
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def has(self, job: Job) -> bool:
        """Whether the job's request has its result. Waits while the log is away."""
        if self._clock_s() - job.accepted_s < OLD_AFTER_S:
            return False
        partition = job.position.partition
        async with self._locks[partition]:
            tail = self._tails.get(partition)
            if tail is None or tail.since_s > job.accepted_s or tail.read_s < self._clock_s() - OLD_AFTER_S:
                tail = await self._read_patiently(partition, job.accepted_s)
            return job.request_id in tail.ids

    async def _read_patiently(self, partition: int, since_s: float) -> _Tail:
        while True:
            try:
                return await self._read(partition, since_s)
            except BusUnavailable as error:
                self._log.warning("looking for results waits for the log", error=str(error))
                await asyncio.sleep(BEAT_INTERVAL_S)

    async def _read(self, partition: int, since_s: float) -> _Tail:
        """Read the partition's results on to their end, or from `since_s` on. Raises BusUnavailable."""
        now_s = self._clock_s()
        self._tails = {each: tail for each, tail in self._tails.items() if tail.read_s >= now_s - 2 * OLD_AFTER_S}
        async with self._bus.reader(RESULTS.name, group=GROUP) as reader:
            tail = self._tails.get(partition)
            if tail is None or tail.since_s > since_s:
                tail = self._tails[partition] = _Tail(since_s, await reader.offset_since(partition, since_s))
            ends = await read_to_end(reader, {partition: tail.position}, tail.see)
        tail.position = ends[partition]
        tail.read_s = now_s
        return tail
