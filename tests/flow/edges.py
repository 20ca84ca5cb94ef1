"""Edges on the twins under a virtual clock, with the records of a pretend ingest and worker written by hand."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import structlog
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from services.stream_out.app import Api, not_found_route
from services.stream_out.metrics import EdgeMetrics
from services.stream_out.requests import Requests
from services.stream_out.service import StreamOut
from services.stream_out.settings import Settings
from shared.blocks import token_ids
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.sending import Unsent
from shared.request import (
    Event,
    FinishReason,
    Incarnation,
    PlacementId,
    SamplingParams,
    TokenLogprob,
    WorkerRef,
    partition_of,
)
from shared.runtime.run import health_routes
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import LiveWorker, Registry, RequestHint, Role, WorkerCard, WorkerLoad
from shared.text.tokeniser import Tokeniser
from shared.wire.codec import encode
from shared.wire.results import RESULT_DECODER
from shared.wire.to_ingest import HEADER_DEADLINE, HEADER_EDGE, HEADER_TENANT, LogPosition, body_hash
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut, Frame, FrameEntry, Open, View
from tests.tiny_tokenizers import byte_level
from tests.virtual_loop import run_virtually

START_S = 1_700_000_000.0
PREFILL = WorkerRef(3, Incarnation("p"))
DECODE = WorkerRef(5, Incarnation("d"))
TOKENISER = Tokeniser(byte_level(), eos_ids=(1,))
TEXT = "Hello world, 你好 мир said hello"
IDS = TOKENISER.encode(TEXT, add_special=False)

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi"}

__all__ = ["run_virtually"]


class Exchange:
    """One HTTP request and what came back so far."""

    def __init__(self, app, method, path, body, headers) -> None:
        self.status = None
        self.headers = {}
        self.body = b""
        self.num_body_parts_asked = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self._parts = list(body)
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "server": ("edge", 80),
            "client": ("client", 1),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self.task.add_done_callback(lambda _: self._wake())

    async def until(self, is_so):
        while not is_so():
            if self.task.done():
                self.task.result()
                assert is_so(), (self.status, self.body)
            await self._changed.wait()
        return self

    async def done(self):
        await self.task
        return self

    async def json(self):
        await self.task
        return json.loads(self.body)

    @property
    def events(self):
        """(id, data) of the whole events so far, comments left out."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            if fields:
                found.append((fields.get("id"), fields["data"]))
        return found

    async def events_until(self, num_events):
        await self.until(lambda: len(self.events) >= num_events)
        return self.events

    def leave(self):
        self._gone.set()

    async def _receive(self):
        self.num_body_parts_asked += 1
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            await self.reading.wait()
            self.body += message.get("body", b"")
        self._wake()

    def _wake(self):
        self._changed.set()
        self._changed = asyncio.Event()


class PretendState(MemoryState):
    """The store, in which the world's pretend workers hold their slots."""

    def __init__(self, world) -> None:
        super().__init__(world.store)
        self._world = world

    async def registry(self, *, num_slots):
        found = await super().registry(num_slots=num_slots)
        return Registry([*found.workers, *self._world.workers], self._world.unreadable)


def pretend_worker(ref, role):
    card = WorkerCard(ref.incarnation, role, "pretend", "tiny", "f", 4096, 64, 8, 256, 1024, 0, "host:1", "layout")
    return LiveWorker(ref.slot, card, WorkerLoad(64, 0, 0), 0, 0, 0.0)


class Node:
    """One edge process."""

    def __init__(self, world, name, settings) -> None:
        self.name = Incarnation(name)
        self.bus = MemoryBus(world.log, client_id=name)
        self.state = PretendState(world)
        self.registry = CollectorRegistry()
        self.log = structlog.testing.LogCapture()
        names = Random(name)
        self.edge = StreamOut(
            self.bus,
            self.state,
            TOKENISER,
            settings=Settings(model=".", **settings),
            incarnation=self.name,
            clock_s=world.clock_s,
            logger=structlog.wrap_logger(None, processors=[self.log], wrapper_class=structlog.stdlib.BoundLogger),
            metrics=EdgeMetrics(self.registry),
        )
        api = Api(self.edge, Requests(self.edge, draw_name=lambda: f"{names.getrandbits(64):016x}"))
        routes = [*health_routes(self.registry, self.edge.ready), *api.routes(), not_found_route(self.edge)]
        self.app = Starlette(routes=routes)
        self.exchanges = []

    def call(self, method, path, body=b"", **headers):
        raw = body if isinstance(body, bytes | list) else json.dumps(body).encode()
        parts = raw if isinstance(raw, list) else [raw]
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange = Exchange(self.app, method, path, parts, headers)
        self.exchanges.append(exchange)
        return exchange

    def kill(self):
        """SIGKILL, as far as others can tell."""
        self.bus.kill()
        self.state.cut_off = True
        for exchange in self.exchanges:
            exchange.task.cancel()

    def metric(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


class World:
    """The log, the store, the time, and the workers that live."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.clock_s = lambda: START_S + loop.time() - 1000.0
        self.log = MemoryLog(clock=self.clock_s, random=Random(7))
        self.store = MemoryStore(clock=self.clock_s)
        self.workers = [pretend_worker(PREFILL, Role.PREFILL), pretend_worker(DECODE, Role.DECODE)]
        self.unreadable = frozenset()
        self._stack = AsyncExitStack()
        self._nodes = []
        self._num_seen = dict.fromkeys(range(16), 0)

    async def node(self, name, **settings):
        """Start an edge; it may own partitions a moment later."""
        node = Node(self, name, settings)
        self._nodes.append(node)
        await self._stack.enter_async_context(node.edge.running())
        return node

    async def owner(self, name, **settings):
        """Start an edge and wait until it owns partitions."""
        node = await self.node(name, **settings)
        await self.ready(node)
        return node

    async def ready(self, node):
        while (await node.call("GET", "/ready").done()).status != 200:
            await asyncio.sleep(0.1)

    async def close(self):
        exchanges = [exchange.task for node in self._nodes for exchange in node.exchanges]
        for task in exchanges:
            task.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)
        await self._stack.aclose()

    def write(self, message, request_id=None):
        """Append to the request's story."""
        partition = partition_of(request_id or message.request_id)
        value = encode(message)
        return self.log.append("stream-out", partition, [Unsent(value, None, (), len(value), None)])

    async def job(self):
        """The next job that an edge wrote."""
        while True:
            for partition, num_seen in self._num_seen.items():
                records = self.log.records("ingest", partition, num_seen)
                if records:
                    self._num_seen[partition] = records[0].offset + 1
                    return Job(self, records[0])
            await asyncio.sleep(0.01)

    def results(self):
        """All of `results`, in no order."""
        records = [record for p in range(16) for record in self.log.records("results", p)]
        for record in records:
            assert partition_of(record.key.decode()) == record.partition
        return [RESULT_DECODER.decode(record.value) for record in records]

    async def result(self, request_id):
        while True:
            found = [result for result in self.results() if result.request_id == request_id]
            if found:
                return found[0]
            await asyncio.sleep(0.05)

    def story(self, request_id, kind):
        """Messages of a kind about the request."""
        records = self.log.records("stream-out", partition_of(request_id))
        messages = [STREAM_OUT_DECODER.decode(record.value) for record in records]
        return [m for m in messages if isinstance(m, kind) and getattr(m, "request_id", request_id) == request_id]

    def stops(self):
        """(topic, slot) of every Stop."""
        return [
            (topic, slot)
            for topic in ("prefill", "decode")
            for slot in range(64)
            for record in self.log.records(topic, slot)
            if json.loads(record.value)["type"] == "stop"
        ]


class Job:
    """A job as ingest and the workers would serve it; `num_choices` and the like come from its body."""

    def __init__(self, world, record) -> None:
        self.world = world
        self.record = record
        self.id = record.key.decode()
        self.body = json.loads(record.value)
        self.headers = dict(record.headers)
        self.notes = []
        self.num_choices = self.body.get("n") or 1

    @property
    def view(self):
        body = self.body
        edge = self.headers.get(HEADER_EDGE)
        logprobs = body.get("logprobs")
        if "messages" in body:
            logprobs = (body.get("top_logprobs") or 0) if logprobs else None
        stop = body.get("stop") or ()
        return View(
            tenant=self.headers[HEADER_TENANT].decode(),
            model=body["model"],
            body_hash=body_hash(self.record.value),
            chat="messages" in body,
            num_choices=self.num_choices,
            num_prompt_tokens=9,
            deadline_s=int(self.headers[HEADER_DEADLINE]) / 1000,
            job=LogPosition(self.record.partition, self.record.offset),
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling=SamplingParams(max_tokens=100, logprobs=logprobs),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            edge=None if edge is None else Incarnation(edge.decode()),
            stamps={Event.ACCEPTED: self.record.timestamp_s, Event.ADMITTED: self.record.timestamp_s + 0.01},
        )

    def open(self, choice=None, epoch=1, note=True):
        """Place one choice, or all."""
        for index in range(self.num_choices) if choice is None else (choice,):
            view = self.view if epoch == 1 else None
            stamps = {Event.PLACED: self.world.clock_s()}
            placement = placement_id(self.id, index, epoch)
            opening = Open(self.id, index, epoch, placement, PREFILL, DECODE, view, stamps)
            offset = self.world.write(opening)
            if note:
                hint = RequestHint(partition_of(self.id), offset)
                noting = MemoryState(self.world.store).note_request(self.id, hint, keep_ms=10**7)
                self.notes.append(asyncio.ensure_future(noting))

    def frame(self, index, ids, *, choice=0, epoch=1, finish=None, **fields):
        """New tokens of one choice."""
        ids = token_ids(ids)
        logprobs = ()
        if self.view.sampling.logprobs is not None:
            logprobs = tuple(TokenLogprob(-0.5, ((token_id, -0.5), (7, -1.5))) for token_id in ids)
        placement = placement_id(self.id, choice, epoch)
        entry = FrameEntry(self.id, choice, placement, index, ids, logprobs, finish, **fields)
        return self.world.write(Frame(DECODE, (entry,), made_s=0.0), self.id)

    def serve(self, ids=IDS, *, finish=FinishReason.STOP, step=1, choice=0, epoch=1, start=0):
        """All frames of one choice: the first from prefill, then one for each step."""
        for index in range(start, len(ids), step):
            chunk = ids[index : index + step]
            is_last = index + step >= len(ids)
            stamps = {Event.FIRST_TOKEN: self.world.clock_s()} if index == 0 else {}
            if is_last:
                stamps[Event.FINISHED] = self.world.clock_s()
            self.frame(
                index,
                chunk,
                choice=choice,
                epoch=epoch,
                finish=finish if is_last else None,
                num_cached_tokens=4 if index == 0 else None,
                stamps=stamps,
            )

    def refuse(self, error):
        self.world.write(Cut(self.id, 0, 2, "refused", FinishReason.REJECTED, error, self.view))


def placement_id(request_id, choice, epoch):
    return PlacementId(f"{request_id}/{choice}/{epoch}")


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    try:
        yield made
    finally:
        await made.close()


def scenario(work):
    """Let a test run in virtual time, with a world of its own."""

    def test():
        async def live():
            async with world() as made:
                await work(made)

        run_virtually(live())

    test.__name__ = work.__name__
    test.__doc__ = work.__doc__
    return test


def texts(events, choice=0):
    """The text of one choice out of a stream's events."""
    chunks = [json.loads(data) for _, data in events if data != "[DONE]"]
    found = [c for chunk in chunks for c in chunk.get("choices", ()) if c["index"] == choice]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in found)
