"""A worker on the real Kafka, Redis and UCX whose answers can be checked by hand, and tell who made them.

`python -m tests.faults.salted_worker prefill|decode`, with a worker's BATON_* settings and those below;
BATON_MODEL is a folder of `tests.fake_tokeniser.write_fake_model`.
"""

import asyncio
import sys
from functools import partial
from pathlib import Path

from pydantic import Field

from services.decode.role import DecodeRole
from services.ingest.admission import ModelFacts
from services.prefill.role import PrefillRole
from shared.engine.engine import PagedEngine
from shared.engine.fake import Pace, fake_engine, fake_model
from shared.runtime.run import run
from shared.state.port import Role
from shared.worker.process import serve_worker
from shared.worker.role import WorkerContext
from shared.worker.settings import WorkerSettings


class SaltedSettings(WorkerSettings):
    """BATON_* settings of a worker with the fake engine.

    Attributes:
        fake_salted: tokens depend on the placement; else an answer is that of `fake_answer`, whoever makes it.
        fake_step_s: a step takes so long, whatever is in it; the CPU's work is on top only where it takes longer.
    """

    fake_salted: bool = True
    fake_step_s: float = Field(default=0.0, ge=0)


def build_engine(settings: SaltedSettings) -> PagedEngine:
    """The fake engine that the settings describe."""
    assert settings.num_pages is not None
    facts = ModelFacts.load(Path(settings.model), settings.served_model)
    model = fake_model(settings.served_model, vocab_size=facts.vocab_size)
    return fake_engine(
        model=model,
        num_pages=settings.num_pages,
        max_context=facts.max_context,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        num_host_pages=int(settings.host_cache_gb * 1e9) // model.layout.page_bytes,
        salted=settings.fake_salted,
        pace=Pace(settings.fake_step_s) if settings.fake_step_s else None,
    )


async def serve(role_name: Role, settings: SaltedSettings, stop: asyncio.Event) -> None:
    """Run the worker until `stop` is set."""

    def make_role(context: WorkerContext) -> PrefillRole | DecodeRole:
        if role_name is Role.PREFILL:
            return PrefillRole(context, hold_s=settings.hold_s)
        return DecodeRole(context, pull_timeout_s=settings.pull_timeout_s)

    await serve_worker(role_name, make_role, settings, stop, build=lambda _: build_engine(settings))


def work(role_name: str) -> None:
    """This process's life."""
    run(role_name, SaltedSettings.read, partial(serve, Role(role_name)))


if __name__ == "__main__":
    work(sys.argv[1])
