"""Appending to Kafka: what the producer of `shared.bus.kafka` does with the batches that `sending` makes."""
# pyright: reportMissingTypeStubs=false

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError, for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from shared.bus.kafka_client import CONNECT_TIMEOUT_S, BusCounters, closed, leader_of, started_client
from shared.bus.sending import MAX_BATCH_BYTES, AppendFailed, Unsent
from shared.observe.log import Logger
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess

PRODUCE_TIMEOUT_MS = 5_000
"""An append that takes longer is made again: its broker may stand still, and another may lead by now (2-10 s)."""

ALL_REPLICAS = -1
"""An append is acknowledged when all replicas in sync have it."""

GIVEN_UP = "the connection was given up"


class KafkaAppender:
    """Appends over one connection, which is thrown away when an append fails and its outcome is not known.

    No idempotence: after a batch that was lost it either leaves a silent hole or fails for ever, and the readers bear
    second copies anyway. The old connection is closed before the new one sends, so that what it still held cannot come
    late from this side; what the broker has already taken in still can.

    A partition that is refused by its broker, or whose broker is not there, concerns nobody else: the connection stays
    while some broker tells who leads what.
    """

    def __init__(
        self, address: str, client_id: str, log: Logger, counters: BusCounters, access: KafkaAccess = PLAIN_KAFKA
    ) -> None:
        self._address = address
        self._access = access
        self._client_id = client_id
        self._log = log
        self._counters = counters
        self._connection: _Connection | None = None
        self._lock = asyncio.Lock()

    async def append(self, topic: str, partition: int, records: Sequence[Unsent]) -> int:
        """See `sending.Append`."""
        connection = await self._connect()
        try:
            return await connection.append(TopicPartition(topic, partition), records)
        except Exception as error:
            # Whatever it was (aiokafka also fails by assertion), the records stay in the buffer and go out again.
            self._log.warning("append failed", topic=topic, partition=partition, error=repr(error))
            if not (isinstance(error, (_Refused, NodeNotReadyError)) and await connection.asked_again()):
                await self._give_up(connection)
            raise AppendFailed(f"{topic}/{partition}: {error!r}") from error

    def note_failure(self, topic: str, partition: int) -> None:  # noqa: ARG002 - the failure is logged where it arises
        self._counters.num_failed_appends += 1

    async def close(self) -> None:
        async with self._lock:
            if self._connection is not None:
                await self._connection.close(self._log)
                self._connection = None

    async def _connect(self) -> "_Connection":
        async with self._lock:
            if self._connection is None:
                self._connection = _Connection(await self._started_client())
            return self._connection

    async def _started_client(self) -> Any:
        try:
            return await started_client(
                self._address,
                self._client_id,
                request_timeout_ms=PRODUCE_TIMEOUT_MS,
                log=self._log,
                access=self._access,
            )
        except Exception as error:  # whatever it is: who sends would end and nobody would hear of it
            raise AppendFailed(f"no connection: {error!r}") from error

    async def _give_up(self, failed: "_Connection") -> None:
        async with self._lock:
            if self._connection is failed:
                self._counters.num_producers_replaced += 1
                await failed.close(self._log)
                self._connection = None


class _Refused(Exception):
    """The broker's answer to one partition's batch; nothing of the batch is on its way any more."""


@dataclass(frozen=True, slots=True)
class _Due:
    """One partition's batch that is to be sent; `outcome` gets the offset of its first record."""

    place: TopicPartition
    batch: bytes
    outcome: asyncio.Future[int]


class _Connection:
    """A client, and produce requests of our own over it: what comes in one turn of the loop shares a request.

    aiokafka's producer would do that too, but it also buffers, retries and gives up by itself, all of which is settled
    in `sending`, and hands a batch from task to task on its way: a millisecond of a worker's thread at each step.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self._due: dict[int, list[_Due]] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._given_up = False

    async def append(self, place: TopicPartition, records: Sequence[Unsent]) -> int:
        """The offset of the first record. Raises what aiokafka raises."""
        leader = await leader_of(self.client, place)
        if self._given_up:  # while the leader was looked for: a send would open what nobody closes any more
            raise KafkaConnectionError(GIVEN_UP)
        outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        due = self._due.setdefault(leader, [])
        due.append(_Due(place, _batch(records), outcome))
        if len(due) == 1:
            # The task starts behind all that is ready in this turn and may have batches for the same broker.
            request = asyncio.create_task(self._send(leader))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
        return await outcome

    async def asked_again(self) -> bool:
        """Ask who leads what; False if no broker says."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return bool(await self.client.force_metadata_update())
        except TimeoutError:
            return False

    async def close(self, log: Logger) -> None:
        """Fail what is on its way, then close the client: a request that went on could open a connection behind it."""
        self._given_up = True
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        for due in self._due.values():  # of requests that were cancelled before they began
            _fail(due, KafkaConnectionError(GIVEN_UP))
        self._due.clear()
        await closed(self.client.close(), log)

    async def _send(self, leader: int) -> None:
        due = {(each.place.topic, each.place.partition): each for each in self._due.pop(leader)}
        error: Exception = KafkaConnectionError(GIVEN_UP)
        try:
            response: Any = await self.client.send(leader, _produce_request(due.values()))
            for topic, partitions in response.topics:
                for partition, error_code, first_offset, *_ in partitions:
                    _settle(due.pop((topic, partition)).outcome, error_code, first_offset)
        except Exception as raised:  # noqa: BLE001 - whoever waits for an outcome gets it
            error = raised
        finally:
            _fail(due.values(), error)


def _produce_request(due: Iterable[_Due]) -> ProduceRequest:
    by_topic: dict[str, list[tuple[int, bytes]]] = {}
    for each in due:
        by_topic.setdefault(each.place.topic, []).append((each.place.partition, each.batch))
    return ProduceRequest(
        required_acks=ALL_REPLICAS, timeout=PRODUCE_TIMEOUT_MS, topics=list(by_topic.items()), transactional_id=None
    )


def _fail(due: Iterable[_Due], error: Exception) -> None:
    for each in due:
        if not each.outcome.done():
            each.outcome.set_exception(error)


def _settle(outcome: asyncio.Future[int], error_code: int, first_offset: int) -> None:
    if outcome.done():
        return
    if error_code:
        outcome.set_exception(_Refused(repr(for_code(error_code)())))
    else:
        outcome.set_result(first_offset)


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
