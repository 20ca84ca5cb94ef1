"""Reading of the log on Kafka, by aiokafka's consumer: some look alive and fetch nothing, calls may never return."""
# pyright: reportMissingTypeStubs=false

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, OffsetAndMetadata, TopicPartition
from aiokafka.errors import KafkaError

from shared.bus.kafka_client import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, RETRY_BACKOFF_MS, BusCounters, closed
from shared.bus.port import BusUnavailable, Committed, Record, Start
from shared.observe.log import Logger
from shared.wire.topics import MAX_RECORD_BYTES

REQUEST_TIMEOUT_MS = 10_000
RECONNECT_BACKOFF_S = 0.2

FETCH_MAX_WAIT_MS = 500
"""The broker's long poll. Records end it at once; only a partition that joins a running poll waits for its end."""

STALL_S = 10.0
"""A partition that shows no sign of life for so long, while it is polled, gets a new consumer."""

WATCH_INTERVAL_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sign:
    """What is seen of one partition.

    Attributes:
        position: next offset to be handed out.
        answered_ms: when the broker last answered a fetch of it.
        behind: the broker has told of records that were not handed out.
    """

    position: int
    answered_ms: int | None
    behind: bool


class StallWatch:
    """Finds partitions that are polled and do not move.

    Only time spent polling counts: a caller may stop reading for as long as it likes.
    """

    def __init__(self) -> None:
        self._polled_s = 0.0
        self._signs: dict[int, Sign] = {}
        self._silent_s: dict[int, float] = {}

    def is_due(self, polled_s: float) -> bool:
        """Add a poll; whether it is time to `look` again."""
        self._polled_s += polled_s
        return self._polled_s >= WATCH_INTERVAL_S

    def look(self, signs: Mapping[int, Sign]) -> list[int]:
        """The partitions that have shown no sign of life for STALL_S."""
        polled_s, self._polled_s = self._polled_s, 0.0
        for partition, sign in signs.items():
            silent_s = self._silent_s.get(partition, 0.0) + polled_s
            self._silent_s[partition] = 0.0 if _lives(self._signs.get(partition), sign) else silent_s
            self._signs[partition] = sign
        return [partition for partition in signs if self._silent_s[partition] > STALL_S]


def _lives(before: Sign | None, now: Sign) -> bool:
    if before is None or now.position != before.position:
        return True
    return now.answered_ms != before.answered_ms and not now.behind


class KafkaReader:
    """Reads by manual assignment through one AIOKafkaConsumer, which is replaced when it fails or stops moving.

    The positions are kept here and are those of records handed out, so a new consumer, or a new assignment (aiokafka
    forgets all positions with it), goes on behind the last record that the caller has seen. No pause() and resume():
    a resumed partition waits out the running long poll.
    """

    def __init__(
        self, address: str, client_id: str, topic: str, group: str, log: Logger, counters: BusCounters
    ) -> None:
        self._address = address
        self._client_id = client_id
        self.topic = topic
        self._group = group
        self._log = log
        self._counters = counters
        self._positions: dict[int, int] = {}
        self._assignment = 0
        self._assigned = asyncio.Event()
        self._consumer: Any = None
        self._connected = asyncio.Event()
        self._broken = asyncio.Event()
        self._broken.set()
        self._watch = StallWatch()

    async def assign(self, starts: Mapping[int, int | Start]) -> None:
        fresh = {partition: start for partition, start in starts.items() if partition not in self._positions}
        settled = await self._settle(fresh)
        if settled or starts.keys() != self._positions.keys():
            self._positions = {partition: (self._positions | settled)[partition] for partition in starts}
            self._install()

    async def read(self, timeout_s: float) -> Sequence[Record]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            left_s = max(0.0, deadline - loop.time())
            if not self._positions:
                await _happened(self._assigned, left_s)
            elif not self._connected.is_set():
                await _happened(self._connected, left_s)
            elif records := await self._fetched(left_s):
                return records
            if loop.time() >= deadline:
                return ()

    async def committed(self, partition: int) -> Committed | None:
        async def ask(consumer: Any) -> Committed | None:
            place = self._place(partition)
            # AIOKafkaConsumer.committed drops the note.
            found = (await consumer._coordinator.fetch_committed_offsets([place])).get(place)  # noqa: SLF001
            return None if found is None or found.offset < 0 else Committed(found.offset, found.metadata)

        return await self._call(ask)

    async def commit(self, commits: Mapping[int, Committed]) -> None:
        unassigned = commits.keys() - self._positions.keys()
        if unassigned:
            raise ValueError(f"partitions {sorted(unassigned)} of {self.topic} are not assigned")
        offsets = {self._place(p): OffsetAndMetadata(commit.offset, commit.note) for p, commit in commits.items()}

        async def ask(consumer: Any) -> None:
            await consumer.commit(offsets)

        if offsets:
            await self._call(ask)

    async def end_offset(self, partition: int) -> int:
        return (await self._offsets([partition], Start.END))[partition]

    async def beginning_offset(self, partition: int) -> int:
        return (await self._offsets([partition], Start.BEGINNING))[partition]

    def num_behind(self) -> int:
        """Records that the broker has told of and that were not handed out."""
        if not self._connected.is_set():
            return 0
        ends: dict[int, int | None] = {p: self._consumer.highwater(self._place(p)) for p in self._positions}
        return sum(max(0, end - self._positions[p]) for p, end in ends.items() if end is not None)

    async def keep_connected(self) -> None:
        """Start a consumer whenever there is none or it was given up, until cancelled."""
        while True:
            await self._broken.wait()
            await self.close()
            self._consumer = await self._start()
            if self._consumer is None:
                await asyncio.sleep(RECONNECT_BACKOFF_S)
                continue
            self._broken.clear()
            self._install()
            self._connected.set()

    async def close(self) -> None:
        """Stop the consumer, if there is one."""
        if self._consumer is not None:
            await _stop_consumer(self._consumer, self._log)
            self._consumer = None

    async def _start(self) -> Any:
        consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=self._address,
            client_id=self._client_id,
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            retry_backoff_ms=RETRY_BACKOFF_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await consumer.start()
        except BaseException as error:
            await _stop_consumer(consumer, self._log)
            if isinstance(error, Exception):  # as for producers: the reader would stay without a consumer for ever
                self._log.warning("no connection for reading", topic=self.topic, error=repr(error))
                return None
            raise
        return consumer

    def _install(self) -> None:
        """Give the consumer the assignment and the positions; records of an older assignment are void."""
        self._assignment += 1
        self._watch = StallWatch()
        if self._positions:
            self._assigned.set()
        else:
            self._assigned.clear()
        if self._consumer is None:
            return
        if not self._positions:
            self._consumer.unsubscribe()
            return
        self._consumer.assign([self._place(partition) for partition in self._positions])
        self._seek()

    def _seek(self) -> None:
        for partition, offset in self._positions.items():
            self._consumer.seek(self._place(partition), offset)

    async def _fetched(self, timeout_s: float) -> Sequence[Record]:
        consumer, assignment = self._consumer, self._assignment
        started_s = asyncio.get_running_loop().time()
        try:
            fetched: dict[Any, list[Any]] = await consumer.getmany(timeout_ms=timeout_s * 1000)
        except KafkaError as error:
            if assignment == self._assignment:
                self._give_up(repr(error))
            return ()
        if assignment != self._assignment:
            # A poll that waited through an assignment may have taken records of the new one: they must come again.
            if fetched and consumer is self._consumer:
                self._seek()
            return ()
        records = [_record(found) for of_partition in fetched.values() for found in of_partition]
        for record in records:
            self._positions[record.partition] = record.offset + 1
        # A loop that stood still is not the consumer's fault: no poll counts for longer than it was meant to last.
        polled_s = min(asyncio.get_running_loop().time() - started_s, timeout_s)
        if self._watch.is_due(polled_s):
            self._look_for_stall(consumer)
        return records

    def _look_for_stall(self, consumer: Any) -> None:
        signs: dict[int, Sign] = {}
        for partition, position in self._positions.items():
            place = self._place(partition)
            end: int | None = consumer.highwater(place)
            signs[partition] = Sign(position, consumer.last_poll_timestamp(place), end is not None and end > position)
        stalled = self._watch.look(signs)
        if stalled:
            self._give_up(f"partitions {stalled} do not move")

    def _give_up(self, reason: str) -> None:
        self._log.warning("consumer replaced", topic=self.topic, reason=reason)
        self._counters.num_consumers_replaced += 1
        self._connected.clear()
        self._broken.set()

    async def _settle(self, starts: Mapping[int, int | Start]) -> dict[int, int]:
        settled = {partition: start for partition, start in starts.items() if isinstance(start, int)}
        for symbol in Start:
            partitions = [partition for partition, start in starts.items() if start is symbol]
            while partitions:
                try:
                    settled |= await self._offsets(partitions, symbol)
                    break
                except BusUnavailable as error:
                    self._log.warning("waiting for offsets", topic=self.topic, error=str(error))
                    await asyncio.sleep(RECONNECT_BACKOFF_S)
        return settled

    async def _offsets(self, partitions: Sequence[int], symbol: Start) -> dict[int, int]:
        async def ask(consumer: Any) -> dict[int, int]:
            places = [self._place(partition) for partition in partitions]
            query = consumer.end_offsets if symbol is Start.END else consumer.beginning_offsets
            return {place.partition: offset for place, offset in (await query(places)).items()}

        return await self._call(ask)

    async def _call(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._connected.wait()
                return await ask(self._consumer)
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(f"{self.topic}: {error!r}") from error

    def _place(self, partition: int) -> TopicPartition:
        return TopicPartition(self.topic, partition)


def _record(found: Any) -> Record:
    return Record(
        topic=found.topic,
        partition=found.partition,
        offset=found.offset,
        key=found.key,
        value=found.value if found.value is not None else b"",
        headers=found.headers,
        timestamp_s=found.timestamp / 1000,
    )


async def _happened(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False


async def _stop_consumer(consumer: Any, log: Logger) -> None:
    await closed(consumer.stop(), log)
    # stop() gets here by itself only if nothing before it hung.
    await closed(consumer._client.close(), log)  # noqa: SLF001
