"""Tickets get room in turn, are pulled while prefill computes, and run when their first token is there."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from services.decode.intake import Ends, Intake
from shared.blocks import token_ids
from shared.engine.fake import fake_engine
from shared.observe.metrics import LocalPrefill
from shared.request import Event, Incarnation, PlacementId, RequestId, SamplingParams
from shared.wire.to_worker import Assignment, DecodeWork, FirstToken, KvTicket
from shared.wire.wire_format import WireFormat
from shared.worker.engine_thread import EngineThread
from tests.unit.services.worker_context import DECODE, InlineEngine, a_context, settled, until
from tests.virtual_loop import run_virtually

PULL_TIMEOUT_S = 5.0
TOKEN = 7


def a_ticket_for(name, num_tokens, max_tokens=2, deadline_s=1e12):
    ticket = KvTicket(name, "nowhere:1", Incarnation("prefill"), b"x" * 16, num_tokens, "layout")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    assignment = Assignment(RequestId(name), 0, 1, PlacementId(name), num_tokens, sampling, deadline_s)
    return DecodeWork(assignment, token_ids(range(3, 3 + num_tokens)), DECODE, ticket)


def a_token_for(name, token_id=TOKEN):
    return FirstToken(PlacementId(name), DECODE, token_id)


@asynccontextmanager
async def a_stage(engine):
    """An intake over `engine`; `ended` has what became of whom."""
    async with a_context(engine, me=DECODE) as context:
        ended = []
        ends = Ends(
            arrived=lambda arrival: ended.append(("arrived", arrival.key)),
            refused=lambda arrival, _: ended.append(("refused", arrival.key)),
            given_up=lambda arrival: ended.append(("given up", arrival.key)),
        )
        intake = Intake(context, ends, pull_timeout_s=PULL_TIMEOUT_S)
        yield SimpleNamespace(intake=intake, transfer=context.transfer, context=context, engine=engine, ended=ended)


@pytest.fixture
async def stage():
    """Over a real engine thread of 4 pages."""
    engine = EngineThread(fake_engine(num_pages=4), asyncio.get_running_loop().time)
    with engine.running():
        async with a_stage(engine) as stage:
            stage.transfer.gate.shut()
            yield stage


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("ends_by", ["stop", "failure"])
async def test_the_pages_of_a_pull_that_ended_go_to_the_next_ticket(stage, ends_by, fails):
    stage.transfer.fails = fails or ends_by == "failure"
    stage.intake.take(a_ticket_for("large", 200))
    await until(lambda: stage.transfer.pulling == ["large"])
    stage.intake.take(a_ticket_for("next", 100))
    await asyncio.sleep(0.02)  # the next one looks, and finds no room yet
    if ends_by == "stop":
        stage.intake.stop(PlacementId("large"))
    else:
        stage.transfer.gate.open()
    await until(lambda: stage.transfer.pulling == ["large", "next"])


def run(scene, **settings):
    """In virtual time, over an engine that does what it is told at once."""

    async def staged():
        engine = fake_engine(**settings)
        async with a_stage(InlineEngine(engine)) as stage:
            await scene(stage, engine)
            engine.check()

    run_virtually(staged())


def num_used(engine):
    stats = engine.stats()
    return stats.num_pages - stats.num_free_pages


def num_failed_pulls(stage):
    return stage.context.metrics.local_prefills.labels("m", LocalPrefill.PULL_FAILED)._value.get()


@pytest.mark.parametrize("token_comes", ["before there is room", "while it pulls", "when all is pulled"])
def test_it_runs_when_both_kv_and_token_are_there(token_comes):
    async def scene(stage, engine):
        stage.transfer.gate.shut()
        blocker = a_ticket_for("blocker", 900)
        stage.intake.take(blocker)
        await settled()
        stage.intake.take(a_ticket_for("a", 200))
        await settled()
        if token_comes == "before there is room":
            assert stage.intake.take_token(a_token_for("a"))
        stage.intake.stop(PlacementId("blocker"))
        await settled()
        assert stage.transfer.pulling == ["blocker", "a"]
        if token_comes == "while it pulls":
            assert stage.intake.take_token(a_token_for("a"))
        assert not stage.ended
        stage.transfer.gate.open()
        await settled()
        if token_comes == "when all is pulled":
            assert not stage.ended
            assert [work.assignment.placement for work in stage.intake.arrivals()] == ["a"]
            assert stage.intake.take_token(a_token_for("a"))
            await settled()
        assert stage.ended == [("arrived", "a")]
        assert not stage.intake.arrivals()
        assert engine.stats().num_running == 1
        assert num_failed_pulls(stage) == 0
        assert engine.has_work()
        engine.abort("a")

    run(scene, num_pages=16)


def test_a_second_token_and_one_of_nobody_are_told_apart():
    async def scene(stage, engine):
        stage.transfer.gate.shut()
        assert not stage.intake.take_token(a_token_for("a"))
        stage.intake.take(a_ticket_for("a", 100))
        assert stage.intake.take_token(a_token_for("a", 7))
        assert not stage.intake.take_token(a_token_for("a", 8))
        stage.intake.stop(PlacementId("a"))
        assert not stage.intake.take_token(a_token_for("a"))
        await settled()
        assert num_used(engine) == 0

    run(scene)


def test_a_failed_pull_gives_its_pages_back_at_once_and_prefills_when_the_token_is_there():
    async def scene(stage, engine):
        stage.transfer.fails = True
        stage.intake.take(a_ticket_for("a", 100))
        await settled()
        assert num_used(engine) == 0
        assert not stage.ended
        assert not engine.has_work(), "what it would compute is not known before the token"
        stage.intake.take_token(a_token_for("a"))
        await settled()
        assert stage.ended == [("arrived", "a")]
        assert num_failed_pulls(stage) == 1
        (output,) = engine.step().tokens
        assert output.index == 1, "behind the token that came"

    run(scene)


def test_a_pull_waits_for_prefill_as_long_as_it_takes_and_for_the_rest_only_so_long():
    async def scene(stage, engine):
        loop = asyncio.get_running_loop()
        stage.transfer.gate.shut()
        stage.intake.take(a_ticket_for("a", 100))
        await asyncio.sleep(100 * PULL_TIMEOUT_S)
        assert stage.transfer.num_ended == 0
        began_s = loop.time()
        stage.intake.take_token(a_token_for("a"))
        while not stage.ended:
            await asyncio.sleep(0.1)
        assert loop.time() - began_s == pytest.approx(PULL_TIMEOUT_S, abs=0.2)
        assert stage.ended == [("arrived", "a")]
        assert stage.transfer.num_ended == 1
        assert num_failed_pulls(stage) == 1
        engine.abort("a")

    run(scene)


def test_a_pull_that_begins_after_the_token_has_its_own_limit():
    async def scene(stage, engine):
        stage.transfer.gate.shut()
        stage.intake.take(a_ticket_for("blocker", 900))
        await settled()
        stage.intake.take(a_ticket_for("a", 200))
        stage.intake.take_token(a_token_for("a"))
        await asyncio.sleep(10 * PULL_TIMEOUT_S)
        stage.intake.stop(PlacementId("blocker"))
        await asyncio.sleep(PULL_TIMEOUT_S - 1)
        assert stage.transfer.pulling == ["blocker", "a"]
        assert not stage.ended
        await asyncio.sleep(2)
        assert stage.ended == [("arrived", "a")]
        engine.abort("a")

    run(scene, num_pages=16)


@pytest.mark.parametrize("fails", [False, True])
def test_a_token_that_never_comes_is_waited_for_until_the_deadline(fails):
    async def scene(stage, engine):
        stage.transfer.fails = fails
        now_s = asyncio.get_running_loop().time()
        stage.intake.take(a_ticket_for("a", 100, deadline_s=now_s + 60))
        await asyncio.sleep(59)
        assert not stage.ended
        assert num_used(engine) == (0 if fails else 2)
        await asyncio.sleep(2)
        assert stage.ended == [("given up", "a")]
        assert num_used(engine) == 0

    run(scene)


@pytest.mark.parametrize("fails", [False, True])
def test_a_token_is_not_waited_for_when_prefill_is_gone(fails):
    async def scene(stage, engine):
        stage.transfer.fails = fails
        stage.intake.take(a_ticket_for("a", 100))
        stage.intake.take(a_ticket_for("b", 100))
        await asyncio.sleep(10)
        stage.intake.take_token(a_token_for("b"))
        stage.context.gone[Incarnation("prefill")] = asyncio.get_running_loop().time()
        await asyncio.sleep(PULL_TIMEOUT_S)
        assert sorted(stage.ended) == [("arrived", "b"), ("given up", "a")]
        engine.abort("b")
        assert num_used(engine) == 0

    run(scene)


def test_a_ticket_tells_that_its_prefill_worker_is_there():
    async def scene(stage, engine):
        await asyncio.sleep(10)
        stage.context.gone[Incarnation("prefill")] = 5.0  # nobody saw it yet, and the reading began then
        stage.intake.take(a_ticket_for("a", 100))
        await asyncio.sleep(10)
        assert not stage.ended
        stage.intake.take_token(a_token_for("a"))
        await asyncio.sleep(PULL_TIMEOUT_S)
        assert stage.ended == [("arrived", "a")]
        engine.abort("a")

    run(scene)


def test_what_the_engine_can_never_run_is_refused_and_the_next_one_has_its_turn():
    async def scene(stage, engine):
        stage.intake.take(a_ticket_for("huge", 2000))
        stage.intake.take(a_ticket_for("a", 100))
        await settled()
        assert stage.ended == [("refused", "huge")]
        assert stage.transfer.pulling == ["a"]
        assert [work.assignment.placement for work in stage.intake.arrivals()] == ["a"]
        stage.intake.stop(PlacementId("a"))
        await settled()
        assert num_used(engine) == 0

    run(scene, num_pages=16)


@pytest.mark.parametrize("offered", [1, 99, 101, 2000])
def test_a_ticket_for_other_tokens_than_its_ids_is_not_pulled(offered):
    async def scene(stage, engine):
        work = a_ticket_for("a", 100)
        stage.intake.take(replace(work, ticket=replace(work.ticket, num_tokens=offered)))
        stage.intake.take_token(a_token_for("a"))
        await settled()
        assert not stage.transfer.pulling
        assert stage.ended == [("arrived", "a")]
        assert num_failed_pulls(stage) == 1
        engine.abort("a")

    run(scene)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("token_id", [-1, 2**31 - 1])
def test_a_token_that_is_none_of_the_vocabulary_is_refused(token_id, fails):
    async def scene(stage, engine):
        stage.transfer.fails = fails
        stage.intake.take(a_ticket_for("a", 100))
        stage.intake.take_token(a_token_for("a", token_id))
        await settled()
        assert stage.ended[-1] == ("refused", "a")
        assert num_used(engine) == 0
        assert not engine.has_work()

    run(scene)


def test_pages_that_a_batch_in_flight_keeps_are_found_when_it_has_ended():
    async def scene(stage, engine):
        stage.transfer.fails = True
        stage.intake.take(a_ticket_for("a", 900, max_tokens=50))
        stage.intake.take_token(a_token_for("a"))
        await settled()
        next_one = a_ticket_for("b", 900)
        stage.intake.take(replace(next_one, assignment=replace(next_one.assignment, cache_salt="b")))
        while not engine.step().tokens:
            pass
        engine.abort("a")  # a row of it is in flight
        stage.intake.room_changed()
        await settled()
        assert stage.transfer.pulling == ["a"]
        engine.step()
        await asyncio.sleep(1)
        assert stage.transfer.pulling == ["a", "b"]
        stage.intake.stop(PlacementId("b"))
        await settled()

    run(scene, num_pages=16)


STOPS = ("at once", "while it waits for room", "while it pulls", "while it waits for the token", "after a failed pull")


@pytest.mark.parametrize("when", STOPS)
def test_a_stop_frees_all_in_every_stage(when):
    async def scene(stage, engine):
        stage.transfer.fails = when == "after a failed pull"
        if when == "while it waits for room":
            stage.intake.take(a_ticket_for("blocker", 900))
        if when == "while it pulls":
            stage.transfer.gate.shut()
        await settled()
        stage.intake.take(a_ticket_for("a", 200))
        if when != "at once":
            await settled()
        assert stage.intake.stop(PlacementId("a"))
        assert not stage.intake.stop(PlacementId("a"))
        stage.intake.stop(PlacementId("blocker"))
        await settled()
        assert num_used(engine) == 0
        assert engine.stats().num_importing == 0
        assert not stage.ended
        assert not stage.intake.arrivals()
        stage.transfer.fails = False
        stage.intake.take(a_ticket_for("next", 900))
        await settled()
        assert num_used(engine) == 15, "nobody is in its way"
        stage.intake.stop(PlacementId("next"))
        await settled()

    run(scene, num_pages=16)


def test_lossy_pages_are_counted_and_never_found():
    async def scene(stage, engine):
        stage.transfer.format = WireFormat.INT8
        stage.intake.take(a_ticket_for("a", 128, max_tokens=100))
        stage.intake.take_token(a_token_for("a"))
        await settled()
        assert stage.ended == [("arrived", "a")]
        metrics = stage.context.metrics
        assert metrics.transfers.labels("m", "int8")._value.get() == 1
        assert metrics.wire_bytes.labels("m", "int8")._value.get() == 7
        assert metrics.transfers.labels("m", "native")._value.get() == 0
        engine.abort("a")
        assert not engine.take_block_changes().stored

    run(scene)


def test_the_stamp_of_the_transfer_is_the_arrival_of_the_token():
    async def scene(stage, engine):
        stage.intake.take(a_ticket_for("a", 100))
        await asyncio.sleep(3)
        arrival = stage.intake._arrivals[PlacementId("a")]
        assert not arrival.stamps
        stage.intake.take_token(a_token_for("a"))
        assert arrival.stamps == {Event.TRANSFERRING: asyncio.get_running_loop().time()}
        await settled()
        engine.abort("a")

    run(scene)
