"""The whole of Baton in one loop: real services on the twins, each in a process that can be stopped and killed."""

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from services.stream_out.metrics import EdgeMetrics
from services.stream_out.requests import Requests
from services.stream_out.settings import Settings
from shared.bus.memory import MemoryBus
from shared.engine.engine import PagedEngine
from shared.engine.fake import fake_engine
from shared.engine.port import EngineRequest, Reservation
from shared.observe.metrics import IngestMetrics, WorkerMetrics
from shared.request import Incarnation
from shared.state.memory import MemoryState
from shared.state.port import Role
from shared.transfer.local import LocalTransfer
from shared.wire import topics
from shared.wire.codec import Decoder
from shared.wire.to_ingest import RESUME_DECODER
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Frame
from shared.wire.to_worker import TO_DECODE_DECODER, TO_PREFILL_DECODER, DecodeWork, LocalWork, PrefillWork
from shared.worker.host import WorkerLimits
from tests.fake_tokeniser import fake_tokeniser
from tests.flow.system import MODEL, System
from tests.late_host_pages import LateHostPages
from tests.sim.conditions import PLAIN, Conditions
from tests.sim.engine import LoopEngine
from tests.sim.network import SimNetwork
from tests.sim.processes import PROCESS, Process

GRACE_S = 2.0
HOLD_S = 3.0
STEP_LIMIT_S = 3.0
DRAIN_S = 1.0
REFUSED_ID = 995
"""Decode cannot run a prompt that begins with it."""

INGEST, EDGE = "ingest", "edge"
KINDS = (INGEST, EDGE, Role.PREFILL, Role.DECODE)


DECODERS: dict[str, Decoder[Any]] = {
    topics.STREAM_OUT.name: STREAM_OUT_DECODER,
    topics.INGEST_RESUME.name: RESUME_DECODER,
    topics.PREFILL.name: TO_PREFILL_DECODER,
    topics.DECODE.name: TO_DECODE_DECODER,
}


class Toolbox:
    """What is the same in every world, and slow to make."""

    def __init__(self) -> None:
        self.tokeniser = fake_tokeniser()
        self.edge_settings = Settings(model=Path("unused"), grace_s=GRACE_S)
        self.ingest_metrics = IngestMetrics(CollectorRegistry())
        self.edge_metrics = EdgeMetrics(CollectorRegistry())
        self.worker_metrics = WorkerMetrics(CollectorRegistry(), MODEL)


@dataclass
class Host:
    """One service in its process, and its connections.

    Attributes:
        silences: from when to when its beats may have failed to come, or its records.
    """

    kind: str
    process: Process
    incarnation: Incarnation
    bus: MemoryBus
    state: MemoryState
    leave: asyncio.Event
    service: Any = None
    requests: Requests | None = None
    engine: PagedEngine | None = None
    transfer: LocalTransfer | None = None
    slow_steps: list[float] = field(default_factory=list)
    silences: list[tuple[float, float]] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return not self.process.dead


class Journal:
    """What happened, in order, if anybody wants to read it; errors always."""

    def __init__(self, clock_s: Callable[[], float], *, full: bool) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.full = full
        self._clock_s = clock_s

    def note(self, who: str, text: str) -> None:
        if self.full:
            self.lines.append(f"{self._clock_s() - 1000:8.3f} {who:12} {text}")

    def error(self, who: str, text: str) -> None:
        self.errors.append(f"{who}: {text}")
        self.note(who, f"ERROR {text}")

    def logger(self) -> Any:
        return _JournalLogger(self)


class _JournalLogger:
    """In the place of a service's logger."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def debug(self, event: str, **details: Any) -> None:
        pass

    def info(self, event: str, **details: Any) -> None:
        if self._journal.full:
            self._journal.note(_who(), _line(event, details))

    warning = info

    def error(self, event: str, **details: Any) -> None:
        self._journal.error(_who(), _line(event, details))

    exception = error


def _who() -> str:
    process = PROCESS.get()
    return process.name if process is not None else "world"


def _line(event: str, details: dict[str, Any]) -> str:
    shown = {key: value for key, value in details.items() if key not in ("timings", "traceparent", "tenant", "model")}
    return f"{event} {shown}" if shown else event


class World(System):
    """A `System` whose services run in processes.

    Attributes:
        conditions: under which all this runs.
        hosts, processes: all that ever ran, in the order of their start.
        step_s: draws how long an engine's step takes.
        calm_s: when the last fault ended; rested_s: when all that they had done was over.
    """

    def __init__(
        self, seed: int, tools: Toolbox, conditions: Conditions = PLAIN, *, full_journal: bool = False
    ) -> None:
        super().__init__(
            make_engine=lambda: fake_engine(
                num_pages=conditions.num_pages,
                max_batch_tokens=conditions.max_batch_tokens,
                num_host_pages=conditions.num_host_pages,
                host_pages=partial(LateHostPages, max_looks=conditions.host_looks),
                salted=True,
            ),
            tokeniser=tools.tokeniser,
            seed=seed,
            drain_s=DRAIN_S,
            hold_s=HOLD_S,
            edge_settings=tools.edge_settings,
            slowdown=1.0,
            rules=conditions.rules,
        )
        self.conditions = conditions
        self.rng = Random(f"world {seed}")
        self.network = SimNetwork(conditions.delay_s, conditions.bytes_per_s)
        self.tools = tools
        self.journal = Journal(self.clock_s, full=full_journal)
        self.hosts: list[Host] = []
        self.processes: list[Process] = []
        self.step_s: Callable[[], float] = lambda: conditions.step_s
        self.calm_s = 0.0
        self.rested_s = math.inf
        if full_journal:
            self.log.append = partial(_note_append, self.journal, self.log.append)

    def running(self, *kinds: str) -> list[Host]:
        return [host for host in self.hosts if host.live and (not kinds or host.kind in kinds)]

    def any(self, kind: str) -> Host | None:
        """One of those that run, stopped ones too."""
        running = self.running(kind)
        return self.rng.choice(running) if running else None

    def start_host(self, kind: str) -> Host:
        """Begin a new incarnation."""
        incarnation = self.name(kind)
        process = Process(incarnation)
        bus = MemoryBus(self.log, client_id=incarnation)
        host = Host(kind, process, incarnation, bus, MemoryState(self.store), asyncio.Event())
        self.hosts.append(host)
        self.processes.append(process)
        main = {INGEST: self._ingest, EDGE: self._edge}.get(kind, self._worker)
        process.run_main(main(host))
        self.journal.note("world", f"{incarnation} starts")
        return host

    async def _ingest(self, host: Host) -> None:
        host.service = self.make_ingest(
            host.bus, host.state, host.incarnation, self.tools.ingest_metrics, self.journal.logger()
        )
        await host.service.run(host.leave)

    async def _edge(self, host: Host) -> None:
        edge = self.make_edge(host.bus, host.state, host.incarnation, self.tools.edge_metrics, self.journal.logger())
        host.service = edge
        async with edge.running():
            host.requests = Requests(edge, draw_name=lambda: self.name("req"))
            await host.leave.wait()

    async def _worker(self, host: Host) -> None:
        engine = host.engine = self.make_engine()
        if host.kind == Role.DECODE:
            _make_picky(engine)
        transfer = host.transfer = self.local(engine, host.incarnation)
        self.network.processes[transfer.address] = host.process
        host.service = self.make_worker(
            Role(host.kind),
            host.bus,
            host.state,
            host.incarnation,
            self.tools.worker_metrics,
            self.journal.logger(),
            engine=engine,
            transfer=transfer,
            limits=WorkerLimits(drain_s=self.drain_s, step_s=STEP_LIMIT_S),
            measured_steps=self.conditions.measured_steps(self.rng),
            run_engine=lambda engine, clock_s: LoopEngine(
                engine, clock_s, lambda: host.slow_steps.pop() if host.slow_steps else self.step_s()
            ),
        )
        async with transfer:
            await host.service.run(host.leave)

    def kill(self, host: Host, *, zombie_after_s: float | None = None) -> None:
        """SIGKILL."""
        if host.process.dead:
            return
        self.journal.note("world", f"kill {host.incarnation} zombie={zombie_after_s}")
        host.process.kill()
        host.bus.kill(zombie_after_s=zombie_after_s)
        if host.transfer is not None:
            with suppress(KeyError):
                self.network.died(host.transfer)

    async def ready(self) -> None:
        """Wait until all that runs is ready."""
        for host in self.running():
            while host.live and not (host.service is not None and all((await host.service.ready()).values())):
                await asyncio.sleep(0.05)


def _note_append(journal: Journal, append: Callable[..., int], topic: str, partition: int, records: Any) -> int:
    """Append, and tell in the journal of what."""
    first = append(topic, partition, records)
    decoder = DECODERS.get(topic)
    for offset, record in enumerate(records, first):
        shown = _short(decoder.decode(record.value)) if decoder else (record.key or b"").decode()
        journal.note(_who(), f"-> {topic}/{partition}@{offset} {shown}")
    return first


def _short(message: Any) -> str:
    """What tells a record from others."""
    if isinstance(message, Frame):
        made = (
            f"{each.placement}[{each.choice}] {each.index}+{len(each.ids)} {each.finish or ''}"
            for each in message.entries
        )
        return f"Frame of {message.worker.incarnation}: {'; '.join(made)}"
    if isinstance(message, PrefillWork | LocalWork | DecodeWork):
        assignment = message.assignment
        return f"{type(message).__name__} {assignment.request_id}[{assignment.choice}] {assignment.placement}"
    names = ("request_id", "choice", "epoch", "placement", "prefill", "decode", "target", "reason", "outcome", "lost")
    shown = {name: getattr(message, name) for name in names if getattr(message, name, None) is not None}
    parts = (f"{name}={getattr(value, 'incarnation', value)}" for name, value in shown.items())
    return f"{type(message).__name__} {' '.join(parts)}"


def _make_picky(engine: PagedEngine) -> None:
    reserve, add = engine.reserve, engine.add

    def picky_reserve(request: EngineRequest) -> Reservation | None:
        _refuse_some(request)
        return reserve(request)

    def picky_add(request: EngineRequest) -> None:
        _refuse_some(request)
        add(request)

    engine.reserve, engine.add = picky_reserve, picky_add


def _refuse_some(request: EngineRequest) -> None:
    if request.ids[0] == REFUSED_ID:
        raise ValueError("not with me")
