"""Builds a worker on the real log, store, device and network."""

import asyncio
import os
import secrets
import sys
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.engine.engine import PagedEngine
from shared.engine.start import EnginePlan, StartedEngine, start_engine
from shared.errors import StartupError, StepHangs
from shared.observe import log
from shared.observe.log import Logger
from shared.observe.metrics import WorkerMetrics, process_registry
from shared.request import Incarnation
from shared.runtime.run import health_routes, serve_http, settle_memory, unix_clock_s
from shared.state.port import Role as RoleName
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser
from shared.transfer.staging import Staging, staging_bytes
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.worker.host import Worker, WorkerLimits, WorkerParts
from shared.worker.link_metrics import LinkMetrics
from shared.worker.role import Role, WorkerContext
from shared.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from shared.engine.late_work import LateWork

SWITCH_INTERVAL_S = 1e-4
"""How long the event loop's thread may keep the engine's waiting: by default 5 ms, more than a whole step."""


PROGRESS_INTERVAL_S = 1.0
"""While weights are read, a line about so often."""


class ReadingLog:
    """Tells the log how far the reading of the weights is."""

    def __init__(self, logger: Logger, clock_s: Callable[[], float]) -> None:
        self._log = logger
        self._clock_s = clock_s
        self._began_s = clock_s()
        self._told_s = self._began_s

    def __call__(self, num_read: int, num_bytes: int) -> None:
        """See `shared.engine.weight_reading.Report`."""
        now_s = self._clock_s()
        if num_read < num_bytes and now_s - self._told_s < PROGRESS_INTERVAL_S:
            return
        self._told_s = now_s
        took_s = now_s - self._began_s
        self._log.info(
            "weights read" if num_read == num_bytes else "reading weights",
            gb=_gb(num_read),
            of_gb=_gb(num_bytes),
            percent=round(100 * num_read / num_bytes),
            gb_per_s=_gb(num_read / max(took_s, 1e-9)),
            seconds=round(took_s, 2),
        )


def build_engine(settings: WorkerSettings) -> PagedEngine:
    """Load the model and allocate its pages. Raises UnsupportedCheckpoint or StartupError."""
    return start(settings, log.logger("engine", name=settings.name)).engine


def start(settings: WorkerSettings, logger: Logger) -> StartedEngine:
    """As `build_engine`, and say in the log what runs."""
    on_cuda = settings.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise StartupError("BATON_DEVICE is cuda, but PyTorch finds no GPU that it can use")
    plan = EnginePlan(
        folder=settings.model,
        name=settings.served_model,
        device=torch.device(settings.device),
        dtype=settings.dtype,
        kernels=settings.kernels,
        num_pages=settings.num_pages,
        gpu_memory_share=settings.gpu_memory_share,
        reserved_bytes=staging_bytes(settings.device),
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        host_cache_bytes=int(settings.host_cache_gb * 1e9),
    )
    started = start_engine(plan, ReadingLog(logger, time.monotonic), time.monotonic)
    limits = started.engine.limits
    logger.info(
        "engine ready",
        model=settings.served_model,
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        dtype=started.engine.model.layout.dtype,
        runs=started.runs,
        pages=limits.num_pages,
        max_running=limits.max_running,
        max_batch_tokens=limits.max_batch_tokens,
        weights_gb=_gb(started.weight_bytes),
        kv_gb=_gb(started.kv_bytes),
        host_cache_gb=_gb(limits.num_host_pages * started.engine.model.layout.page_bytes),
        peak_gb=None if started.peak_bytes is None else _gb(started.peak_bytes),
        load_s=round(started.load_s, 2),
        warm_up_s=round(started.warm_up_s, 2),
    )
    return started


def _gb(num_bytes: float) -> float:
    return round(num_bytes / 1e9, 2)


def export_late_work(metrics: WorkerMetrics, late_work: "Callable[[], LateWork]") -> None:
    """From now on show what is compiled, captured and allocated; what was done so far belongs to the start."""
    at_start = late_work()
    metrics.late_compiles.set_function(lambda: late_work().num_compiles - at_start.num_compiles)
    metrics.late_captures.set_function(lambda: late_work().num_captures - at_start.num_captures)
    metrics.late_allocations.set_function(lambda: late_work().num_allocations - at_start.num_allocations)


async def _run_or_exit(worker: Worker, stop: asyncio.Event, logger: Logger) -> None:
    """Run the worker; if a step hangs, end the process here: a device that hangs holds up whatever is closed in order,
    and the interpreter's own end. The slot is given up by then."""
    try:
        await worker.run(stop)
    except* StepHangs:
        logger.error("stopped: an engine step hangs")  # noqa: TRY400 - expected: one line is all
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


async def serve_worker(
    role_name: RoleName,
    make_role: Callable[[WorkerContext], Role],
    settings: WorkerSettings,
    stop: asyncio.Event,
    *,
    build: Callable[[WorkerSettings], PagedEngine] | None = None,
) -> None:
    """Run one worker until `stop` is set; `build` makes its engine instead of the one that the settings describe."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    registry = process_registry()
    metrics = WorkerMetrics(registry, settings.served_model)
    incarnation = Incarnation(f"{role_name}-{uuid.uuid4().hex}")
    logger = log.logger(role_name, name=settings.name)
    bus = KafkaBus(settings.kafka, client_id=incarnation, access=settings.kafka_access())
    await bus.check_access()
    redis_access = settings.redis_access()
    async with redis_state(settings.redis, redis_access) as state:
        await state.check_access()  # before the weights are read, which may take minutes
    registry.register(BusMetrics(bus))
    late_work, measured_steps = None, ()
    if build is None:
        started = start(settings, logger)
        engine, late_work, measured_steps = started.engine, started.late_work, started.measured_steps
    else:
        engine = build(settings)
    staging = Staging(engine.cache, os.environ)
    await staging.warm_up()
    if late_work is not None:
        export_late_work(metrics, late_work)
    async with (
        redis_state(settings.redis, redis_access) as state,
        UcxContext(settings.transfer_net_devices) as context,
        UcxTransfer(
            context,
            staging,
            incarnation=incarnation,
            clock=time.monotonic,  # the loop's own counts whole milliseconds: too coarse to measure a link
            host=settings.transfer_host,
            port=settings.transfer_port,
        ) as transfer,
    ):
        registry.register(state.unreadable)
        worker = Worker(
            WorkerParts(
                role_name=role_name,
                make_role=make_role,
                name=settings.name or incarnation[:16],
                incarnation=incarnation,
                engine=engine,
                transfer=transfer,
                bus=bus,
                state=state,
                tokeniser=Tokeniser.load(settings.model),
                metrics=metrics,
                log=logger,
                clock_s=unix_clock_s,
                random_bytes=secrets.token_bytes,
                limits=WorkerLimits(drain_s=settings.drain_s, step_s=settings.step_s),
                floor=settings.link_floor,
                measured_steps=measured_steps,
            )
        )
        peers = worker.peers
        registry.register(LinkMetrics(peers.links, peers.num_missing, lambda: transfer.refusals))
        routes = health_routes(registry, worker.ready, worker.health)
        settle_memory()
        async with serve_http(routes, host=settings.http_host, port=settings.http_port):
            await _run_or_exit(worker, stop, logger)
