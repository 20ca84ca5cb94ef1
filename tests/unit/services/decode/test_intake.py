"""Tickets that wait for room get it as soon as there is some, however it came about."""

import asyncio
from types import SimpleNamespace

import pytest

from services.decode.intake import Intake
from shared.blocks import token_ids
from shared.engine.fake import fake_engine
from shared.errors import KvTransferFailed
from shared.request import Incarnation, PlacementId, RequestId, SamplingParams, WorkerRef
from shared.wire.to_worker import Assignment, DecodeWork, KvTicket
from shared.worker.engine_thread import EngineThread

ME = WorkerRef(0, Incarnation("decode"))


def a_ticket_for(name, num_tokens, max_tokens=1):
    ticket = KvTicket(name, "nowhere:1", Incarnation("prefill"), b"x" * 16, num_tokens, "layout")
    sampling = SamplingParams(max_tokens=max_tokens + 1, temperature=0.0, ignore_eos=True)
    assignment = Assignment(RequestId(name), 0, 1, PlacementId(name), num_tokens, sampling, deadline_s=1e12)
    return DecodeWork(assignment, token_ids(range(3, 4 + num_tokens)), ME, ticket)


class SlowTransfer:
    """Every pull goes on until `end` is set, and then fails or not."""

    def __init__(self):
        self.end = asyncio.Event()
        self.pulling = []
        self.fails = False

    async def pull(self, ticket, **_):
        self.pulling.append(ticket.key)
        await self.end.wait()
        if self.fails:
            raise KvTransferFailed("told to")


class Counter:
    def inc(self, *_):
        pass

    observe = inc


@pytest.fixture
async def stage():
    """An intake over a real engine of 4 pages."""
    engine = EngineThread(fake_engine(num_pages=4), asyncio.get_running_loop().time)
    transfer, arrived = SlowTransfer(), []
    with engine.running():
        async with asyncio.TaskGroup() as tasks, asyncio.timeout(10):
            context = SimpleNamespace(
                engine=engine,
                transfer=transfer,
                tasks=tasks,
                clock_s=asyncio.get_running_loop().time,
                page_bytes=1,
                metrics=SimpleNamespace(transfer_seconds=Counter(), transfer_bytes=Counter(), local_prefills=Counter()),
                log=SimpleNamespace(warning=lambda *_, **__: None),
            )
            intake = Intake(
                context, pull_timeout_s=5, arrived=arrived.append, refused=lambda *_: pytest.fail("it fits")
            )
            yield SimpleNamespace(intake=intake, transfer=transfer, engine=engine, arrived=arrived)
            for task in tasks._tasks:
                task.cancel()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_pages_of_a_stopped_pull_go_to_the_next_ticket(stage, fails):
    stage.transfer.fails = fails
    stage.intake.take(a_ticket_for("large", 200))
    await until(lambda: stage.transfer.pulling == ["large"])
    stage.intake.take(a_ticket_for("next", 100))
    stage.intake.stop(PlacementId("large"))
    await asyncio.sleep(0.02)  # the next one looks, and finds no room yet
    stage.transfer.end.set()
    await until(lambda: stage.transfer.pulling == ["large", "next"])
