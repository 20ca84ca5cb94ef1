"""The log's twin: partitions as lists, shared by any number of simulated processes in one event loop.

It keeps the port's promises and nothing more: records of several producers interleave as their delays say, lost
acknowledgements double what was sent, a given-up request lands late, a killed process leaves part of its buffer to
land after its death. Which of these happens is decided by `MemoryLog.fate`, once for each append.
"""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from random import Random

from shared.bus.port import BusUnavailable, Committed, Producer, Reader, Record, Start
from shared.bus.sending import AppendFailed, SendingProducer, Unsent

CALL_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 10.0
RECONNECT_BACKOFF_S = 0.2

Place = tuple[str, int]
"""(topic, partition)"""


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one append.

    Attributes:
        delay_s: before it lands; meanwhile other producers' records may.
        lands: False: it never does, and the producer sends again.
        acked: False: it lands and the producer does not hear of it and sends again.
        late_copy_s: a second copy lands so much later, behind whatever has landed by then; None: there is none.
    """

    delay_s: float = 0.0
    lands: bool = True
    acked: bool = True
    late_copy_s: float | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """One append, as `fate` sees it."""

    client_id: str
    topic: str
    partition: int
    num_records: int


def no_faults(append: Append) -> Fate:  # noqa: ARG001 - every append has the same fate
    """All lands at once."""
    return Fate()


class MemoryLog:
    """What the brokers hold.

    Attributes:
        fate: decides what happens to each append; may be exchanged at any time.
        away: True: no process reaches the log.
    """

    def __init__(self, *, clock: Callable[[], float], random: Random) -> None:
        self.fate: Callable[[Append], Fate] = no_faults
        self._away_since_s: float | None = None
        self._clock = clock
        self._random = random
        self._records: defaultdict[Place, list[Record]] = defaultdict(list)
        self._first_offsets: defaultdict[Place, int] = defaultdict(int)
        self._commits: dict[tuple[str, Place], Committed] = {}
        # In the order of their coming, as everything here: a schedule must run the same way each time.
        self._waiting: defaultdict[Place, dict[asyncio.Future[None], None]] = defaultdict(dict)

    @property
    def away(self) -> bool:
        return self._away_since_s is not None

    @away.setter
    def away(self, is_away: bool) -> None:
        self._away_since_s = self._clock() if is_away else None

    @property
    def away_since_s(self) -> float | None:
        """By the log's clock; None while it is there."""
        return self._away_since_s

    def now_s(self) -> float:
        return self._clock()

    def append(self, topic: str, partition: int, records: Sequence[Unsent]) -> int:
        """Add records now; the offset of the first."""
        kept = self._records[topic, partition]
        first_offset = self.end_offset(topic, partition)
        now_s = self._clock()
        kept += [
            Record(topic, partition, offset, record.key, record.value, record.headers, now_s)
            for offset, record in enumerate(records, first_offset)
        ]
        for waiter in self._waiting.pop((topic, partition), ()):
            if not waiter.done():
                waiter.set_result(None)
        return first_offset

    def append_later(self, delay_s: float, topic: str, partition: int, records: Sequence[Unsent]) -> None:
        """Add records after a while, whoever lives by then."""
        asyncio.get_running_loop().call_later(delay_s, self.append, topic, partition, records, context=Context())

    def records(self, topic: str, partition: int, start: int = 0) -> Sequence[Record]:
        """What is kept at `start` and behind it."""
        first_offset = self._first_offsets[topic, partition]
        return self._records[topic, partition][max(0, start - first_offset) :]

    def has_records(self, topic: str, partition: int, start: int) -> bool:
        return self.end_offset(topic, partition) > max(start, self.beginning_offset(topic, partition))

    def end_offset(self, topic: str, partition: int) -> int:
        return self._first_offsets[topic, partition] + len(self._records[topic, partition])

    def beginning_offset(self, topic: str, partition: int) -> int:
        return self._first_offsets[topic, partition]

    def offset_since(self, topic: str, partition: int, unix_s: float) -> int:
        records = self._records[topic, partition]
        index = bisect_left(records, unix_s, key=lambda record: record.timestamp_s)
        return self._first_offsets[topic, partition] + index

    def trim(self, topic: str, partition: int, offset: int) -> None:
        """Retention: forget what is below `offset`."""
        surplus = offset - self._first_offsets[topic, partition]
        del self._records[topic, partition][:surplus]
        self._first_offsets[topic, partition] = offset

    def committed(self, group: str, topic: str, partition: int) -> Committed | None:
        return self._commits.get((group, (topic, partition)))

    def commit(self, group: str, topic: str, partition: int, committed: Committed) -> None:
        self._commits[group, (topic, partition)] = committed

    async def wait(self, topic: str, partitions: Sequence[int], timeout_s: float) -> None:
        """Until something is added to one of the partitions."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for partition in partitions:
            self._waiting[topic, partition][waiter] = None
        try:
            await asyncio.wait({waiter}, timeout=timeout_s)
        finally:
            for partition in partitions:
                self._waiting[topic, partition].pop(waiter, None)

    def shuffled(self, partitions: Sequence[int]) -> list[int]:
        """Readers get partitions in any order."""
        return self._random.sample(partitions, len(partitions))

    def part_of(self, records: Sequence[Unsent]) -> Sequence[Unsent]:
        """What a killed process had already handed to its sockets: the oldest few."""
        return records[: self._random.randint(0, len(records))]


class MemoryBus:
    """One process's connection to the log.

    Attributes:
        can_send, can_read: False: cut off from the log in that direction, or stopped (SIGSTOP is both); what was
            sent waits in the buffers.
        num_failed_appends: appends that had to be made again.
    """

    def __init__(self, log: MemoryLog, *, client_id: str) -> None:
        self.can_send = True
        self._deaf_since_s: float | None = None
        self.num_failed_appends = 0
        self._log = log
        self._client_id = client_id
        self._producers: set[SendingProducer] = set()
        self._killed = False

    @asynccontextmanager
    async def producer(self) -> AsyncGenerator[Producer]:
        producer = SendingProducer(self._append, self._note_failure)
        self._producers.add(producer)
        try:
            yield producer
        finally:
            if not self._killed:
                await producer.flush(FLUSH_TIMEOUT_S)
            await producer.close()
            self._producers.discard(producer)

    @asynccontextmanager
    async def reader(self, topic: str, *, group: str) -> AsyncGenerator[Reader]:
        yield MemoryReader(self._log, self._can_read, topic, group)

    @property
    def can_read(self) -> bool:
        return self._deaf_since_s is None

    @can_read.setter
    def can_read(self, can_read: bool) -> None:
        self._deaf_since_s = None if can_read else self._log.now_s()

    async def reachable(self) -> bool:
        return self._can_read()

    def silent_s(self) -> float:
        sinces = [since_s for since_s in (self._deaf_since_s, self._log.away_since_s) if since_s is not None]
        return self._log.now_s() - min(sinces) if sinces else 0.0

    def kill(self, *, zombie_after_s: float | None = None) -> None:
        """SIGKILL: from now on nothing is sent or read through this connection.

        Args:
            zombie_after_s: after this long a part of what was buffered for each partition lands all the same.
        """
        self._killed = True
        if zombie_after_s is None:
            return
        for producer in self._producers:
            for (topic, partition), records in producer.buffered().items():
                self._log.append_later(zombie_after_s, topic, partition, self._log.part_of(records))

    def _can_read(self) -> bool:
        return self.can_read and not self._killed and not self._log.away

    def _can_send(self) -> bool:
        return self.can_send and not self._killed and not self._log.away

    def _note_failure(self, topic: str, partition: int) -> None:  # noqa: ARG002 - counted over all partitions
        self.num_failed_appends += 1

    async def _append(self, topic: str, partition: int, records: Sequence[Unsent]) -> int:
        fate = self._log.fate(Append(self._client_id, topic, partition, len(records)))
        await asyncio.sleep(fate.delay_s)
        if not self._can_send() or not fate.lands:
            raise AppendFailed(f"{topic}/{partition}: the log is away")
        first_offset = self._log.append(topic, partition, records)
        if fate.late_copy_s is not None:
            self._log.append_later(fate.late_copy_s, topic, partition, records)
        if not fate.acked:
            raise AppendFailed(f"{topic}/{partition}: no answer")
        return first_offset


class MemoryReader:
    """Reads the partitions of one topic; see `Reader`."""

    def __init__(self, log: MemoryLog, can_read: Callable[[], bool], topic: str, group: str) -> None:
        self._log = log
        self._can_read = can_read
        self._topic = topic
        self._group = group
        self._positions: dict[int, int] = {}
        self._assigned = asyncio.Event()

    async def assign(self, starts: Mapping[int, int | Start]) -> None:
        await asyncio.sleep(0)
        while not self._can_read():  # noqa: ASYNC110 - the switches are plain attributes; nothing tells of their change
            await asyncio.sleep(RECONNECT_BACKOFF_S)
        self._positions = {
            partition: self._positions.get(partition, self._first(partition, start))
            for partition, start in starts.items()
        }
        self._assigned.set()

    async def read(self, timeout_s: float) -> Sequence[Record]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            await asyncio.sleep(0)
            records = self._take()
            left_s = deadline - loop.time()
            if records or left_s <= 0:
                return records
            await self._wait(left_s)

    async def committed(self, partition: int) -> Committed | None:
        await self._call()
        return self._log.committed(self._group, self._topic, partition)

    async def commit(self, commits: Mapping[int, Committed]) -> None:
        unassigned = commits.keys() - self._positions.keys()
        if unassigned:
            raise ValueError(f"partitions {sorted(unassigned)} of {self._topic} are not assigned")
        await self._call()
        for partition, committed in commits.items():
            self._log.commit(self._group, self._topic, partition, committed)

    async def end_offset(self, partition: int) -> int:
        await self._call()
        return self._log.end_offset(self._topic, partition)

    async def beginning_offset(self, partition: int) -> int:
        await self._call()
        return self._log.beginning_offset(self._topic, partition)

    async def offset_since(self, partition: int, unix_s: float) -> int:
        await self._call()
        return self._log.offset_since(self._topic, partition, unix_s)

    def _first(self, partition: int, start: int | Start) -> int:
        beginning = self._log.beginning_offset(self._topic, partition)
        end = self._log.end_offset(self._topic, partition)
        if start is Start.END:
            return end
        if start is Start.BEGINNING or not beginning <= start <= end:
            return beginning
        return start

    def _take(self) -> list[Record]:
        if not self._can_read():
            return []
        taken: list[Record] = []
        news = [p for p, position in self._positions.items() if self._log.has_records(self._topic, p, position)]
        for partition in self._log.shuffled(news):
            records = self._log.records(self._topic, partition, self._positions[partition])
            taken += records
            self._positions[partition] = records[-1].offset + 1
        return taken

    async def _wait(self, timeout_s: float) -> None:
        if not self._positions:
            self._assigned.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._assigned.wait()
            except TimeoutError:
                return
        elif not self._can_read():
            await asyncio.sleep(min(timeout_s, RECONNECT_BACKOFF_S))
        else:
            await self._log.wait(self._topic, list(self._positions), timeout_s)

    async def _call(self) -> None:
        """One round trip; raises BusUnavailable if there is no answer in time."""
        deadline = asyncio.get_running_loop().time() + CALL_TIMEOUT_S
        await asyncio.sleep(0)
        while not self._can_read():
            if asyncio.get_running_loop().time() >= deadline:
                raise BusUnavailable(f"{self._topic}: the log is away")
            await asyncio.sleep(RECONNECT_BACKOFF_S)
