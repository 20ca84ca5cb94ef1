"""An engine that computes nothing: its steps sleep, so that what is left is the path. `--fake-step-ms` asks for it.

`python -m benchmarks.control_plane.paced prefill|decode MILLISECONDS` is a worker with it.
"""

import asyncio
import sys
import time
from functools import partial

import torch

from services.decode.role import DecodeRole
from services.prefill.role import PrefillRole
from shared.engine.batch import BatchRow, Done, Sampled
from shared.engine.engine import PagedEngine
from shared.engine.layer_marks import LayerMarks
from shared.engine.port import EngineLimits, EngineModel
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.runtime.run import run
from shared.state.port import Role
from shared.text.tokeniser import Tokeniser
from shared.worker.process import serve_worker
from shared.worker.role import WorkerContext
from shared.worker.settings import WorkerSettings

FIRST_WORD = 1000
NUM_WORDS = 1000
"""Tokens of the answers: ordinary words, in all byte-level vocabularies that were looked at."""

MAX_CONTEXT = 8192


class PacedRunner:
    """`shared.engine.batch.Runner` whose every step takes `step_s`, without the interpreter's lock."""

    def __init__(self, layout: KvLayout, num_pages: int, step_s: float) -> None:
        self._cache = PagedCache(layout, num_pages, torch.device("cpu"))
        self._step_s = step_s

    @property
    def cache(self) -> PagedCache:
        return self._cache

    @property
    def num_ahead(self) -> int:
        return 0

    def launch(
        self,
        rows: tuple[BatchRow, ...],
        layers: LayerMarks | None = None,  # noqa: ARG002 - all its layers are done at one moment, as in a graph
    ) -> Done:
        time.sleep(self._step_s)
        return Done([Sampled(FIRST_WORD + row.end % NUM_WORDS) if row.sample else None for row in rows])


def paced_engine(settings: WorkerSettings, step_ms: float) -> PagedEngine:
    """An engine over a PacedRunner that passes for the model of `settings`."""
    name = f"paced-{step_ms:g}ms"
    layout = KvLayout(model_fingerprint=name, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")
    tokeniser = Tokeniser.load(settings.model)
    return PagedEngine(
        PacedRunner(layout, settings.num_pages, step_ms / 1000),
        EngineModel(settings.served_model, name, tokeniser.vocab_size, tokeniser.eos_ids, layout),
        EngineLimits(MAX_CONTEXT, settings.num_pages, settings.max_running, settings.max_batch_tokens),
    )


async def serve(step_ms: float, role_name: Role, settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Run the worker until `stop` is set."""

    def make_role(context: WorkerContext) -> PrefillRole | DecodeRole:
        if role_name is Role.PREFILL:
            return PrefillRole(context, hold_s=settings.hold_s)
        return DecodeRole(context, pull_timeout_s=settings.pull_timeout_s)

    await serve_worker(role_name, make_role, settings, stop, build=partial(paced_engine, step_ms=step_ms))


def main() -> None:
    role_name, step_ms = Role(sys.argv[1]), float(sys.argv[2])
    run(role_name, WorkerSettings.read, partial(serve, step_ms, role_name))


if __name__ == "__main__":
    main()
