"""`python -m benchmarks.prefix_fetch.ends JOB`: one worker of the measurement, as far as prompts concern it."""

import asyncio
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import structlog
import uvloop
from prometheus_client import CollectorRegistry

from benchmarks.engine.build import TOKEN_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.drive import greedy
from benchmarks.kv_transfer.pair import obey
from shared.blocks import PAGE_TOKENS, TokenIds, token_ids
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest
from shared.observe.metrics import PrefixFetch, WorkerMetrics
from shared.request import Incarnation, WorkerRef
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.to_worker import FetchTicket
from shared.worker.engine_thread import EngineThread
from shared.worker.lending import EngineLender
from shared.worker.prefixes import Prefixes
from shared.worker.process import SWITCH_INTERVAL_S
from shared.worker.role import WorkerContext

MODEL = "random"
BUSY_SEED = 10**6
"""Of the prompts that keep an engine busy, counted from here on."""


class End:
    """What either worker is asked to do."""

    def __init__(
        self, engine: PagedEngine, thread: EngineThread, transfer: UcxTransfer, tasks: asyncio.TaskGroup, end: str
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._transfer = transfer
        self._tasks = tasks
        self._metrics = WorkerMetrics(CollectorRegistry(), MODEL)
        transfer.lend_from(EngineLender(thread, self._metrics))
        self._prefixes = Prefixes(self._context(Incarnation(end)))
        self._tokens: dict[str, asyncio.Future[tuple[float, int]]] = {}
        self._num_asked = 0
        self._busy: asyncio.Task[None] | None = None
        self._taking = tasks.create_task(self._take_steps())

    def _context(self, incarnation: Incarnation) -> WorkerContext:
        """The parts of a worker's that `Prefixes` uses."""
        context = SimpleNamespace(
            me=WorkerRef(0, incarnation),
            engine=self._thread,
            transfer=self._transfer,
            page_bytes=self._engine.model.layout.page_bytes,
            metrics=self._metrics,
            log=structlog.get_logger(),
            clock_s=time.perf_counter,
            profile=lambda: None,
            tasks=self._tasks,
        )
        return cast("WorkerContext", context)

    async def where(self) -> str:
        return self._transfer.address

    async def page_bytes(self) -> int:
        return self._engine.model.layout.page_bytes

    async def connect(self, *, address: str) -> dict[str, Any]:
        report = await self._transfer.connect(address, Incarnation("source"))
        speed = report.speed
        return {"transport": report.transport, "gb_per_s": speed.bytes_per_s / 1e9 if speed else None}

    async def compute(self, *, seed: int, num_tokens: int) -> tuple[float, int]:
        """Milliseconds until the token behind a prompt, and the token."""
        return await self._first_token(seed, num_tokens, None)

    async def fetch(self, *, address: str, seed: int, num_tokens: int, num_pages: int) -> tuple[float, int]:
        """The same where the first pages come from the source. Raises RuntimeError if they did not."""
        whole = self._metrics.prefix_fetches.labels(MODEL, PrefixFetch.WHOLE)
        before = whole._value.get()  # noqa: SLF001 - nothing public reads a counter
        ticket = FetchTicket(WorkerRef(1, Incarnation("source")), address, num_pages)
        told = await self._first_token(seed, num_tokens, ticket)
        if whole._value.get() != before + 1:  # noqa: SLF001 - as above
            raise RuntimeError(f"{num_pages} pages did not all come")
        return told

    async def fetched_s(self) -> tuple[float, float]:
        """Seconds and bytes of all fetches so far."""
        metrics = self._metrics
        return metrics.prefix_fetch_seconds._sum.get(), metrics.prefix_fetch_bytes._value.get()  # noqa: SLF001 - as above

    async def be_busy(self, *, num_tokens: int) -> None:
        """Compute prompts of so many tokens one after the other, until `rest`."""
        self._busy = self._tasks.create_task(self._compute_on(num_tokens))

    async def rest(self) -> None:
        busy, self._busy = self._busy, None
        if busy is not None:
            await busy

    async def close(self) -> None:
        self._taking.cancel()

    async def _compute_on(self, num_tokens: int) -> None:
        """Two at a time, so that the engine never waits for the loop."""
        seed = BUSY_SEED
        coming = {asyncio.ensure_future(self._first_token(seed + index, num_tokens, None)) for index in range(2)}
        while coming:
            done, coming = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
                seed += 2
                if self._busy is not None:
                    coming.add(asyncio.ensure_future(self._first_token(seed, num_tokens, None)))

    async def _first_token(self, seed: int, num_tokens: int, ticket: FetchTicket | None) -> tuple[float, int]:
        self._num_asked += 1
        key = f"r{self._num_asked}"
        made = self._tokens[key] = asyncio.get_running_loop().create_future()
        request = EngineRequest(key, self._prompt(seed, num_tokens), num_tokens, greedy(1))
        began_s = time.perf_counter()
        await self._prefixes.add(request, ticket)
        ended_s, token_id = await made
        return 1e3 * (ended_s - began_s), token_id

    def _prompt(self, seed: int, num_tokens: int) -> TokenIds:
        """The same in both processes; another begins otherwise."""
        vocab_size = self._engine.model.vocab_size
        longest = np.random.default_rng(seed).integers(0, vocab_size, self._engine.limits.max_context, dtype=np.int32)
        return token_ids(longest[:num_tokens].tolist())

    async def _take_steps(self) -> None:
        while True:
            step = await self._thread.steps.get()
            for token in step.output.tokens:
                self._tokens.pop(token.key).set_result((step.ended_s, token.token_id))
            self._thread.handled()


async def run(end: str, device: str, shape: str, longest: int, batch_tokens: int) -> None:
    """Serve the parent until it closes stdin. `longest`: tokens of the longest prompt."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    on_cuda = device == "cuda"
    plan = BenchPlan(
        device=device,
        dtype="bfloat16" if on_cuda else "float32",
        runner="triton" if on_cuda else "torch",
        num_pages=4 * (longest // PAGE_TOKENS + 2),
        max_running=8,
        max_batch_tokens=batch_tokens,
    )
    built, _ = start_engine(shape, plan, TOKEN_WEIGHTS)
    engine = built.engine
    thread = EngineThread(engine, time.perf_counter)
    staging = Staging(engine.cache, os.environ)
    await staging.warm_up()
    with thread.running():
        async with (
            UcxContext() as context,
            UcxTransfer(context, staging, incarnation=Incarnation(end), clock=time.monotonic) as transfer,
            asyncio.TaskGroup() as tasks,
        ):
            commands = End(engine, thread, transfer, tasks, end)
            names = [name for name in vars(End) if not name.startswith("_") and name != "close"]
            await obey({name: getattr(commands, name) for name in names})
            await commands.close()


if __name__ == "__main__":
    uvloop.run(run(**json.loads(sys.argv[1])))
