"""`python -m benchmarks.kv_transfer.ends JOB`: one process of the measurement, the source or the puller.

With a shape both have an engine, whose pages travel; else pages with random contents, the same in both processes, so
that the puller can tell whether what came is what was sent.
"""

import asyncio
import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
import uvloop

from benchmarks.kv_transfer.engines import EngineUnderTest
from benchmarks.kv_transfer.formats import format_times
from benchmarks.kv_transfer.pair import obey
from benchmarks.kv_transfer.sides import SEED, Pages, Puller, Source, shuffled
from benchmarks.kv_transfer.trace import Trace
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.worker.process import SWITCH_INTERVAL_S

LAYOUTS = {
    "cuda": KvLayout(model_fingerprint="random", num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    "cpu": KvLayout(model_fingerprint="random", num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16"),
}
"""By device: Llama 3.1 8B, and one of which a CPU copies as many pages."""


class Process:
    """What either is asked to do."""

    def __init__(self, end: str, pages: Pages) -> None:
        self._trace = Trace(end)
        self._watching = ExitStack()
        self._pages = pages

    async def page_bytes(self) -> int:
        return self._pages.cache.layout.page_bytes

    async def idle(self, *, seconds: float) -> float:
        """Percent of one core that this process takes while it does nothing."""
        began_s, used_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        return 100 * (time.process_time() - used_s) / (time.perf_counter() - began_s)

    async def watch(self) -> None:
        """Trace what happens from now on."""
        self._trace.events.clear()
        self._watching.enter_context(self._trace.watch())

    async def watched(self) -> list[dict[str, object]]:
        """End tracing: the events."""
        self._watching.close()
        return self._trace.as_json()

    async def formats(self, *, num_pages: int, repeats: int) -> list[dict[str, Any]]:
        return format_times(self._pages.cache, shuffled(self._pages.pages, SEED)[:num_pages], repeats)


async def run(end: str, device: str, num_pages: int, shape: str | None = None, batch_tokens: int = 0) -> None:
    """Serve the parent until it closes stdin. `num_pages` may travel, beside what an engine of `shape` needs."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    commands: dict[str, Any] = {}
    lifetime = ExitStack()
    with lifetime:
        if shape is None:
            pages = Pages(PagedCache(LAYOUTS[device], num_pages, torch.device(device)), range(num_pages))
            pages.fill()
        else:
            engine = EngineUnderTest(shape, device, batch_tokens=batch_tokens, num_travelling=num_pages)
            pages = Pages(engine.cache, engine.travelling)
            lifetime.enter_context(engine.running())
            commands |= {"decode": engine.decode, "prefill": engine.prefill, "describe": engine.describe}
        pages.settle()
        staging = Staging(pages.cache, os.environ)
        await staging.warm_up()
        async with (
            UcxContext() as context,
            UcxTransfer(context, staging, incarnation=Incarnation(end), clock=time.monotonic) as transfer,
        ):
            for member in (Source if end == "source" else Puller)(pages, transfer), Process(end, pages):
                commands |= {name: getattr(member, name) for name in vars(type(member)) if not name.startswith("_")}
            await obey(commands)


if __name__ == "__main__":
    uvloop.run(run(**json.loads(sys.argv[1])))
