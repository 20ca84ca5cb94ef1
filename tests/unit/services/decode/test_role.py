import asyncio
from types import SimpleNamespace

import pytest

from services.decode.role import DecodeRole
from shared.engine.fake import fake_engine
from shared.engine.port import StepOutput, TokenOutput
from shared.request import FinishReason
from shared.wire.to_worker import Stop
from shared.worker.engine_thread import Step
from tests.unit.services.decode.test_intake import ME, Counter, a_ticket_for, until


class StillEngine:
    """An engine whose steps are the test's own."""

    def __init__(self):
        self._engine = fake_engine()

    def call(self, command):
        future = asyncio.get_running_loop().create_future()
        future.set_result(command(self._engine))
        return future


class SlowFrames:
    """A log that is full until `room` is set."""

    def __init__(self):
        self.room = asyncio.Event()

    async def post(self, *_):
        await self.room.wait()


class InstantTransfer:
    async def pull(self, *_, **__):
        pass


@pytest.mark.parametrize("finish", [None, FinishReason.LENGTH])
async def test_a_stop_that_comes_while_the_log_is_full_ends_the_choice_once(finish):
    given_back, frames = [], SlowFrames()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        context = SimpleNamespace(
            me=ME,
            engine=StillEngine(),
            transfer=InstantTransfer(),
            tasks=tasks,
            clock_s=asyncio.get_running_loop().time,
            page_bytes=1,
            frames=frames,
            credits=SimpleNamespace(give_back=lambda placement, *_: given_back.append(placement)),
            metrics=SimpleNamespace(transfer_seconds=Counter(), transfer_bytes=Counter()),
        )
        role = DecodeRole(context, pull_timeout_s=5)
        work = a_ticket_for("job", 10)
        key = work.assignment.placement
        role.take(work)
        await until(lambda: role._decodings)
        step = Step(StepOutput((TokenOutput(key, 1, 5, finish),)), started_s=0.0, ended_s=0.0)
        handling = asyncio.create_task(role.handle(step))
        await asyncio.sleep(0)
        role.take(Stop(key, ME))
        frames.room.set()
        await handling
        assert not role.unfinished()
        assert key in given_back
        for task in tasks._tasks:
            task.cancel()
