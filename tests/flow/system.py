"""All of Baton in one event loop, on the twins: real services, real scheduling, a model that can be checked by hand."""

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import structlog
from prometheus_client import CollectorRegistry

from services.decode.role import DecodeRole
from services.ingest.admission import Admission, ModelFacts
from services.ingest.cache_salt import NAMES_ALONE, CacheSalt
from services.ingest.service import IngestService
from services.ingest.wire_loss import WireLoss
from services.prefill.role import PrefillRole
from services.stream_out.app import Api, not_found_route
from services.stream_out.metrics import EdgeMetrics
from services.stream_out.requests import Requests
from services.stream_out.service import StreamOut
from services.stream_out.settings import Settings as EdgeSettings
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.port import Bus
from shared.engine.engine import PagedEngine
from shared.engine.fake import FAKE_VOCAB_SIZE, fake_engine
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics, LocalPrefill, WorkerMetrics
from shared.policy.fold import PartitionFold, RequestState
from shared.policy.placement import Rules
from shared.request import Incarnation, PlacementId, RequestId, partition_of
from shared.runtime.run import health_routes, serve_http
from shared.state import keys
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import Role, State
from shared.text.tokeniser import Tokeniser
from shared.transfer.local import LocalNetwork, LocalTransfer
from shared.transfer.port import Transfer
from shared.wire.results import RESULT_DECODER, Result
from shared.wire.to_stream_out import STREAM_OUT_DECODER
from shared.wire.topics import INGEST, RESULTS, STREAM_OUT
from shared.worker.host import Worker, WorkerLimits, WorkerParts
from shared.worker.peers import LinkFloor
from tests.fake_tokeniser import fake_tokeniser

MODEL = "fake"

HAND_OVER_ALWAYS = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1, local_prefill=False)

SLOWDOWN = 5
"""The services' clock runs this much slower than the loop's: a busy machine that stalls the loop costs no lease."""


@dataclass
class Running:
    """One service in the loop."""

    name: str
    stop: asyncio.Event
    task: asyncio.Task
    bus: MemoryBus
    state: MemoryState
    incarnation: Incarnation
    engine: PagedEngine | None = None
    transfer: Transfer | None = None
    service: Any = None
    url: str = ""

    async def until_ready(self) -> None:
        while not all((await self.service.ready()).values()):
            await asyncio.sleep(0.01)

    async def leave(self) -> None:
        """SIGTERM."""
        self.stop.set()
        await self.task

    async def kill(self) -> None:
        """SIGKILL: what is sent or given back while its tasks end does not happen."""
        self.bus.kill()
        self.state.cut_off = True
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class System:
    """The twins that all services share, and what runs on them."""

    make_engine: Callable[[], PagedEngine] = fake_engine
    make_transfer: Callable[[PagedEngine, Incarnation], Transfer] | None = None
    tokeniser: Tokeniser = field(default_factory=fake_tokeniser)
    facts: ModelFacts = field(default_factory=lambda: ModelFacts(MODEL, 4096, FAKE_VOCAB_SIZE))
    seed: int = 0
    drain_s: float = 5.0
    hold_s: float = 5.0
    ingests: list[Running] = field(default_factory=list)
    workers: list[Running] = field(default_factory=list)
    edges: list[Running] = field(default_factory=list)
    grace_s: float = 5.0
    edge_settings: EdgeSettings | None = None
    slowdown: float = SLOWDOWN
    wire_loss: WireLoss = field(default_factory=WireLoss)
    floor: LinkFloor | None = None
    cache_salt: CacheSalt = NAMES_ALONE
    rules: Rules = HAND_OVER_ALWAYS

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.clock_s = lambda: loop.time() / self.slowdown
        self.random = random.Random(self.seed)
        self.log = MemoryLog(clock=self.clock_s, random=self.random)
        self.store = MemoryStore(clock=self.clock_s)
        for ago_ms in (keys.LEASE_MS, keys.LEASE_MS // 2, 0):  # it came up a lease ago
            self.store.touch_up(self.store.now_ms() - ago_ms, keys.LEASE_MS)
        self.network = LocalNetwork()
        self.numbers = itertools.count()
        self.logger = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))

    def name(self, kind: str) -> Incarnation:
        return Incarnation(f"{kind}-{next(self.numbers)}")

    def make_ingest(
        self, bus: Bus, state: State, incarnation: Incarnation, metrics: IngestMetrics, log: Logger
    ) -> IngestService:
        return IngestService(
            bus=bus,
            state=state,
            admission=Admission(self.tokeniser, self.facts, self.cache_salt),
            incarnation=incarnation,
            default_deadline_s=60.0,
            rules=self.rules,
            wire_loss=self.wire_loss,
            metrics=metrics,
            log=log,
            clock_s=self.clock_s,
            new_placement_id=lambda: PlacementId(self.name("placement")),
        )

    def make_edge(
        self, bus: Bus, state: State, incarnation: Incarnation, metrics: EdgeMetrics, log: Logger
    ) -> StreamOut:
        return StreamOut(
            bus,
            state,
            self.tokeniser,
            settings=self.edge_settings or EdgeSettings(model=Path("unused"), grace_s=self.grace_s),
            incarnation=incarnation,
            clock_s=self.clock_s,
            logger=log,
            metrics=metrics,
        )

    def make_worker(
        self,
        role: Role,
        bus: Bus,
        state: State,
        incarnation: Incarnation,
        metrics: WorkerMetrics,
        log: Logger,
        *,
        engine: PagedEngine,
        transfer: Transfer,
        **parts: Any,
    ) -> Worker:
        make_role = (
            (lambda context: PrefillRole(context, hold_s=self.hold_s))
            if role is Role.PREFILL
            else (lambda context: DecodeRole(context, pull_timeout_s=self.hold_s))
        )
        parts = {"limits": WorkerLimits(drain_s=self.drain_s), "floor": self.floor, **parts}
        return Worker(
            WorkerParts(
                role_name=role,
                make_role=make_role,
                name=incarnation,
                incarnation=incarnation,
                engine=engine,
                transfer=transfer,
                bus=bus,
                state=state,
                tokeniser=self.tokeniser,
                metrics=metrics,
                log=log,
                clock_s=self.clock_s,
                random_bytes=self.random.randbytes,
                **parts,
            )
        )

    async def start_ingest(self) -> Running:
        incarnation = self.name("ingest")
        bus = MemoryBus(self.log, client_id=incarnation)
        metrics = IngestMetrics(CollectorRegistry())
        state = MemoryState(self.store)
        service = self.make_ingest(bus, state, incarnation, metrics, self.logger)
        stop = asyncio.Event()
        task = asyncio.create_task(service.run(stop))
        running = Running(incarnation, stop, task, bus, state, incarnation, service=service)
        self.ingests.append(running)
        return running

    async def start_edge(self) -> Running:
        incarnation = self.name("edge")
        bus = MemoryBus(self.log, client_id=incarnation)
        metrics = EdgeMetrics(CollectorRegistry())
        state = MemoryState(self.store)
        edge = self.make_edge(bus, state, incarnation, metrics, self.logger)
        requests = Requests(edge, draw_name=lambda: self.name("req"))
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def run(stop: asyncio.Event) -> None:
            health = health_routes(CollectorRegistry(), edge.ready)
            routes = [*health, *Api(edge, requests).routes(), not_found_route(edge)]
            async with edge.running(), serve_http(routes, host="127.0.0.1", port=0) as port:
                ready.set_result(port)
                await stop.wait()

        stop = asyncio.Event()
        running = Running(incarnation, stop, asyncio.create_task(run(stop)), bus, state, incarnation, service=edge)
        self.edges.append(running)
        running.url = f"http://127.0.0.1:{await ready}"
        return running

    async def start(self, *, ingests: int = 1, prefills: int = 1, decodes: int = 2, edges: int = 1) -> None:
        """Start that many of each, and wait until all are ready."""
        for _ in range(ingests):
            await self.start_ingest()
        for _ in range(prefills):
            await self.start_worker(Role.PREFILL)
        for _ in range(decodes):
            await self.start_worker(Role.DECODE)
        for _ in range(edges):
            await self.start_edge()
        async with asyncio.timeout(10):
            for running in [*self.workers, *self.edges]:
                await running.until_ready()

    async def start_worker(self, role: Role) -> Running:
        incarnation = self.name(role)
        bus = MemoryBus(self.log, client_id=incarnation)
        engine = self.make_engine()
        transfer = self.make_transfer(engine, incarnation) if self.make_transfer else self.local(engine, incarnation)
        state = MemoryState(self.store)
        worker = self.make_worker(
            role,
            bus,
            state,
            incarnation,
            WorkerMetrics(CollectorRegistry(), MODEL),
            self.logger,
            engine=engine,
            transfer=transfer,
        )

        async def run(stop: asyncio.Event) -> None:
            async with transfer:
                await worker.run(stop)

        stop = asyncio.Event()
        running = Running(
            incarnation, stop, asyncio.create_task(run(stop)), bus, state, incarnation, engine, transfer, service=worker
        )
        self.workers.append(running)
        return running

    def local(self, engine: PagedEngine, incarnation: Incarnation) -> LocalTransfer:
        return LocalTransfer(
            self.network,
            engine.cache,
            address=f"{incarnation}:1",
            incarnation=incarnation,
            clock=self.clock_s,
            max_part_bytes=8 * engine.model.layout.page_bytes,
        )

    async def submit(self, body: dict | bytes, *, request_id: str | None = None, headers=()) -> RequestId:
        """Write a job as an application does."""
        request_id = RequestId(request_id or self.name("job"))
        async with MemoryBus(self.log, client_id="application").producer() as producer:
            await producer.send(
                INGEST.name,
                partition_of(request_id),
                body if isinstance(body, bytes) else orjson.dumps(body),
                key=request_id.encode(),
                headers=tuple(headers),
            )
        return request_id

    def folded(self, request_id: RequestId) -> RequestState | None:
        """What the log says of the request."""
        fold = PartitionFold()
        for record in self.log.records(STREAM_OUT.name, partition_of(request_id)):
            fold.apply(record.offset, record.timestamp_s, STREAM_OUT_DECODER.decode(record.value))
        return fold.requests.get(request_id)

    async def ended(self, request_id: RequestId, timeout_s: float = 20.0) -> RequestState:
        """What the log says of the request when it has ended."""
        async with asyncio.timeout(timeout_s):
            while True:
                state = self.folded(request_id)
                if state is not None and state.finished:
                    return state
                await asyncio.sleep(0.02)

    def results(self) -> list[Result]:
        """All results so far."""
        return [
            RESULT_DECODER.decode(record.value)
            for partition in range(RESULTS.num_partitions)
            for record in self.log.records(RESULTS.name, partition)
        ]

    async def result(self, request_id: RequestId, timeout_s: float = 10.0) -> Result:
        """The request's one result, when it is there."""
        async with asyncio.timeout(timeout_s):
            while True:
                await asyncio.sleep(0)
                records = self.log.records(RESULTS.name, partition_of(request_id))
                found = [record.value for record in records if record.key == request_id.encode()]
                if found:
                    assert len(found) == 1
                    return RESULT_DECODER.decode(found[0])
                await asyncio.sleep(0.01)

    async def quiet(self, timeout_s: float = 10.0) -> None:
        """Wait until every worker has all its pages back, and check the accounting. No worker may have died."""
        for worker in self.workers:
            if worker.task.done() and not worker.stop.is_set():
                worker.task.result()
        async with asyncio.timeout(timeout_s):
            while any(w.engine.stats().num_free_pages != w.engine.stats().num_pages for w in self.live_workers()):
                await asyncio.sleep(0.01)
        for worker in self.live_workers():
            worker.engine.check()

    def num_local_prefills(self, cause: LocalPrefill) -> float:
        """Prompts that workers computed beside their running requests."""
        counters = [worker.service._parts.metrics.local_prefills for worker in self.workers]
        return sum(counter.labels(MODEL, cause)._value.get() for counter in counters)

    def live_workers(self) -> list[Running]:
        return [worker for worker in self.workers if not worker.task.done()]

    async def close(self) -> None:
        for running in [*self.edges, *self.ingests, *self.workers]:
            if not running.task.done():
                await running.kill()
