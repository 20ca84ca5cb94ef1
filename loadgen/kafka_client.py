"""Sends jobs straight onto the topic `ingest` and takes answers from `results`."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from loadgen.client import Clock, ExchangeFailed, Observation, error_label
from loadgen.jobs import Job
from shared.errors import StartupError
from shared.request import Event
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess
from shared.wire.to_ingest import HEADER_DEADLINE
from shared.wire.topics import INGEST, RESULTS

STATUS_COMPLETED = "completed"
STOP_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0


class JobProducer(Protocol):
    """The part of a Kafka producer that is used here."""

    async def send_and_wait(
        self, topic: str, value: bytes, key: bytes, *, headers: Sequence[tuple[str, bytes]]
    ) -> object:
        """Returns when the broker has the record."""
        ...


@dataclass(slots=True)
class _Awaited:
    """A request whose result is watched for.

    Attributes:
        sent_unix_s, sent_s: one moment by both clocks; ties the server's stamps to ours.
        digest: of the first result that came.
    """

    seen: Observation
    result: asyncio.Future[None]
    sent_unix_s: float
    sent_s: float
    digest: bytes | None = None


class KafkaTransport:
    """Jobs out, results in. The first and last token's times are the server's own stamps.

    `take` is called for each record of `results`, by whoever reads them.
    """

    def __init__(self, producer: JobProducer, headers: Mapping[str, str], clock: Clock) -> None:
        self._producer = producer
        self._headers = [(name, value.encode()) for name, value in headers.items()]
        self._clock = clock
        self._awaited: dict[str, _Awaited] = {}
        self._broken: str | None = None
        self.repeated_results = 0
        """Results that came again, byte for byte; after a takeover they may."""

    async def exchange(self, job: Job, seen: Observation) -> None:
        if self._broken is not None:
            raise ExchangeFailed("consumer", self._broken)
        result = asyncio.get_running_loop().create_future()
        seen.sent_s = self._clock.monotonic()
        sent_unix_s = self._clock.unix()
        self._awaited[job.request_id] = _Awaited(seen, result, sent_unix_s, seen.sent_s)
        deadline = str(round((sent_unix_s + job.timeout_s) * 1000)).encode()
        try:
            await self._producer.send_and_wait(
                INGEST.name, job.body, job.request_id.encode(), headers=[*self._headers, (HEADER_DEADLINE, deadline)]
            )
            await result
        except KafkaError as error:
            raise ExchangeFailed("produce", f"{type(error).__name__}: {error}") from error
        finally:
            result.cancel()

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """One record of `results`; those of other runs are left alone."""
        request_id = (key or b"").decode("utf-8", "replace")
        awaited = self._awaited.get(request_id)
        if awaited is None or value is None:
            return
        digest = sha256(value).digest()
        if awaited.digest is not None:
            if awaited.digest == digest:
                self.repeated_results += 1
            else:
                awaited.seen.duplicated = True
            return
        awaited.digest = digest
        now_s = self._clock.monotonic()
        try:
            _read_result(value, awaited, now_s)
        except ExchangeFailed as failure:
            _fail(awaited.result, failure)
            return
        if not awaited.result.done():
            awaited.result.set_result(None)

    def lost_results(self, reason: str) -> None:
        """No further result can come: fails what is waited for and all that is still sent."""
        self._broken = reason
        for awaited in self._awaited.values():
            _fail(awaited.result, ExchangeFailed("consumer", reason))


@asynccontextmanager
async def open_kafka(
    bootstrap_servers: str, headers: Mapping[str, str], clock: Clock, access: KafkaAccess = PLAIN_KAFKA
) -> AsyncIterator[KafkaTransport]:
    """A transport whose consumer stands at the end of every partition of `results` before anything is sent.

    Raises StartupError if the broker or the topics are not there.
    """
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True, **access.client_options()
    )
    # No group: partitions are assigned by hand, so no rebalance can hold a result back. The wait is short because a
    # fetch that is under way delays those of other partitions of the same broker.
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="latest",
        fetch_max_wait_ms=50,
        **access.client_options(),
    )
    try:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await producer.start()
                await consumer.start()
                await _go_to_end_of_results(consumer)
        except (KafkaError, TimeoutError) as error:
            raise StartupError(f"Kafka at {bootstrap_servers}: {type(error).__name__}: {error}") from error
        transport = KafkaTransport(producer, headers, clock)
        reading = asyncio.create_task(_read_results(consumer, transport))
        try:
            yield transport
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    finally:
        # Both stop() calls wait for ever on a broker that is gone.
        await asyncio.gather(
            asyncio.wait_for(producer.stop(), STOP_TIMEOUT_S),
            asyncio.wait_for(consumer.stop(), STOP_TIMEOUT_S),
            return_exceptions=True,
        )


async def _go_to_end_of_results(consumer: AIOKafkaConsumer) -> None:
    missing = {INGEST.name, RESULTS.name} - await consumer.topics()
    if missing:
        raise StartupError(f"the broker has no topic {' nor '.join(sorted(missing))}; create Baton's topics first")
    assigned = [TopicPartition(RESULTS.name, number) for number in range(RESULTS.num_partitions)]
    consumer.assign(assigned)
    await consumer.seek_to_end(*assigned)
    for partition in assigned:
        await consumer.position(partition)


async def _read_results(consumer: AIOKafkaConsumer, transport: KafkaTransport) -> None:
    try:
        while True:
            batches: Mapping[TopicPartition, Iterable[Any]] = await consumer.getmany(timeout_ms=1000)
            for records in batches.values():
                for record in records:
                    transport.take(record.key, record.value)
    except Exception as error:  # noqa: BLE001 - whatever ends the reading ends the waiting, with its reason
        transport.lost_results(f"{type(error).__name__}: {error}")


def _read_result(value: bytes, awaited: _Awaited, now_s: float) -> None:
    try:
        message = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise ExchangeFailed("malformed", f"no JSON in a result: {error}") from error
    if not isinstance(message, dict):
        raise ExchangeFailed("malformed", "a result is no JSON object")
    seen = awaited.seen
    seen.answered_s = now_s
    seen.heard_stamps(message.get("timings"))
    response = message.get("response")
    if isinstance(response, dict):
        if isinstance(response.get("usage"), dict):
            seen.heard_usage(response["usage"])
        seen.finish_reason = _finish_reason(response)
    if isinstance(message.get("error"), dict):
        raise ExchangeFailed(error_label(message["error"]), str(message["error"].get("message", "")))
    if message.get("status") != STATUS_COMPLETED:
        raise ExchangeFailed(f"status_{message.get('status')}", "the result is no whole answer")
    seen.first_token_s = _by_our_clock(awaited, Event.FIRST_TOKEN)
    seen.last_token_s = _by_our_clock(awaited, Event.FINISHED)


def _finish_reason(response: Mapping[str, Any]) -> str | None:
    choices = response.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason"):
            return str(choice["finish_reason"])
    return None


def _by_our_clock(awaited: _Awaited, event: Event) -> float | None:
    at_unix_s = awaited.seen.stamps.get(event)
    return None if at_unix_s is None else awaited.sent_s + (at_unix_s - awaited.sent_unix_s)


def _fail(result: asyncio.Future[None], failure: ExchangeFailed) -> None:
    if not result.done():
        result.set_exception(failure)
