"""Peers that fetch, beside an engine that computes on its own thread and has host memory."""

import asyncio
import random
import time
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
from prometheus_client import CollectorRegistry

from shared.blocks import PAGE_TOKENS, key_chain, name_of, root_hash, token_ids
from shared.engine.fake import Pace, fake_answer, fake_engine
from shared.observe.metrics import WorkerMetrics
from shared.worker.engine_thread import EngineThread
from shared.worker.lending import EngineLender
from tests.engine_driver import greedy, request
from tests.late_host_pages import LateHostPages

NUM_PAGES = 14
ONE_TOKEN = greedy(1, ignore_eos=True)


def a_prompt(family, num_blocks):
    return token_ids(3 + (7 * family + place) % 200 for place in range(num_blocks * PAGE_TOKENS + 9))


PROMPTS = [a_prompt(family, num_blocks) for family, num_blocks in enumerate((1, 2, 3, 4, 5, 2, 3))]


class Scene:
    """One worker's engine, and who asks it."""

    def __init__(self):
        late = partial(LateHostPages, max_looks=3)
        self.engine = fake_engine(
            num_pages=NUM_PAGES, num_host_pages=24, max_running=4, max_batch_tokens=96, host_pages=late, pace=Pace(1e-3)
        )
        self.thread = EngineThread(self.engine, time.monotonic)
        self.metrics = WorkerMetrics(CollectorRegistry(), "m")
        self.lender = EngineLender(self.thread, self.metrics)
        self.answered = defaultdict(asyncio.Event)
        self.answers = {}

    async def handle(self):
        while True:
            step = await self.thread.steps.get()
            for token in step.output.tokens:
                self.answers[token.key] = token.token_id
                self.answered[token.key].set()
            self.thread.handled()

    async def serve(self, key, prompt):
        await self.thread.call(lambda engine: engine.add(request(key, prompt, ONE_TOKEN)))
        async with asyncio.timeout(30):
            await self.answered[key].wait()
        assert [self.answers[key]] == fake_answer(prompt, len(prompt), ONE_TOKEN)

    async def fetch(self, prompt):
        """As a peer: look at what is lent, now and a little later."""
        keys = key_chain(root_hash(self.engine.model.fingerprint, ""), prompt)
        loan = await self.lender.lend(list(map(name_of, keys)))
        try:
            assert loan.keys == tuple(keys[: len(loan.pages)])
            for wait_s in (0.0, 0.003):
                await asyncio.sleep(wait_s)
                lent = self.engine.cache.pages[list(loan.pages), 0, 0, :, 0, 0].flatten().tolist()
                assert lent == prompt[: len(loan.pages) * PAGE_TOKENS].tolist()
        finally:
            self.lender.give_back(loan)
        return len(loan.pages)

    async def all_free(self):
        async with asyncio.timeout(10):
            while (await self.thread.call(self.looked_at)).num_free_pages < NUM_PAGES:
                await asyncio.sleep(0.005)

    def looked_at(self, engine):
        engine.take_block_changes()
        engine.check()
        return engine.stats()


@asynccontextmanager
async def a_scene():
    scene = Scene()
    with scene.thread.running():
        handling = asyncio.create_task(scene.handle())
        yield scene
        await scene.all_free()
        handling.cancel()


async def test_what_is_in_host_memory_alone_is_brought_and_lent():
    async with a_scene() as scene:
        for number, prompt in enumerate(PROMPTS):
            await scene.serve(str(number), prompt)
            await scene.all_free()
        before = await scene.thread.call(scene.looked_at)
        num_lent = [await scene.fetch(prompt) for prompt in PROMPTS]
        after = await scene.thread.call(scene.looked_at)
        assert after.num_restored_bytes > before.num_restored_bytes
        assert scene.metrics.lent_pages._value.get() == sum(num_lent)


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_computes_fetches_and_gives_up_at_once_gets_what_is_right_and_leaves_nothing(seed):
    rng = random.Random(seed)

    async def compute(name):
        for number in range(12):
            await scene.serve(f"{name}.{number}", rng.choice(PROMPTS))

    async def fetch():
        for _ in range(12):
            fetching = asyncio.create_task(scene.fetch(rng.choice(PROMPTS)))
            if rng.random() < 0.3:
                await asyncio.sleep(0.005 * rng.random())
                fetching.cancel()
            with suppress(asyncio.CancelledError):
                await fetching

    async with a_scene() as scene, asyncio.TaskGroup() as tasks:
        for name in range(3):
            tasks.create_task(compute(name))
            tasks.create_task(fetch())
