"""A worker of which everything about hand-overs is real: engine, engine's thread, role, transfer, UCX. The test stands
for the log: it carries what the roles send, and can strike at any moment."""

import asyncio
import json
import os
import socket
import sys
import time
import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from prometheus_client import CollectorRegistry

from services.decode.role import DecodeRole
from services.prefill.role import PrefillRole
from shared.blocks import PAGE_TOKENS, pages_for
from shared.engine.batch import Done
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineLimits
from shared.engine.torch_runner import TorchRunner
from shared.engine.weights import Checkpoint
from shared.errors import BatonError
from shared.observe.log import logger
from shared.observe.metrics import WorkerMetrics
from shared.request import Incarnation, WorkerRef
from shared.transfer import link_meter, puller
from shared.transfer.plan import LinkSpeed
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.to_stream_out import STREAM_OUT_DECODER
from shared.wire.to_worker import TO_DECODE_DECODER, TO_PREFILL_DECODER, DecodeWork, PrefillWork
from shared.wire.topics import STREAM_OUT
from shared.wire.wire_format import WireFormat
from shared.worker.engine_thread import EngineThread
from shared.worker.frames import FrameWriter
from shared.worker.role import WorkerContext
from tests.contract.transfer_worlds import arena_bytes, is_whole
from tests.faults.board import Board, Phase, Points, watch_links

NUM_PAGES = 40
PAGES_PER_PART = 3
MAX_BATCH_TOKENS = 128
MAX_CONTEXT = 1024

HOLD_S = 1.5
PULL_TIMEOUT_S = 1.0
PEER_TIMEOUT_S = 1.0
STALL_S = 1.0

SLOW_BYTES_PER_S = 5e6
"""What the self-test of a link says it found: so slow that KV goes layer by layer, and where allowed in INT8."""

FAST_BYTES_PER_S = 1e11
"""The same of workers that hurry: what comes is watched."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the lone engine made of a prompt: float32 KV `[tokens, layers, 2, heads, head_dim]` and tokens."""

    kv: torch.Tensor
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Spec:
    """One worker to be.

    Attributes:
        hurries: it takes the ways that are else for GPU memory: UCX spins, the end of a receive is watched for.
    """

    role: str
    incarnation: str
    slot: int
    socket: str
    board: str
    hurries: bool


class SlowRunner(TorchRunner):
    """Stands still after each layer of a batch with prompts in it, as long as told."""

    layer_s = 0.0

    def launch(self, rows, layers=None):
        stored = None if layers is None else self._events.marking(layers)
        has_prompts = any(row.end - row.start > 1 for row in rows)

        def slowly(layer):
            if stored is not None:
                stored(layer)
            if has_prompts:
                time.sleep(self.layer_s)

        return Done(self._run(rows, slowly))


def kv_of(cache, pages, num_tokens):
    """As `Reference.kv`."""
    rows = cache.pages[list(pages)].movedim(3, 1)
    return rows.reshape(-1, *rows.shape[2:])[:num_tokens].clone()


class WatchedTransfer:
    """Tells what becomes of offers and pulls; pages that were pulled must be those of the lone engine."""

    def __init__(self, transfer, cache, points, say, reference_of):
        self._transfer = transfer
        self._cache = cache
        self._points = points
        self._say = say
        self._reference_of = reference_of

    def offer(self, key, pages, *, on_end, progress, **rest):
        def ended(outcome):
            self._points.reached(key, Phase.ENDED)
            self._say(said="offer ended", key=key, outcome=outcome)
            on_end(outcome)

        launched, complete = progress.launched, progress.complete

        def watched_launched(chunk):
            launched(chunk)
            self._points.reached(key, Phase.LATER_CHUNK)

        def watched_complete():
            complete()
            self._points.reached(key, Phase.COMPUTED)

        progress.launched, progress.complete = watched_launched, watched_complete
        ticket = self._transfer.offer(key, pages, on_end=ended, progress=progress, **rest)
        self._points.reached(key, Phase.FIRST_CHUNK)
        self._points.reached(key, Phase.OFFERED)
        return ticket

    def withdraw(self, key):
        self._transfer.withdraw(key)

    async def pull(self, ticket, *, want, into, timeout_s):
        try:
            pulled = await self._transfer.pull(ticket, want=want, into=into, timeout_s=timeout_s)
        except BaseException as error:
            self._points.reached(ticket.key, Phase.FAILED)
            self._say(said="not pulled", key=ticket.key, why=f"{type(error).__name__}: {error}")
            raise
        error = self._error(ticket, want, into, pulled.format)
        self._points.reached(ticket.key, Phase.PULLED)
        self._say(said="pulled", key=ticket.key, format=pulled.format, error=error)
        return pulled

    def _error(self, ticket, want, into, wire_format):
        """How far the pages are from the lone engine's, as a share of what they may be."""
        kv = self._reference_of(ticket.key).kv
        if not len(want):
            return 0.0
        expected = kv[want[0] * PAGE_TOKENS :]  # want is the end of the prompt
        error = (kv_of(self._cache, into, len(expected)) - expected).abs().max().item()
        lossy = 0.51 / 127 * expected.abs().max().item() if wire_format is not WireFormat.NATIVE else 0.0
        return error / (lossy + 1e-4 * (1 + expected.abs().max().item()))


class Worker:
    """One process's worker."""

    def __init__(self, spec: Spec, checkpoint: Checkpoint, references: dict[bytes, Reference]) -> None:
        self._spec = spec
        self._references = references
        self._ids: dict[str, bytes] = {}
        self._gate = socket.socket(socket.AF_UNIX)
        self._points = Points(Board(Path(spec.board)), self._stand_still)
        self._runner = SlowRunner(checkpoint, NUM_PAGES)
        limits = EngineLimits(MAX_CONTEXT, NUM_PAGES, max_running=8, max_batch_tokens=MAX_BATCH_TOKENS)
        self._engine = PagedEngine(self._runner, checkpoint.model("tiny"), limits)
        self._decoder = TO_PREFILL_DECODER if spec.role == "prefill" else TO_DECODE_DECODER

    async def run(self) -> None:
        spec, loop = self._spec, asyncio.get_running_loop()
        hello = {"incarnation": spec.incarnation, "pid": os.getpid()}
        self._gate.connect(spec.socket)
        self._gate.sendall(json.dumps({**hello, "channel": "gate"}).encode() + b"\n")
        reader, self._writer = await asyncio.open_unix_connection(spec.socket, limit=2**24)
        self._say(**hello, channel="talk")
        watch_links(self._points)
        self._staging = Staging(
            self._engine.cache, {}, arena_bytes=arena_bytes(PAGES_PER_PART * self._engine.model.layout.page_bytes)
        )
        engine = EngineThread(self._engine, time.time)
        async with (
            UcxContext() as context,
            UcxTransfer(
                context,
                self._staging,
                incarnation=Incarnation(spec.incarnation),
                clock=time.monotonic,
                peer_timeout_s=PEER_TIMEOUT_S,
            ) as self._transfer,
            self._ending_at_once(),
            asyncio.TaskGroup() as tasks,
        ):
            if spec.hurries:
                self._transfer._source._progress = self._transfer._puller._progress = context.progress
            with engine.running():
                watched = WatchedTransfer(
                    self._transfer, self._engine.cache, self._points, self._say, self._reference_of
                )
                me = WorkerRef(spec.slot, Incarnation(spec.incarnation))
                role_context = WorkerContext(
                    me=me,
                    engine=engine,
                    transfer=watched,
                    page_bytes=self._engine.model.layout.page_bytes,
                    frames=FrameWriter(self, me),
                    handoff=self,
                    credits=SimpleNamespace(computed=lambda *_: None, give_back=lambda *_: None),
                    tokeniser=None,
                    metrics=WorkerMetrics(CollectorRegistry(), "tiny"),
                    log=logger(spec.incarnation),
                    clock_s=time.time,
                    random_bytes=os.urandom,
                    is_gone=lambda *_: False,
                    tasks=tasks,
                    profile=lambda: None,
                )
                if spec.role == "prefill":
                    self._role = PrefillRole(role_context, hold_s=HOLD_S)
                else:
                    self._role = DecodeRole(role_context, pull_timeout_s=PULL_TIMEOUT_S)
                self._thread = engine
                tasks.create_task(self._handle_steps())
                tasks.create_task(self._watch_engine())
                self._say(said="up", address=self._transfer.address)
                while line := await reader.readline():
                    await self._obey(json.loads(line), loop)
                os._exit(0)

    @asynccontextmanager
    async def _ending_at_once(self):
        """Whatever goes wrong ends the process, as if it was killed, and is written down."""
        try:
            yield
        except BaseException:  # noqa: BLE001 - the process ends
            for error in self._transfer._tasks._errors:
                traceback.print_exception(error)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    async def _watch_engine(self) -> None:
        await self._thread.failed

    async def _handle_steps(self) -> None:
        while True:
            step = await self._thread.steps.get()
            await self._role.handle(step)
            self._thread.handled()

    async def _obey(self, command: dict, loop) -> None:
        match command["do"]:
            case "take":
                self._take(self._decoder.decode(json.dumps(command["message"]).encode()))
            case "arm":
                phase = command["phase"]
                self._points.arm(None if phase is None else Phase(phase), command["num_to_pass"])
            case "pace":
                self._runner.layer_s = command["layer_s"]
            case "connect":
                loop.create_task(self._connect(command["address"], command["incarnation"]))
            case "report":
                self._say(said="report", wrong=await self._wrong())

    def _take(self, message) -> None:
        if message.target.incarnation != self._spec.incarnation:
            return
        if isinstance(message, PrefillWork | DecodeWork):
            self._ids[message.assignment.placement] = message.ids.tobytes()
        self._role.take(message)
        if isinstance(message, PrefillWork):
            self._points.reached(message.assignment.placement, Phase.WAITING)

    async def _connect(self, address, incarnation) -> None:
        try:
            await self._transfer.connect(address, incarnation)
            self._say(said="connected", why=None)
        except BatonError as error:
            self._say(said="connected", why=str(error))

    async def _wrong(self) -> list[str]:
        """What is not as it is when nothing is going on."""

        def checked(engine):
            engine.check()
            return engine.stats()

        stats = await self._thread.call(checked)
        puller_end, source = self._transfer._puller, self._transfer._source
        numbers = {
            "pages taken": stats.num_pages - stats.num_free_pages,
            "waiting": stats.num_waiting,
            "running": stats.num_running,
            "held": stats.num_held,
            "importing": stats.num_importing,
            "offers": self._transfer.num_offers,
            "arenas lent": int(not is_whole(self._staging)),
            "wishes for arena": len(self._staging.incoming._wishes) + len(self._staging.outgoing._wishes),
            "pulls": sum(len(link.pulls) + len(link.probes) for link in puller_end._connections.values()),
            "unfinished in the role": len(self._role.unfinished()),
            "links of peers that are gone": max(0, len(source._links) - 1),
        }
        return [f"{number} {name}" for name, number in numbers.items() if number]

    def _reference_of(self, key) -> Reference:
        return self._references[self._ids[key]]

    # What the log and the test get

    def _say(self, **fields) -> None:
        self._writer.write(json.dumps(fields).encode() + b"\n")

    async def send(self, topic, partition, value, **_) -> int:
        self.post(topic, partition, value)
        return 0

    def post(self, topic, partition, value, **_) -> None:
        if topic != STREAM_OUT.name:
            self._say(said="sent", message=json.loads(value))
            return
        for entry in STREAM_OUT_DECODER.decode(value).entries:
            self._say(
                said="entry",
                key=entry.placement,
                index=entry.index,
                ids=list(entry.ids),
                finish=entry.finish,
                error=entry.error and entry.error.message,
            )

    def _stand_still(self, slot: int) -> None:
        """The whole event loop does, until the test says go."""
        self._gate.sendall(bytes([slot]))
        self._gate.recv(1)


def claim_speed(bytes_per_s: float) -> None:
    """Self-tests find that, and peers are given up sooner."""

    async def measure(exchange, max_bytes):
        await exchange(max_bytes)
        return LinkSpeed(bytes_per_s, 1e-5)

    puller.measure = measure
    link_meter.STALL_S = STALL_S


def reference(engine: PagedEngine, ids, answer, pages) -> Reference:
    """From pages that hold the ids' KV."""
    assert len(pages) == pages_for(len(ids))
    return Reference(kv_of(engine.cache, pages, len(ids)), answer)


def work_as(spec: Spec, checkpoint: Checkpoint, references: dict[bytes, Reference]) -> None:
    """This process's life."""
    # torch makes its thread pool anew after a fork, and not safely if two threads ask for it at the same time.
    torch.set_num_threads(1)
    claim_speed(FAST_BYTES_PER_S if spec.hurries else SLOW_BYTES_PER_S)
    try:
        asyncio.run(Worker(spec, checkpoint, references).run())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
