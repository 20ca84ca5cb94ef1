"""The log on Kafka, by aiokafka.

What the client does not promise is settled here: order through failures (`sending`), consumers that look alive and
fetch nothing (`KafkaReader`), calls that never return while brokers are away (every one has a deadline).
"""
# pyright: reportMissingTypeStubs=false

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, OffsetAndMetadata, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from shared.bus.port import BusUnavailable, Committed, Producer, Reader, Record, Start
from shared.bus.sending import MAX_BATCH_BYTES, AppendFailed, SendingProducer, Unsent
from shared.observe.log import Logger, logger
from shared.wire.topics import MAX_RECORD_BYTES

PRODUCE_TIMEOUT_MS = 10_000
"""An append that takes longer has failed; a change of leader takes 2-10 s."""

ALL_REPLICAS = -1
"""An append is acknowledged when all replicas in sync have it."""

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 10.0
RECONNECT_BACKOFF_S = 0.2
RETRY_BACKOFF_MS = 50

FETCH_MAX_WAIT_MS = 500
"""The broker's long poll. Records end it at once; only a partition that joins a running poll waits for its end."""

STALL_S = 10.0
"""A partition that shows no sign of life for so long, while it is polled, gets a new consumer."""

WATCH_INTERVAL_S = 1.0

T = TypeVar("T")


@dataclass(slots=True)
class BusCounters:
    """What went wrong with the log and was mended, since the start of the process."""

    num_failed_appends: int = 0
    num_producers_replaced: int = 0
    num_consumers_replaced: int = 0


class KafkaBus:
    """A connection to Kafka; each producer and reader has sockets of its own.

    `address` is "host:port", or several with commas between.
    """

    def __init__(self, address: str, *, client_id: str) -> None:
        self.counters = BusCounters()
        self.open_producers: set[SendingProducer] = set()
        self.open_readers: set[KafkaReader] = set()
        self._address = address
        self._client_id = client_id
        self._log = logger("bus", client_id=client_id)

    @asynccontextmanager
    async def producer(self) -> AsyncGenerator[Producer]:
        connection = KafkaAppender(self._address, self._client_id, self._log, self.counters)
        producer = SendingProducer(connection.append, connection.note_failure)
        self.open_producers.add(producer)
        try:
            yield producer
        finally:
            self.open_producers.discard(producer)
            num_left = await producer.flush(FLUSH_TIMEOUT_S)
            if num_left:
                self._log.error("records given up at close", num_records=num_left)
            await producer.close()
            await connection.close()

    @asynccontextmanager
    async def reader(self, topic: str, *, group: str) -> AsyncGenerator[Reader]:
        reader = KafkaReader(self._address, self._client_id, topic, group, self._log, self.counters)
        keeper = asyncio.create_task(reader.keep_connected(), name=f"read {topic}")
        self.open_readers.add(reader)
        try:
            yield reader
        finally:
            self.open_readers.discard(reader)
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await reader.close()

    async def reachable(self) -> bool:
        client: Any = AIOKafkaClient(bootstrap_servers=self._address, client_id=self._client_id)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await client.bootstrap()
                return bool(client.cluster.brokers())
        except (KafkaError, OSError, TimeoutError):
            return False
        finally:
            await _closed(client.close(), self._log)


class KafkaAppender:
    """Appends each batch by a produce request of its own, over one client that is thrown away whenever one fails.

    aiokafka's producer would buffer, retry and give up by itself, which is all settled in `sending`, and would hand a
    batch from task to task on its way: a millisecond of a worker's thread for each step of its engine.

    No idempotence: after a batch that was lost it either leaves a silent hole or fails for ever, and the readers bear
    second copies anyway. The old client is closed before the new one sends, so that what it still held cannot come
    late from this side; what the broker has already taken in still can.
    """

    def __init__(self, address: str, client_id: str, log: Logger, counters: BusCounters) -> None:
        self._address = address
        self._client_id = client_id
        self._log = log
        self._counters = counters
        self._client: Any = None
        self._lock = asyncio.Lock()

    async def append(self, topic: str, partition: int, records: Sequence[Unsent]) -> int:
        """See `sending.Append`."""
        client = self._client or await self._connect()
        try:
            return await _append_batch(client, TopicPartition(topic, partition), records)
        except Exception as error:
            # Whatever it was (aiokafka also fails by assertion), the records stay in the buffer and go out again.
            self._log.warning("append failed", topic=topic, partition=partition, error=repr(error))
            await self._give_up(client)
            raise AppendFailed(f"{topic}/{partition}: {error!r}") from error

    def note_failure(self, topic: str, partition: int) -> None:  # noqa: ARG002 - the failure is logged where it arises
        self._counters.num_failed_appends += 1

    async def close(self) -> None:
        async with self._lock:
            if self._client is not None:
                await _closed(self._client.close(), self._log)
                self._client = None

    async def _connect(self) -> Any:
        async with self._lock:
            if self._client is None:
                self._client = await self._started()
            return self._client

    async def _started(self) -> Any:
        client: Any = AIOKafkaClient(
            bootstrap_servers=self._address,
            client_id=self._client_id,
            request_timeout_ms=PRODUCE_TIMEOUT_MS,
            retry_backoff_ms=RETRY_BACKOFF_MS,
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.bootstrap()
        except BaseException as error:
            await _closed(client.close(), self._log)
            if isinstance(error, Exception):  # whatever it is: who sends would end and nobody would hear of it
                raise AppendFailed(f"no connection: {error!r}") from error
            raise
        return client

    async def _give_up(self, failed: Any) -> None:
        async with self._lock:
            if self._client is failed:
                self._client = None
                self._counters.num_producers_replaced += 1
                await _closed(failed.close(), self._log)


async def _append_batch(client: Any, place: TopicPartition, records: Sequence[Unsent]) -> int:
    request = ProduceRequest(
        required_acks=ALL_REPLICAS,
        timeout=PRODUCE_TIMEOUT_MS,
        topics=[(place.topic, [(place.partition, _batch(records))])],
        transactional_id=None,
    )
    response: Any = await client.send(await _leader_of(client, place), request)
    ((_, ((_, error_code, first_offset, *_),)),) = response.topics
    if error_code:
        raise for_code(error_code)
    return first_offset


def _batch(records: Sequence[Unsent]) -> bytes:
    builder: Any = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=0,
        batch_size=2 * MAX_BATCH_BYTES,
    )
    for number, record in enumerate(records):
        added = builder.append(number, None, key=record.key, value=record.value, headers=list(record.headers))
        assert added is not None, "the buffer's batches fit"
    return bytes(builder.build())


async def _leader_of(client: Any, place: TopicPartition) -> int:
    """The broker that takes appends to the partition; asked for until it is known."""
    leader: int | None = client.cluster.leader_for_partition(place)
    if leader is None or leader < 0:
        client.add_topic(place.topic)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while (leader := client.cluster.leader_for_partition(place)) is None or leader < 0:
                await client.force_metadata_update()
    return leader


async def _stop_consumer(consumer: Any, log: Logger) -> None:
    await _closed(consumer.stop(), log)
    # stop() gets here by itself only if nothing before it hung.
    await _closed(consumer._client.close(), log)  # noqa: SLF001


async def _closed(closing: Coroutine[Any, Any, None], log: Logger) -> None:
    """Wait for the end of something that may be broken already, in bounds.

    In a task of its own, because aiokafka's stop() can end in the CancelledError of one of its inner tasks, which must
    not pass for ours.
    """
    task = asyncio.create_task(closing)
    done, _ = await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    error = task.exception() if task.done() and not task.cancelled() else None
    if error is not None or not done:
        log.warning("not closed cleanly", what=repr(closing), in_time=bool(done), error=repr(error))


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
            request_timeout_ms=PRODUCE_TIMEOUT_MS,
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
