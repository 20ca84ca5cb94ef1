import asyncio

import pytest

from shared.transfer.progress_thread import AWAKE_S, SPIN_S, ProgressThread
from tests.virtual_loop import VirtualLoop


class FakeWorker:
    """Takes down the modes in which its thread ran."""

    def __init__(self):
        self.modes = []
        self.runs = True

    def stop_progress_thread(self):
        assert self.runs
        self.runs = False

    def start_progress_thread(self, *, polling_mode, epoll_timeout):
        assert not self.runs
        self.runs = True
        self.modes.append(polling_mode)


class Ticks:
    """A clock that moves when it is looked at."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        self.now_s += AWAKE_S / 10
        return self.now_s


@pytest.fixture
def run():
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        yield runner.run


def test_it_sleeps_until_asked_to_hurry_and_again_some_time_after(run):
    async def scenario():
        worker = FakeWorker()
        thread = ProgressThread(worker, Ticks())
        assert worker.modes == [False]
        thread.hurry()
        assert (thread.spins, worker.modes) == (True, [False, True])
        await asyncio.sleep(1.1 * SPIN_S)
        assert (thread.spins, worker.modes) == (False, [False, True, False])

    run(scenario())


def test_it_changes_its_mode_once_however_often_it_is_asked(run):
    async def scenario():
        worker = FakeWorker()
        thread = ProgressThread(worker, Ticks())
        for _ in range(10):
            thread.hurry()
            await asyncio.sleep(0.9 * SPIN_S)
            assert thread.spins
        assert worker.modes == [False, True]
        await asyncio.sleep(0.2 * SPIN_S)
        assert worker.modes == [False, True, False]

    run(scenario())


def test_once_stopped_it_leaves_its_worker_alone(run):
    async def scenario():
        worker = FakeWorker()
        thread = ProgressThread(worker, Ticks())
        thread.hurry()
        thread.stop()
        await asyncio.sleep(10 * SPIN_S)
        assert worker.modes == [False, True]

    run(scenario())


def test_the_loop_stays_awake_for_a_while_and_no_longer(run):
    async def scenario():
        clock = Ticks()
        thread = ProgressThread(FakeWorker(), clock)
        thread.hurry()
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2
        thread.hurry()
        await asyncio.sleep(SPIN_S)
        assert len(asyncio.all_tasks()) == 1
        assert clock.now_s < 2.5 * AWAKE_S

    run(scenario())
