"""What others may do with an engine while its step waits for a batch."""

import asyncio
import threading
import time

import pytest

from shared.blocks import PAGE_TOKENS, key_chain, name_of, root_hash, token_ids
from shared.engine.fake import fake_engine
from shared.worker.engine_thread import EngineThread
from tests.engine_driver import greedy, request

PROMPT = token_ids(range(2 * PAGE_TOKENS + 1))


class GatedEngine:
    """An engine whose batches are done when the gate is open."""

    def __init__(self):
        self.engine = fake_engine()
        self.gate = threading.Event()
        self.gate.set()
        self.num_waiting = 0
        compute = self.engine._runner.compute

        def gated(launched):
            self.num_waiting += 1
            assert self.gate.wait(20)
            return compute(launched)

        self.engine._runner.compute = gated
        root = root_hash(self.engine.model.fingerprint, "")
        self.names = [name_of(key) for key in key_chain(root, PROMPT)]


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def take_token(thread):
    async with asyncio.timeout(10):
        while True:
            step = await thread.steps.get()
            thread.handled()
            if step.output.tokens:
                return


async def handle_for_ever(thread):
    while True:
        await thread.steps.get()
        thread.handled()


async def test_pages_are_lent_while_a_step_waits_for_its_batch():
    gated = GatedEngine()
    thread = EngineThread(gated.engine, time.monotonic)
    with thread.running():
        await thread.call(lambda engine: engine.add(request("a", PROMPT, greedy(1))))
        await take_token(thread)
        gated.gate.clear()
        before = gated.num_waiting
        await thread.call(lambda engine: engine.add(request("b", token_ids(range(500, 540)), greedy(1))))
        await until(lambda: gated.num_waiting > before)
        behind = thread.call(lambda engine: engine.stats())
        async with asyncio.timeout(5):
            loan = await thread.call_beside(lambda engine: engine.lend(gated.names))
        assert len(loan.pages) == 2
        assert not behind.done()
        gated.gate.set()
        await take_token(thread)
        assert (await behind).num_free_pages < 64
        await thread.call_beside(lambda engine: engine.give_back(loan))
        await until(lambda: thread.stats.num_free_pages == 64)
        gated.engine.check()


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_whoever_lends_beside_steps_wakes_an_engine_that_has_work_by_that(is_awaited):
    gated = GatedEngine()
    thread = EngineThread(gated.engine, time.monotonic)
    with thread.running():
        await thread.call(lambda engine: engine.add(request("a", PROMPT, greedy(1))))
        await take_token(thread)
        loan = await thread.call(lambda engine: engine.lend(gated.names))
        whole = token_ids([7] * (63 * PAGE_TOKENS))
        await thread.call(lambda engine: engine.add(request("b", whole, greedy(1))))
        await asyncio.sleep(0.02)
        assert thread.steps.empty()
        begun, may_go_on = threading.Event(), threading.Event()

        def give_back(engine):
            begun.set()
            may_go_on.wait(5)
            engine.give_back(loan)

        asked = asyncio.create_task(thread.call_beside(give_back))
        await until(begun.is_set)
        if not is_awaited:
            asked.cancel()
        may_go_on.set()
        await asyncio.gather(asked, return_exceptions=True)
        await take_token(thread)


async def test_many_lend_at_once_beside_steps():
    gated = GatedEngine()
    thread = EngineThread(gated.engine, time.monotonic)

    async def lend_often():
        for _ in range(50):
            loan = await thread.call_beside(lambda engine: engine.lend(gated.names))
            await thread.call_beside(lambda engine, loan=loan: engine.give_back(loan))

    with thread.running():
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(lend_often())
            for index in range(20):
                ids = token_ids([*PROMPT, index])
                await thread.call(lambda engine, ids=ids, key=f"r{index}": engine.add(request(key, ids, greedy(1))))
                await take_token(thread)
        await until(lambda: thread.stats.num_free_pages == 64)
        await thread.call(lambda engine: engine.check())


async def test_an_error_beside_a_step_is_the_callers():
    thread = EngineThread(fake_engine(), time.monotonic)
    with thread.running():
        loan = await thread.call(lambda engine: engine.lend([]))
        await thread.call(lambda engine: engine.give_back(loan))
        with pytest.raises(KeyError):
            await thread.call_beside(lambda engine: engine.give_back(loan))
        assert await thread.call_beside(lambda engine: len(engine.lend([]).pages)) == 0


async def test_an_engine_whose_steps_follow_each_other_without_a_pause_lends_all_the_same():
    engine = fake_engine()
    step, num_steps = engine.step, 0

    def step_that_computes_at_once():
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.01)
        return step()

    engine.step = step_that_computes_at_once
    thread = EngineThread(engine, time.monotonic)
    with thread.running():
        await thread.call(lambda engine: engine.add(request("a", PROMPT, greedy(2000, ignore_eos=True))))
        await take_token(thread)
        handling = asyncio.create_task(handle_for_ever(thread))
        num_waited = 0
        for _ in range(20):
            await asyncio.sleep(0.004)
            before = num_steps
            await thread.call_beside(lambda engine: engine.lend([]))
            num_waited += num_steps - before
        assert num_waited < 60, "each waits for the step that runs, and perhaps for one that began before it could ask"
        handling.cancel()
