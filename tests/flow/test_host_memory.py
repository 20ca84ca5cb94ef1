"""Workers whose GPU is too small for what comes back, with host memory for it, through all services."""

import asyncio
from functools import partial

from services.ingest.jobs import DEFAULT_TENANT
from shared.blocks import PAGE_TOKENS, hash_chain, root_hash, token_ids
from shared.engine.fake import fake_engine
from shared.observe.metrics import PrefixFetch
from tests.flow.test_prefix_fetch import FIRST, NUM_PAGES, SECOND, a_cluster, fetches
from tests.flow.test_prefix_fetch import run as run_there
from tests.flow.test_whole import a_body, a_system, answer, expected
from tests.late_host_pages import LateHostPages


def small_engine():
    """Two conversations fill its pages, a third one drives them out."""
    late = partial(LateHostPages, max_looks=2)
    return fake_engine(num_pages=12, num_host_pages=64, max_batch_tokens=512, host_pages=late)


async def saved(worker, num_blocks):
    """Wait until so many blocks have copies; an idle worker goes on with them when it announces its blocks."""
    async with asyncio.timeout(15):
        while worker.engine.stats().num_host_pages < num_blocks:
            await asyncio.sleep(0.01)


async def test_conversations_go_on_where_their_history_is():
    async with a_system(prefills=1, decodes=1, make_engine=small_engine) as system:
        prefill, decode = system.workers
        histories = [[100 * talk + number % 90 for number in range(150)] for talk in range(1, 5)]
        cached = []
        for turn in range(3):
            for history in histories:
                state = await system.ended(await system.submit(a_body(history, 70)))
                assert answer(state) == expected(history, 70)
                cached.append(state.choice(0).num_cached_tokens)
                history += [*answer(state), 7 + turn]
            await saved(decode, 8)
        assert cached[:4] == [0] * 4
        assert min(cached[4:]) >= 2 * PAGE_TOKENS, "the prompt before, at the least"
        for worker in (prefill, decode):
            assert worker.engine.stats().num_host_hits > 0
        await system.quiet()


async def test_ingest_learns_what_is_in_host_memory_alone():
    async with a_system(prefills=1, decodes=1, make_engine=small_engine) as system:
        prefill, holders = system.workers[0], system.ingests[0].service._cluster.holders
        prompts = [[number, *range(20, 20 + 5 * PAGE_TOKENS)] for number in range(4)]
        for number, prompt in enumerate(prompts, start=1):
            await system.ended(await system.submit(a_body(prompt, 3)))
            await saved(prefill, 5 * number)
        root = root_hash(prefill.engine.model.fingerprint, system.cache_salt.of(DEFAULT_TENANT))
        blocks = hash_chain(root, token_ids(prompts[0]))
        async with asyncio.timeout(15):
            while holders.overlap(prefill.incarnation, blocks) != (0, len(blocks)):
                await asyncio.sleep(0.01)


async def test_a_peer_fetches_what_is_in_host_memory_alone(monkeypatch):
    async with a_cluster(monkeypatch, make_engine=small_engine) as system:
        first, second, decode, _ = system.workers
        await system.brain.next(first, decode)
        await run_there(system, FIRST)
        for number in range(1, 4):
            await saved(first, NUM_PAGES * number)
            await run_there(system, [500 + number, *range(100, 100 + NUM_PAGES * PAGE_TOKENS)])
        assert first.engine.stats().num_lost_blocks == 0
        await system.brain.next(second, decode, source=first)
        await run_there(system, SECOND)
        assert fetches(second) == {PrefixFetch.WHOLE: 1}
        assert first.engine.stats().num_host_hits > 0
        assert second.engine.stats().num_prefix_hits == NUM_PAGES * PAGE_TOKENS
        await system.quiet()
