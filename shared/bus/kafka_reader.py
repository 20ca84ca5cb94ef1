"""Reading of the log on Kafka by fetch requests of its own.

aiokafka's consumer would keep a subscription, positions and a prefetch of its own, with four tasks between the socket
and the caller, and some of its failures look like an idle log. Here every request has a deadline, and a client with
which anything went wrong is replaced.
"""
# pyright: reportMissingTypeStubs=false

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.errors import CorruptRecordException, KafkaError, OffsetOutOfRangeError, for_code
from aiokafka.protocol.api import Request
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.fetch import FetchRequest_v11
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.record.memory_records import MemoryRecords

from shared.bus.kafka_batch import num_batch_bytes, records_of
from shared.bus.kafka_client import (
    CALL_TIMEOUT_S,
    RETRY_BACKOFF_MS,
    BusCounters,
    closed,
    leader_of,
    started_client,
)
from shared.bus.port import BusUnavailable, Committed, Record, Start
from shared.observe.log import Logger
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess
from shared.wire.topics import MAX_RECORD_BYTES

FETCH_MAX_WAIT_MS = 500
"""The broker's long poll. Records end it at once; only a partition that joins a running poll waits for its end."""

REQUEST_TIMEOUT_MS = FETCH_MAX_WAIT_MS + 3_500
"""A connection that answers nothing for so long is broken. Less than CALL_TIMEOUT_S, so that the next call has a new
one."""

STANDSTILL_S = 2 * REQUEST_TIMEOUT_MS / 1000
"""Nobody who fetches waits for so long."""

MAX_ANSWER_BYTES = 4 * MAX_RECORD_BYTES
"""What one fetch brings at most."""

MAX_AHEAD_BYTES = 1024 * 1024
"""Nothing more is fetched while more than this waits for `read`."""

RECONNECT_BACKOFF_S = 0.2

LOOK_INTERVAL_S = 1.0
"""How often a reader is looked at that should make progress."""

READ_UNCOMMITTED = 0
ANY_REPLICA = -1
NO_LEADER_EPOCH = -1
NO_LOG_START = -1
NO_GENERATION = -1
"""Commits of a group without members."""
DEFAULT_RETENTION = -1
TIMESTAMPS = {Start.BEGINNING: -2, Start.END: -1}
"""By which ListOffsets knows the ends of a partition."""
NO_SUCH_RECORD = -1
"""Its answer where no record is as late as was asked."""

T = TypeVar("T")


class StandsStill(Exception):
    """Fetches that should be under way get no answers, and do not fail either."""


class KafkaReader:
    """Reads by manual assignment over one client, which is replaced whenever a fetch fails.

    For each broker that leads assigned partitions there is one fetch under way; the next one leaves as soon as an
    answer is there, so that the broker holds a poll while the caller works. A position is where the next fetch begins;
    it moves when an answer is taken in, so a fetch that failed or was given up is simply made again.
    """

    def __init__(
        self,
        address: str,
        client_id: str,
        topic: str,
        group: str,
        log: Logger,
        counters: BusCounters,
        access: KafkaAccess = PLAIN_KAFKA,
    ) -> None:
        self._address = address
        self._access = access
        self._client_id = client_id
        self.topic = topic
        self._group = group
        self._log = log
        self._counters = counters
        self._positions: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._heard_s: dict[int, float] = {}
        self._assigned = asyncio.Event()
        self._records: list[Record] = []
        self._arrived = asyncio.Event()
        self._num_ahead_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._client: Any = None
        self._connected = asyncio.Event()
        self._coordinator: int | None = None

    async def assign(self, starts: Mapping[int, int | Start]) -> None:
        fresh = {partition: start for partition, start in starts.items() if partition not in self._positions}
        settled = await self._settle(fresh)
        if not settled and starts.keys() == self._positions.keys():
            return
        self._positions = {partition: (self._positions | settled)[partition] for partition in starts}
        self._ends = {partition: end for partition, end in self._ends.items() if partition in starts}
        now_s = asyncio.get_running_loop().time()
        self._heard_s = {partition: self._heard_s.get(partition, now_s) for partition in starts}
        self._records = [record for record in self._records if record.partition in starts]
        self._tell_of_records()
        self._assigned.set()

    async def read(self, timeout_s: float) -> Sequence[Record]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._records:
            if not await _happened(self._arrived, deadline - loop.time()):
                return ()
        records, self._records = self._records, []
        self._tell_of_records()
        return records

    async def committed(self, partition: int) -> Committed | None:
        request = OffsetFetchRequest(self._group, [(self.topic, [partition])])

        async def ask(client: Any) -> Committed | None:
            response = await self._ask_coordinator(client, request)
            _check(response.error_code)
            ((_, offset, note, error_code),) = _of_partitions(response)
            _check(error_code)
            return None if offset < 0 else Committed(offset, note)

        return await self._call(ask)

    async def commit(self, commits: Mapping[int, Committed]) -> None:
        unassigned = commits.keys() - self._positions.keys()
        if unassigned:
            raise ValueError(f"partitions {sorted(unassigned)} of {self.topic} are not assigned")
        if not commits:
            return
        offsets = [(partition, commit.offset, commit.note) for partition, commit in commits.items()]
        request = OffsetCommitRequest(self._group, NO_GENERATION, "", DEFAULT_RETENTION, [(self.topic, offsets)])

        async def ask(client: Any) -> None:
            for _, error_code in _of_partitions(await self._ask_coordinator(client, request)):
                _check(error_code)

        await self._call(ask)

    async def end_offset(self, partition: int) -> int:
        return (await self._offsets([partition], Start.END))[partition]

    async def beginning_offset(self, partition: int) -> int:
        return (await self._offsets([partition], Start.BEGINNING))[partition]

    async def offset_since(self, partition: int, unix_s: float) -> int:
        async def ask(client: Any) -> int:
            offset = (await self._list_offsets(client, [partition], int(unix_s * 1000)))[partition]
            if offset == NO_SUCH_RECORD:
                offset = (await self._list_offsets(client, [partition], TIMESTAMPS[Start.END]))[partition]
            return offset

        return await self._call(ask)

    def num_behind(self) -> int:
        """Records that the broker has told of and that were not handed out."""
        not_fetched = sum(max(0, end - self._positions[partition]) for partition, end in self._ends.items())
        return not_fetched + len(self._records)

    def silent_s(self) -> float:
        """See `Bus.silent_s`. A reader that asks for nothing, because nobody takes what it has, waits for no answer."""
        if not self._heard_s or not self._room.is_set():
            return 0.0
        return asyncio.get_running_loop().time() - min(self._heard_s.values())

    async def run(self) -> None:
        """Fetch what is assigned, over one client after another, until cancelled."""
        while True:
            client = await self._started()
            if client is not None:
                await self._use(client)
            await asyncio.sleep(RECONNECT_BACKOFF_S)

    async def _started(self) -> Any:
        try:
            return await started_client(
                self._address,
                self._client_id,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                log=self._log,
                access=self._access,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is: the reader would stay without a client for ever
            self._log.warning("no connection for reading", topic=self.topic, error=repr(error))
            return None

    async def _use(self, client: Any) -> None:
        """Fetch until something fails."""
        self._client = client
        self._connected.set()
        try:
            await self._fetch(client)
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            # Whatever it was (aiokafka also fails by assertion), the positions stand where they stood.
            self._log.warning("consumer replaced", topic=self.topic, reason=repr(error))
            self._counters.num_consumers_replaced += 1
        finally:
            self._connected.clear()
            self._client = self._coordinator = None
            await closed(client.close(), self._log)

    async def _fetch(self, client: Any) -> None:
        """Fetch from every leader at once; after a new assignment all go on together, when their polls have ended.

        Polls are not cut short: the broker would hold the next ones until they are over.
        """
        while True:
            self._assigned.clear()
            partitions_of = await self._leaders(client, list(self._positions))
            async with asyncio.TaskGroup() as fetching:
                for leader, partitions in partitions_of.items():
                    fetching.create_task(self._fetch_from(client, leader, partitions))
                await self._until_assigned()

    async def _until_assigned(self) -> None:
        """Wait for a new assignment. Raises StandsStill if meanwhile some partition gets no answers.

        Every fetch has its deadline; this sees what that does not, such as a task that ended without a word.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while not await _happened(self._assigned, LOOK_INTERVAL_S):
            if min(self.silent_s(), loop.time() - began_s) > STANDSTILL_S:
                raise StandsStill(f"{self.topic}: no answer for {self.silent_s():.1f} s")

    async def _leaders(self, client: Any, partitions: Sequence[int]) -> dict[int, list[int]]:
        partitions_of: dict[int, list[int]] = {}
        for partition in partitions:
            leader = await leader_of(client, TopicPartition(self.topic, partition))
            partitions_of.setdefault(leader, []).append(partition)
        return partitions_of

    async def _fetch_from(self, client: Any, leader: int, partitions: Sequence[int]) -> None:
        """One fetch after another, until there is a new assignment."""
        session = FetchSession(self.topic)
        while True:
            if not self._room.is_set():
                await self._room.wait()
                self._heard(partitions)
            if self._assigned.is_set():
                return
            asked = {partition: self._positions[partition] for partition in partitions}
            response = await client.send(leader, session.request(asked))
            session.answered(response)
            self._heard(partitions)
            for partition, error_code, end, _, _, _, _, batches in _of_partitions(response):
                if self._positions.get(partition) != asked[partition]:
                    continue  # given up, and perhaps taken again elsewhere, while the broker held the poll
                if error_code == OffsetOutOfRangeError.errno:
                    await self._begin_anew(client, partition)
                    continue
                _check(error_code)
                self._take_in(partition, end, batches)

    def _heard(self, partitions: Sequence[int]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._heard_s |= {partition: now_s for partition in partitions if partition in self._heard_s}

    def _take_in(self, partition: int, end: int, batches: bytes | None) -> None:
        self._ends[partition] = end
        if not batches:
            return
        records, self._positions[partition] = unpacked(self.topic, partition, self._positions[partition], batches)
        self._records += records
        self._num_ahead_bytes += len(batches)
        self._tell_of_records()

    def _tell_of_records(self) -> None:
        """Tell `read` whether there are records for it, and the fetches whether there is room for more."""
        if self._records:
            self._arrived.set()
        else:
            self._arrived.clear()
            self._num_ahead_bytes = 0
        if self._num_ahead_bytes > MAX_AHEAD_BYTES:
            self._room.clear()
        else:
            self._room.set()

    async def _begin_anew(self, client: Any, partition: int) -> None:
        asked = self._positions[partition]
        beginning = (await self._list_offsets(client, [partition], TIMESTAMPS[Start.BEGINNING]))[partition]
        self._log.warning(
            "offset is not in the log", topic=self.topic, partition=partition, offset=asked, beginning=beginning
        )
        if self._positions.get(partition) == asked:
            self._positions[partition] = beginning

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
        return settled

    async def _offsets(self, partitions: Sequence[int], symbol: Start) -> dict[int, int]:
        async def ask(client: Any) -> dict[int, int]:
            return await self._list_offsets(client, partitions, TIMESTAMPS[symbol])

        return await self._call(ask)

    async def _list_offsets(self, client: Any, partitions: Sequence[int], timestamp_ms: int) -> dict[int, int]:
        offsets: dict[int, int] = {}
        for leader, led in (await self._leaders(client, partitions)).items():
            asked = (self.topic, [(partition, timestamp_ms) for partition in led])
            response = await _ask(client, leader, OffsetRequest(ANY_REPLICA, READ_UNCOMMITTED, [asked]))
            for partition, error_code, _, offset in _of_partitions(response):
                _check(error_code)
                offsets[partition] = offset
        return offsets

    async def _ask_coordinator(self, client: Any, request: Any) -> Any:
        coordinator = self._coordinator
        if coordinator is None:
            lookup = FindCoordinatorRequest(self._group, CoordinationType.GROUP)
            found = await _ask(client, client.get_random_node(), lookup)
            _check(found.error_code)
            self._coordinator = coordinator = found.coordinator_id
        return await _ask(client, coordinator, request)

    async def _call(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        """What the log answers, asked as often as it takes within CALL_TIMEOUT_S: leaders and coordinators move."""
        failure: Exception | None = None
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while True:
                    while self._client is None:
                        await self._connected.wait()
                    try:
                        return await self._asked(self._client, ask)
                    except KafkaError as error:
                        if not error.retriable:
                            raise
                        failure = error
                    self._coordinator = None
                    await asyncio.sleep(RETRY_BACKOFF_MS / 1000)
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(f"{self.topic}: {failure or error!r}") from error

    async def _asked(self, client: Any, ask: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await ask(client)
        finally:
            if client is not self._client:  # given up meanwhile: what this call has opened since is still open
                await closed(client.close(), self._log)


class FetchSession:
    """What a broker remembers of the fetches over one connection (KIP-227).

    A request names only the partitions whose position moved, an answer only those with news. A broker that has no room
    for the session answers with session 0, and the next request names everything again.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._id = 0
        self._epoch = 0
        self._sent: dict[int, int] = {}

    def request(self, positions: dict[int, int]) -> "SessionFetch":
        """The next fetch, from these positions on."""
        moved = [(p, position) for p, position in positions.items() if not self._epoch or self._sent.get(p) != position]
        self._sent = positions
        return SessionFetch(self._id, self._epoch, self._topic, moved)

    def answered(self, response: Any) -> None:
        """Note the answer; raises a KafkaError if the broker does not know the session any more."""
        _check(response.error_code)
        self._id = response.session_id
        self._epoch = self._epoch + 1 if self._id else 0


class SessionFetch(Request[FetchRequest_v11]):
    """aiokafka's own FetchRequest knows no sessions. Brokers have this version since Kafka 2.3."""

    API_KEY = FetchRequest_v11.API_KEY

    def __init__(self, session_id: int, epoch: int, topic: str, positions: Sequence[tuple[int, int]]) -> None:
        self._session = (session_id, epoch)
        self._topic = topic
        self._positions = positions

    def build(self, request_struct_class: type[FetchRequest_v11]) -> FetchRequest_v11:
        """The request as it goes out."""
        partitions = [
            (partition, NO_LEADER_EPOCH, position, NO_LOG_START, MAX_RECORD_BYTES)
            for partition, position in self._positions
        ]
        topics = [(self._topic, partitions)] if partitions else []
        min_bytes, forgotten, rack = 1, (), ""
        limits = (FETCH_MAX_WAIT_MS, min_bytes, MAX_ANSWER_BYTES, READ_UNCOMMITTED)
        return request_struct_class(ANY_REPLICA, *limits, *self._session, topics, forgotten, rack)


def unpacked(topic: str, partition: int, position: int, batches: bytes) -> tuple[list[Record], int]:
    """The records at `position` and behind it, and the position behind all of them.

    The first batch may begin before `position`; a batch that was cut off at the end is left for the next fetch.

    Raises:
        CorruptRecordException: a checksum does not fit.
    """
    records: list[Record] = []
    memory: Any = MemoryRecords(batches)
    start = 0
    while memory.has_next():
        batch = memory.next_batch()
        if not batch.validate_crc():
            raise CorruptRecordException(f"{topic}/{partition}: wrong checksum at or behind offset {position}")
        end = start + num_batch_bytes(batches, start)
        if not batch.is_control_batch:
            records += [
                _record(topic, partition, found)
                for found in _found_in(batch, batches[start:end])
                if found.offset >= position
            ]
        position, start = max(position, batch.next_offset), end
    return records, position


def _found_in(batch: Any, raw: bytes) -> Sequence[Any]:
    try:
        return list(batch)
    except UnicodeDecodeError:  # a header's name, which aiokafka takes for UTF-8: nothing behind it would ever be read
        return records_of(raw)


def _record(topic: str, partition: int, found: Any) -> Record:
    return Record(
        topic=topic,
        partition=partition,
        offset=found.offset,
        key=found.key,
        value=found.value if found.value is not None else b"",
        headers=tuple(found.headers),
        timestamp_s=found.timestamp / 1000,
    )


async def _ask(client: Any, node: int, request: Any) -> Any:
    # A broker answers what comes over one connection in order: behind a fetch every call would wait for the long poll.
    return await client.send(node, request, group=ConnectionGroup.COORDINATION)


def _of_partitions(response: Any) -> Sequence[Any]:
    """What an answer about one topic says of each partition."""
    return response.topics[0][1] if response.topics else ()


def _check(error_code: int) -> None:
    if error_code:
        raise for_code(error_code)


async def _happened(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False
