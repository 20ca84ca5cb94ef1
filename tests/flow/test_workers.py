"""Workers at the edges of their life: before they are open, while they leave, and when a step never ends."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from shared.engine.fake import fake_engine
from shared.engine.port import StepOutput
from shared.errors import StepHangs
from shared.state import keys
from shared.state.port import Role
from shared.worker.host import WorkerLimits
from tests.flow.system import System
from tests.flow.test_whole import a_body, a_system


@contextlib.asynccontextmanager
async def an_empty_system(**settings):
    system = System(**settings)
    try:
        yield system
    finally:
        await system.close()


async def live_workers(system):
    return await system.ingests[0].service._state.workers(num_slots=8)


async def test_a_worker_with_nothing_to_do_leaves_at_once():
    async with a_system(drain_s=60.0) as system:
        await system.ended(await system.submit(a_body()))
        async with asyncio.timeout(5):
            await asyncio.gather(*(worker.leave() for worker in system.workers))


async def test_a_worker_holds_its_slot_and_can_leave_while_it_waits_for_the_log():
    async with an_empty_system() as system:
        await system.start_ingest()
        system.log.away = True
        waiting, leaving = [await system.start_worker(Role.DECODE) for _ in range(2)]
        while len(found := await live_workers(system)) < 2:
            await asyncio.sleep(0.01)
        assert all(worker.load.draining for worker in found)
        async with asyncio.timeout(5):
            await leaving.leave()
        assert [worker.card.incarnation for worker in await live_workers(system)] == [waiting.incarnation]
        system.log.away = False
        async with asyncio.timeout(5):
            await waiting.until_ready()
        assert not (await live_workers(system))[0].load.draining, "told at once"


async def test_a_worker_can_leave_while_it_waits_for_a_slot(monkeypatch):
    monkeypatch.setattr("shared.worker.host.NUM_SLOTS", 1)
    async with an_empty_system() as system:
        await (await system.start_worker(Role.DECODE)).until_ready()
        waiting = await system.start_worker(Role.DECODE)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            await waiting.leave()


async def test_a_worker_that_drains_is_not_ready_from_the_first_moment_and_lives_on():
    async with a_system(drain_s=30.0, decodes=1) as system:
        job = await system.submit(a_body(num_new=400))
        while (state := system.folded(job)) is None or len(state.choice(0).ids) < 5:
            await asyncio.sleep(0.001)
        decode = system.workers[-1]
        assert all((await decode.service.ready()).values())
        leaving = asyncio.create_task(decode.leave())
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            while (await decode.service.ready())["slot"]:
                await asyncio.sleep(0.001)
        assert not leaving.done(), "it works on at what it has"
        assert len((await system.ended(job)).choice(0).ids) == 400
        async with asyncio.timeout(5):
            await leaving


async def test_a_worker_whom_the_log_answers_nothing_says_so_and_takes_work_again_after_it():
    async with a_system(prefills=1, decodes=1) as system:
        decode = system.workers[-1]
        silent_s = [keys.LEASE_MS / 1000 + 1]
        decode.bus.silent_s = lambda: silent_s[0]

        async def says_that_it_takes_work():
            found = {worker.card.incarnation: worker.load for worker in await live_workers(system)}
            return found[decode.incarnation].takes_work

        async with asyncio.timeout(10):
            while await says_that_it_takes_work():
                await asyncio.sleep(0.01)
            waiting = await system.submit(a_body())
            await asyncio.sleep(0.2)
            assert (state := system.folded(waiting)) is None or not state.choice(0).ids, "nothing is placed there"
            silent_s[0] = 0.0
            await system.ended(waiting)


async def test_a_worker_leaves_in_bounds_while_log_and_store_are_away(monkeypatch):
    monkeypatch.setattr("shared.worker.host.HAND_OVER_TIMEOUT_S", 0.1)
    monkeypatch.setattr("shared.bus.memory.FLUSH_TIMEOUT_S", 0.1)
    async with a_system(drain_s=0.1, decodes=1) as system:
        job = await system.submit(a_body(num_new=3000))
        while (state := system.folded(job)) is None or len(state.choice(0).ids) < 5:
            await asyncio.sleep(0.001)
        decode = system.workers[-1]
        decode.bus.can_send = False
        decode.service._parts.state.cut_off = True
        async with asyncio.timeout(10):
            await decode.leave()


async def test_a_worker_whose_step_never_ends_gives_its_slot_up_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr("shared.worker.engine_thread.STOP_TIMEOUT_S", 60.0)
    let_go = threading.Event()

    def stuck_engine():
        engine = fake_engine()

        def never_ending_step():
            let_go.wait(30)
            return StepOutput()

        engine.step = never_ending_step
        return engine

    async with a_system(prefills=1, decodes=1) as system:
        system.make_engine = stuck_engine
        await system.workers[0].leave()
        stuck = await system.start_worker(Role.PREFILL)
        stuck.service._parts = replace(stuck.service._parts, limits=WorkerLimits(step_s=0.05))
        await stuck.until_ready()
        await system.submit(a_body())
        with pytest.raises(ExceptionGroup) as ended:
            await asyncio.wait_for(stuck.task, 10)
        assert ended.group_contains(StepHangs)
        assert len(await live_workers(system)) == 1
        let_go.set()


async def test_a_worker_tells_how_fast_its_steps_are(monkeypatch):
    monkeypatch.setattr("shared.worker.host.LEARN_INTERVAL_S", 0.05)
    async with a_system(prefills=1, decodes=1) as system:
        prefill, decode = system.workers
        assert all(worker.load.profile is None for worker in await live_workers(system)), "nothing has run"
        for _ in range(8):
            await system.ended(await system.submit(a_body()))
        async with asyncio.timeout(10):
            while True:
                told = {worker.card.incarnation: worker.load.profile for worker in await live_workers(system)}
                if told[prefill.incarnation] is not None:
                    break
                await asyncio.sleep(0.01)
        assert told[prefill.incarnation].prefill_s(289, 0) > 0
        assert told[decode.incarnation] is None, "it has computed no prompt"
        metrics = prefill.service._parts.metrics
        assert metrics.speeds["token"]._value.get() + metrics.speeds["pair"]._value.get() > 0
