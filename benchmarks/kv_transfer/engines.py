"""An engine as a worker runs it, in a thread beside the event loop, whose pages travel meanwhile."""

import asyncio
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from benchmarks.engine.build import SPEED_WEIGHTS, BenchPlan, settle_memory, start_engine
from benchmarks.engine.drive import DecodeRows, Work, greedy
from shared.blocks import PAGE_TOKENS, pages_for
from shared.engine.port import Engine, EngineRequest
from shared.kv.paged_cache import PagedCache
from shared.worker.engine_thread import EngineThread, Step

NUM_WARM_STEPS = 8
MAX_ROWS = 64
MAX_TOKENS = 1536
"""Rows and tokens a row of the largest decode batch."""


class EngineUnderTest:
    """One engine; `decode` and `prefill` do one measurement each and leave nothing behind.

    Attributes:
        travelling: pages that are the transfer's alone.
    """

    def __init__(self, shape: str, device: str, *, batch_tokens: int, num_travelling: int) -> None:
        """Build it, which takes a while. Needs a running event loop. `batch_tokens`: of a step at most."""
        on_cuda = device == "cuda"
        plan = BenchPlan(
            device=device,
            dtype="bfloat16" if on_cuda else "float32",
            runner="triton" if on_cuda else "torch",
            num_pages=num_travelling + MAX_ROWS * (pages_for(MAX_TOKENS) if on_cuda else 2) + 64,
            max_running=MAX_ROWS + 1,
            max_batch_tokens=batch_tokens,
        )
        self._built, self._start = start_engine(shape, plan, SPEED_WEIGHTS)
        engine = self._built.engine
        self._work = Work(engine.model.vocab_size, seed=1)
        self.cache: PagedCache = engine.cache
        self.travelling = self._set_apart(engine, num_travelling)
        self._thread = EngineThread(engine, time.perf_counter)
        settle_memory()

    @contextmanager
    def running(self) -> Generator[None]:
        with self._thread.running():
            yield

    async def describe(self) -> dict[str, Any]:
        return {"runs": self._built.runs, "ready_s": self._start.weights_s + self._start.ready_s}

    async def decode(self, *, batch: int, context: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` full steps of `batch` rows from `context` on, some warm-up steps left out."""
        num_tokens = NUM_WARM_STEPS + steps + 8

        def begin(engine: Engine) -> DecodeRows:
            return DecodeRows(engine, self._work, batch, context, greedy(num_tokens))

        rows = await self._thread.call(begin)
        ended_s: list[float] = []
        while len(ended_s) <= NUM_WARM_STEPS + steps:
            step = await self._next_step()
            if len(step.output.tokens) == batch:
                ended_s.append(step.ended_s)
        await self._thread.call(lambda _: rows.close())
        await self._drain()
        measured_s = ended_s[NUM_WARM_STEPS:]
        return [1e3 * (after - before) for before, after in pairwise(measured_s)]

    async def prefill(self, *, num_tokens: int, number: int) -> list[float]:
        """Milliseconds between the first tokens of `number` prompts that wait one behind another, the first left out.

        A prompt of as many tokens as a step has at most is one step.
        """
        requests = self._work.requests(number + 2, num_tokens, greedy(1))
        await self._thread.call(lambda engine: [engine.add(request) for request in requests])
        ended_s: list[float] = []
        while len(ended_s) < len(requests):
            step = await self._next_step()
            ended_s += [step.ended_s] * len(step.output.tokens)
        await self._drain()
        measured_s = ended_s[1:]
        return [1e3 * (after - before) for before, after in pairwise(measured_s)]

    async def _next_step(self) -> Step:
        step_coming = asyncio.ensure_future(self._thread.steps.get())
        await asyncio.wait({step_coming, self._thread.failed}, return_when=asyncio.FIRST_COMPLETED)
        if not step_coming.done():
            step_coming.cancel()
            self._thread.failed.result()
        self._thread.handled()
        return step_coming.result()

    async def _drain(self) -> None:
        """Until the engine has nothing to do, and nobody's steps wait."""
        while await self._thread.call(lambda engine: engine.has_work()) or not self._thread.steps.empty():
            while not self._thread.steps.empty():
                self._thread.steps.get_nowait()
                self._thread.handled()
            await asyncio.sleep(0)

    def _set_apart(self, engine: Engine, num_pages: int) -> Sequence[int]:
        """Pages of a request that never comes to run."""
        request = EngineRequest(
            key="travelling",
            ids=self._work.prompt(num_pages * PAGE_TOKENS),
            prompt_len=num_pages * PAGE_TOKENS,
            sampling=greedy(2),
        )
        reservation = engine.reserve(request)
        assert reservation is not None, "the engine has pages for it"
        return reservation.pages[:num_pages]
