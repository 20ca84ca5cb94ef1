"""One running stack as tests see it: its edges over HTTP, its public topics, its workers' metrics and logs."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from infra.local.composition import HAND_OVER_ALWAYS, SERVICES, Composition
from infra.local.ports import PORTS
from infra.local.stack import Stack, local_stack
from shared.request import NUM_REQUEST_PARTITIONS, partition_of
from shared.wire.topics import DEAD_LETTER, INGEST, RESULTS

MODEL = "smollm2"
CHUNK_TOKENS = 128
NUM_PAGES = 64
LIMIT_TOKENS = NUM_PAGES * 64
"""Prompt and answer together; the model's own context is twice as long."""

GRACE_S = 3.0
TIMEOUT_S = 90.0
"""Nothing that a test waits for may take longer; far more than it should, as the machine may be busy."""

POLL_S = 0.1
WORKERS = ("prefill", "decode")

COMPOSITION = {
    "counts": {"ingest": 1, "prefill": 1, "decode": 2, "edge": 2},
    "dtype": "float32",
    "num_pages": NUM_PAGES,
    "kafka_port": None,
    "redis_port": None,
    "max_restarts": 20,
    "env": {
        "BATON_MODEL_NAME": MODEL,
        "BATON_MAX_BATCH_TOKENS": str(CHUNK_TOKENS),
        "BATON_DRAIN_S": "0.3",
        "BATON_GRACE_S": str(GRACE_S),
        **HAND_OVER_ALWAYS,
    },
}


class TopicReader:
    """Everything that came on a public topic since the stack's start, by key."""

    def __init__(self, kafka_address: str, topic: str) -> None:
        # Its event loop stands still while other tests run, for minutes. A fetch that had timed out by then would still
        # be waiting to be tried again when the consumer is stopped, and stopping it would raise.
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=kafka_address, auto_offset_reset="earliest", request_timeout_ms=3_600_000
        )
        self._partitions = [TopicPartition(topic, index) for index in range(NUM_REQUEST_PARTITIONS)]
        self._records: list = []

    async def __aenter__(self):
        await self._consumer.start()
        self._consumer.assign(self._partitions)
        await self._consumer.seek_to_beginning(*self._partitions)
        return self

    async def __aexit__(self, *_) -> None:
        await self._consumer.stop()

    async def wait_for(self, key: str, *, num: int = 1) -> list:
        """The records under `key`, once there are `num` of them."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(found := self.under(key)) < num:
                await self._read(timeout_ms=200)
        return found

    async def read_to_end(self) -> list:
        """All records up to where the topic ends now."""
        async with asyncio.timeout(TIMEOUT_S):
            ends = await self._consumer.end_offsets(self._partitions)
            while any([await self._consumer.position(tp) < end for tp, end in ends.items()]):
                await self._read(timeout_ms=200)
        return self._records

    def under(self, key: str) -> list:
        return [record for record in self._records if record.key == key.encode()]

    async def _read(self, *, timeout_ms: int) -> None:
        for records in (await self._consumer.getmany(timeout_ms=timeout_ms)).values():
            self._records.extend(records)


@dataclass(frozen=True, slots=True)
class Serving:
    """A started stack, a client for its HTTP ports, and both of its public topics."""

    stack: Stack
    http: httpx.AsyncClient
    producer: AIOKafkaProducer
    results: TopicReader
    dead_letters: TopicReader
    model_folder: Path

    def edge(self, index: int = 0) -> str:
        return self.stack.addresses("edge")[index]

    def by_name(self) -> dict[str, object]:
        return {process.name: process for process in self.stack.record().processes}

    async def result_of(self, request_id: str) -> dict:
        """The one result of a request; it fails if there are several."""
        await self.results.wait_for(request_id)
        await self.results.read_to_end()
        (record,) = self.results.under(request_id)
        assert record.partition == partition_of(request_id)
        return json.loads(record.value)

    async def produce(self, key: str | None, body: object, headers: Iterable[tuple[str, bytes]] = ()):
        """Writes a job as an application would; the broker's word on where it stands."""
        value = body if isinstance(body, bytes) else json.dumps(body).encode()
        raw_key = key.encode() if key is not None else None
        partition = partition_of(key) if key is not None else None
        return await self.producer.send_and_wait(
            INGEST.name, value, key=raw_key, partition=partition, headers=list(headers)
        )

    async def metrics(self, address: str, **labels: str) -> dict[str, float]:
        """Samples of one process that have these labels, summed over the others."""
        answer = await self.http.get(f"{address}/metrics")
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if labels.items() <= sample.labels.items():
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    async def metric_of_all(self, service: str, name: str, **labels: str) -> float:
        addresses = self.stack.addresses(service)
        return sum([(await self.metrics(address, **labels)).get(name, 0.0) for address in addresses])

    async def all_ready(self) -> None:
        """Waits until every process is up and has what it needs."""
        await self._poll(self._unready, "ready")

    async def pages_free(self) -> None:
        """Waits until every worker's free pages are all its pages and nothing runs."""
        await self._poll(self._workers_with_pages_in_use, "out of pages")

    async def _poll(self, look, what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while bad := await look():
            assert time.monotonic() < deadline, f"not {what}: {bad}"
            await asyncio.sleep(POLL_S)

    async def _unready(self) -> list[str]:
        bad = []
        for service in SERVICES:
            for address in self.stack.addresses(service.name):
                try:
                    ready = (await self.http.get(f"{address}/ready")).status_code == 200
                except httpx.TransportError:
                    ready = False
                if not ready:
                    bad.append(f"{service.name} {address}")
        return bad

    async def _workers_with_pages_in_use(self) -> list[str]:
        bad = []
        for address in (address for service in WORKERS for address in self.stack.addresses(service)):
            try:
                now = await self.metrics(address)
            except httpx.TransportError as error:
                bad.append(f"{address}: {error}")
                continue
            free, pages = now.get("baton_kv_pages_free"), now.get("baton_kv_pages")
            running = now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]
            if pages != NUM_PAGES or free != pages or running or now["baton_kv_held_requests"]:
                bad.append(f"{address}: {free} of {pages} pages free, {running} requests in it")
        return bad

    def errors_in_logs(self, services: Iterable[str] = ("ingest", *WORKERS, "edge")) -> list[str]:
        """Lines of the services' logs that tell of an error, tracebacks included."""
        wanted = tuple(services)
        found = []
        for path in sorted((self.stack.run_dir / "logs").iterdir()):
            if path.name.startswith(wanted):
                lines = path.read_text(errors="replace").splitlines()
                found += [f"{path.name}: {line[:2000]}" for line in lines if is_error(line)]
        return found


def is_error(line: str) -> bool:
    """Whether a line of a log is at level error or begins a traceback; libraries' own warnings are neither."""
    if not line.startswith("{"):
        return "Traceback" in line
    return json.loads(line)["level"] in {"error", "critical"}


@asynccontextmanager
async def serving_stack(run_dir: Path, model_folder: Path) -> AsyncIterator[Serving]:
    """Starts the stack; at its end no worker may have lost a page or told of an error."""
    composition = Composition(model=str(model_folder), **COMPOSITION)
    # Far from the default ports: a stack that starts beside this one may find those free at the same moment.
    first_port = random.randrange(PORTS.start, PORTS.stop - 1000)
    services = [replace(service, default_port=first_port + 100 * number) for number, service in enumerate(SERVICES)]
    async with local_stack(composition, run_dir, services=services) as stack:
        kafka = stack.kafka_address
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S) as http,
            AIOKafkaProducer(bootstrap_servers=kafka, acks="all") as producer,
            TopicReader(kafka, RESULTS.name) as results,
            TopicReader(kafka, DEAD_LETTER.name) as dead_letters,
        ):
            serving = Serving(stack, http, producer, results, dead_letters, model_folder)
            await serving.all_ready()
            yield serving


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream, as it came."""

    id: str
    data: dict


class NotDone(Exception):
    """A stream ended without [DONE], as one does that ends in an error."""


async def events_of(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream up to [DONE]. Raises NotDone, or httpx's error where the connection broke."""
    event_id = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            event_id = value
        elif name == "data" and value == "[DONE]":
            return
        elif name == "data":
            yield Event(event_id, json.loads(value))
    raise NotDone


def text_of(events: Iterable[Event]) -> str:
    """The text that a stream's events add up to, in either shape."""
    choices = [choice for event in events for choice in event.data.get("choices", ())]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


def tokens_of(events: Iterable[Event]) -> list[str]:
    """The tokens of a completion's stream that was asked for with logprobs."""
    choices = [choice for event in events for choice in event.data.get("choices", ()) if choice.get("logprobs")]
    return [token for choice in choices for token in choice["logprobs"]["tokens"]]
