"""Workers tell which blocks they hold while they work, not only when they pause."""

import asyncio
import time

from services.ingest.jobs import DEFAULT_TENANT
from shared.blocks import hash_chain, root_hash, token_ids
from shared.engine.fake import fake_engine
from shared.state.memory import Answer, MemoryState
from shared.state.port import Role
from tests.flow.system import MODEL, System
from tests.flow.test_whole import a_body, a_system

STEP_S = 0.02


def busy_engine():
    """Its steps follow each other without a pause and take almost all of the time."""
    engine = fake_engine()
    step = engine.step

    def slow_step():
        time.sleep(STEP_S)
        return step()

    engine.step = slow_step
    return engine


async def read_all(state, incarnation):
    """All that stands in the feed of a worker."""
    entries, cursor = [], "0"
    while found := await state.read_block_feeds({incarnation: cursor}):
        entries += found
        cursor = found[-1].cursor
    return entries


async def test_whoever_lost_track_is_told_the_full_list():
    async with a_system(prefills=1, decodes=1) as system:
        decode = system.workers[-1]
        await system.ended(await system.submit(a_body(list(range(10, 210)), 5)))
        state = MemoryState(system.store)
        async with asyncio.timeout(15):
            while sum(len(entry.news.stored) for entry in await read_all(state, decode.incarnation)) < 3:
                await asyncio.sleep(0.01)
            last = (await read_all(state, decode.incarnation))[-1].sequence
            await state.ask_for_blocks(decode.incarnation)
            while (entries := await read_all(state, decode.incarnation))[0].sequence <= last:
                await asyncio.sleep(0.01)
            assert entries[0].news.is_full
            assert len(entries[0].news.stored) == 3
            await system.ended(await system.submit(a_body(list(range(500, 700)), 5)))
            while len(entries := await read_all(state, decode.incarnation)) < 2:
                await asyncio.sleep(0.01)
        assert not entries[-1].news.is_full, "asked once, told once"


async def test_a_worker_without_a_pause_announces_its_blocks():
    system = System(make_engine=busy_engine)
    try:
        await system.start(decodes=1)
        decode = system.workers[-1]
        body = {"model": MODEL, "prompt": list(range(10, 210)), "max_tokens": 1000, "temperature": 0}
        job = await system.submit(body | {"ignore_eos": True})
        state = MemoryState(system.store)
        async with asyncio.timeout(15):
            while not await state.read_block_feeds({decode.incarnation: "0"}):
                await asyncio.sleep(0.05)
        assert decode.name.startswith(Role.DECODE)
        assert not system.folded(job).finished
    finally:
        await system.close()


async def test_news_that_the_store_did_not_take_are_told_again_though_nothing_follows():
    async with a_system(prefills=1, decodes=1) as system:
        prefill, holders = system.workers[0], system.ingests[0].service._cluster.holders

        async def known(prompt):
            root = root_hash(prefill.engine.model.fingerprint, system.cache_salt.of(DEFAULT_TENANT))
            blocks = list(hash_chain(root, token_ids(prompt)))
            async with asyncio.timeout(5):
                while holders.overlap(prefill.incarnation, blocks)[0] < len(blocks):
                    await asyncio.sleep(0.01)

        prompts = [list(range(start, start + 200)) for start in (10, 300)]
        await system.ended(await system.submit(a_body(prompts[0], 5)))
        await known(prompts[0])
        while system.store.wants_blocks(prefill.incarnation):
            await asyncio.sleep(0.01)
        system.store.answer = lambda name: Answer.REFUSED if name == "announce_blocks" else Answer.GIVEN
        num_before = prefill.service._news.num_announced
        await system.ended(await system.submit(a_body(prompts[1], 5)))
        while prefill.service._news.num_announced == num_before:
            await asyncio.sleep(0.01)
        system.store.answer = lambda _: Answer.GIVEN
        for prompt in prompts:
            await known(prompt)
