"""Workers tell which blocks they hold while they work, not only when they pause."""

import asyncio
import time

from shared.engine.fake import fake_engine
from shared.state.memory import MemoryState
from shared.state.port import Role
from tests.flow.system import MODEL, System

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
