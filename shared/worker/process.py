"""Builds a worker on the real log, store, device and network."""

import asyncio
import os
import secrets
import sys
import uuid
from collections.abc import Callable

import torch

from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineLimits, EngineModel
from shared.engine.runner import TorchRunner
from shared.engine.weights import load_checkpoint
from shared.errors import StartupError
from shared.observe import log
from shared.observe.metrics import WorkerMetrics, process_registry
from shared.request import Incarnation
from shared.runtime.run import health_routes, serve_http, settle_memory, unix_clock_s
from shared.state.port import Role as RoleName
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.worker.host import Worker, WorkerLimits, WorkerParts
from shared.worker.role import Role, WorkerContext
from shared.worker.settings import WorkerSettings

SWITCH_INTERVAL_S = 1e-4
"""How long the event loop's thread may keep the engine's waiting: by default 5 ms, more than a whole step."""


def build_engine(settings: WorkerSettings) -> PagedEngine:
    """Load the model and allocate its pages. Raises UnsupportedCheckpoint or StartupError."""
    if settings.max_batch_tokens < settings.max_running:
        raise StartupError(
            f"BATON_MAX_BATCH_TOKENS, {settings.max_batch_tokens}, must be at least BATON_MAX_RUNNING, "
            f"{settings.max_running}: each running request takes one token row of a step"
        )
    checkpoint = load_checkpoint(settings.model, settings.dtype, torch.device(settings.device))
    return PagedEngine(
        TorchRunner(checkpoint, settings.num_pages),
        EngineModel(
            name=settings.served_model,
            fingerprint=checkpoint.fingerprint,
            vocab_size=checkpoint.config.vocab_size,
            eos_token_ids=checkpoint.config.eos_token_ids,
            layout=checkpoint.layout,
        ),
        EngineLimits(
            max_context=checkpoint.config.max_context,
            num_pages=settings.num_pages,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
        ),
    )


async def serve_worker(
    role_name: RoleName,
    make_role: Callable[[WorkerContext], Role],
    settings: WorkerSettings,
    stop: asyncio.Event,
    *,
    build: Callable[[WorkerSettings], PagedEngine] = build_engine,
) -> None:
    """Run one worker until `stop` is set; `build` makes its engine."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    registry = process_registry()
    incarnation = Incarnation(f"{role_name}-{uuid.uuid4().hex}")
    logger = log.logger(role_name, name=settings.name)
    bus = KafkaBus(settings.kafka, client_id=incarnation)
    registry.register(BusMetrics(bus))
    engine = build(settings)
    async with (
        redis_state(settings.redis) as state,
        UcxContext(settings.transfer_net_devices) as context,
        UcxTransfer(
            context,
            Staging(engine.cache, os.environ),
            incarnation=incarnation,
            clock=asyncio.get_running_loop().time,
            host=settings.transfer_host,
            port=settings.transfer_port,
        ) as transfer,
    ):
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
                metrics=WorkerMetrics(registry, settings.served_model),
                log=logger,
                clock_s=unix_clock_s,
                random_bytes=secrets.token_bytes,
                limits=WorkerLimits(drain_s=settings.drain_s, step_s=settings.step_s),
            )
        )
        routes = health_routes(registry, worker.ready)
        settle_memory()
        async with serve_http(routes, host=settings.http_host, port=settings.http_port):
            await worker.run(stop)
