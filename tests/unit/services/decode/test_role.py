import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from services.decode.role import DecodeRole
from shared.engine.fake import fake_engine
from shared.engine.port import StepOutput, TokenOutput
from shared.request import Event, FinishReason
from shared.wire.to_worker import LocalWork, Stop
from shared.wire.wire_format import WireFormat
from shared.worker.engine_thread import Step
from tests.unit.services.decode.test_intake import a_ticket_for, a_token_for
from tests.unit.services.worker_context import DECODE, InlineEngine, a_context, settled
from tests.virtual_loop import run_virtually


@asynccontextmanager
async def a_stage(num_pages=16):
    engine = fake_engine(num_pages=num_pages)
    async with a_context(InlineEngine(engine), me=DECODE) as context:
        yield SimpleNamespace(context=context, role=DecodeRole(context, pull_timeout_s=5), engine=engine)


def run(scene, **settings):
    async def staged():
        async with a_stage(**settings) as stage:
            await scene(stage)

    run_virtually(staged())


def a_step(key, index, finish=None):
    return Step(StepOutput((TokenOutput(key, index, 5, finish),)), started_s=0.0, ended_s=2000.0)


def work_for(name, num_tokens, *, num_made=0, **assignment):
    """A prompt to be computed here, with `num_made` tokens of its answer."""
    ticket = a_ticket_for(name, num_tokens, **assignment)
    prompt_len = num_tokens - num_made
    return LocalWork(replace(ticket.assignment, prompt_len=prompt_len), ticket.ids, DECODE)


async def step(stage, started_s, ended_s):
    await stage.role.handle(Step(stage.engine.step(), started_s, ended_s))


def ignored(stage):
    return stage.context.metrics.ignored.labels("m", "no such placement")._value.get()


@pytest.mark.parametrize("finish", [None, FinishReason.LENGTH])
def test_a_stop_that_comes_while_the_log_is_full_ends_the_choice_once(finish):
    async def scene(stage):
        role, frames = stage.role, stage.context.frames
        work = a_ticket_for("job", 10)
        key = work.assignment.placement
        role.take(work)
        role.take(a_token_for("job"))
        await settled()
        frames.gate.shut()
        handling = asyncio.create_task(role.handle(a_step(key, 1, finish)))
        await settled()
        role.take(Stop(key, DECODE))
        frames.gate.open()
        await handling
        assert not role.unfinished()
        assert (key, DECODE) in stage.context.given_back

    run(scene)


def test_the_first_entry_tells_when_the_token_came_and_how_lossy_the_kv():
    async def scene(stage):
        stage.context.transfer.format = WireFormat.INT4
        work = a_ticket_for("job", 10, max_tokens=9)
        stage.role.take(work)
        await asyncio.sleep(2)
        came_s = asyncio.get_running_loop().time()
        stage.role.take(a_token_for("job"))
        await settled()
        for index in (1, 2):
            await stage.role.handle(a_step("job", index))
        first, second = stage.context.frames.entries
        assert first.stamps == {Event.TRANSFERRING: came_s, Event.DECODING: 2000.0}
        assert (first.wire_format, second.wire_format) == (WireFormat.INT4, WireFormat.NATIVE)
        assert second.stamps == {}

    run(scene)


def test_a_token_for_nobody_is_ignored_and_counted():
    async def scene(stage):
        stage.role.take(a_token_for("job"))
        stage.role.take(a_ticket_for("job", 10))
        stage.role.take(a_token_for("job"))
        stage.role.take(a_token_for("job"))
        await settled()
        assert ignored(stage) == 2
        stage.role.take(a_token_for("job"))
        stage.role.take(Stop(a_ticket_for("job", 10).assignment.placement, DECODE))
        stage.role.take(a_token_for("job"))
        assert ignored(stage) == 4
        assert not stage.role.unfinished()

    run(scene)


def test_a_stop_before_the_ticket_and_a_ticket_that_comes_twice_do_nothing():
    async def scene(stage):
        work = a_ticket_for("job", 10)
        stage.role.take(Stop(work.assignment.placement, DECODE))
        stage.role.take(work)
        stage.role.take(a_token_for("job"))
        assert not stage.role.unfinished()
        again = a_ticket_for("again", 10)
        stage.role.take(again)
        stage.role.take(again)
        await settled()
        assert stage.context.transfer.pulling == ["again"]
        assert len(stage.role.unfinished()) == 1

    run(scene)


def test_a_ticket_past_its_deadline_gives_its_credits_back():
    async def scene(stage):
        stage.role.take(a_ticket_for("late", 10, deadline_s=1.0))
        stage.role.take(a_token_for("late"))
        await settled()
        assert stage.context.given_back == [("late", DECODE)]
        assert not stage.context.transfer.pulling
        assert ignored(stage) == 1

    run(scene)


def test_a_request_that_never_fits_fails_behind_its_first_token():
    async def scene(stage):
        stage.role.take(a_ticket_for("huge", 2000))
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.finish, entry.index) == (FinishReason.FAILED, 1)
        assert stage.context.given_back == [("huge", DECODE)]
        assert not stage.role.unfinished()

    run(scene)


def test_a_token_that_the_model_does_not_have_fails_its_request_alone():
    async def scene(stage):
        stage.role.take(a_ticket_for("job", 10))
        stage.role.take(a_token_for("job", -1))
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.finish, entry.index) == (FinishReason.FAILED, 1)
        assert "token_id is -1" in entry.error.message
        assert stage.context.given_back == [("job", DECODE)]
        assert not stage.role.unfinished()

    run(scene)


def test_without_a_token_by_the_deadline_its_credits_go_back():
    async def scene(stage):
        stage.role.take(a_ticket_for("lost", 10, deadline_s=asyncio.get_running_loop().time() + 10))
        await asyncio.sleep(11)
        assert stage.context.given_back == [("lost", DECODE)]
        assert not stage.role.unfinished()
        assert stage.engine.stats().num_free_pages == 16
        assert not stage.context.handoff.cuts, "its owner tells that its time is over"

    run(scene)


def test_a_ticket_whose_prefill_worker_is_gone_is_cut_to_be_placed_again():
    async def scene(stage):
        work = a_ticket_for("lost", 10)
        stage.role.take(work)
        stage.context.gone[work.ticket.source] = math.inf
        await asyncio.sleep(1)
        assert stage.context.given_back == [("lost", DECODE)]
        assert not stage.role.unfinished()
        assert stage.engine.stats().num_free_pages == 16
        (cut,) = stage.context.handoff.cuts
        given = work.assignment
        assert (cut.request_id, cut.choice, cut.epoch) == (given.request_id, given.choice, given.epoch + 1)
        assert (cut.outcome, cut.lost) == (None, None)

    run(scene)


def test_a_prompt_that_is_computed_here_tells_all_from_its_first_token_on():
    async def scene(stage):
        stage.role.take(work_for("job", 300, max_tokens=2))
        await settled()
        assert [each.placement for each in stage.role.unfinished()] == ["job"]
        await step(stage, 10.0, 11.0)  # the first 256 tokens
        assert (stage.context.frames.entries, stage.context.computed) == ([], [])
        await step(stage, 11.0, 12.0)
        assert stage.context.computed == [("job", DECODE)]
        assert stage.context.given_back == []
        await step(stage, 12.0, 13.0)
        first, second = stage.context.frames.entries
        assert (first.index, second.index) == (0, 1)
        assert first.stamps == {Event.PREFILLING: 10.0, Event.FIRST_TOKEN: 12.0, Event.DECODING: 12.0}
        assert second.stamps == {Event.FINISHED: 13.0}
        assert (first.num_cached_tokens, second.finish) == (0, FinishReason.LENGTH)
        assert stage.context.given_back == [("job", DECODE)]
        assert not stage.role.unfinished()
        assert stage.engine.stats().num_free_pages == 16

    run(scene)


def test_work_that_comes_twice_behind_its_stop_or_behind_its_deadline_does_nothing():
    async def scene(stage):
        twice = work_for("twice", 10)
        stage.role.take(twice)
        stage.role.take(twice)
        stage.role.take(Stop(work_for("stopped", 10).assignment.placement, DECODE))
        stage.role.take(work_for("stopped", 10))
        stage.role.take(work_for("late", 10, deadline_s=-1.0))
        await settled()
        assert [each.placement for each in stage.role.unfinished()] == ["twice"]
        assert stage.engine.stats().num_waiting == 1
        assert stage.context.given_back == [("stopped", DECODE), ("late", DECODE)]
        assert not stage.context.frames.entries

    run(scene)


@pytest.mark.parametrize("while_waiting", [True, False])
def test_a_stop_frees_what_is_computed_here(while_waiting):
    async def scene(stage):
        work = work_for("job", 300, max_tokens=9)
        stage.role.take(work)
        await settled()
        if not while_waiting:
            await step(stage, 0.0, 1.0)
        stage.role.take(Stop(work.assignment.placement, DECODE))
        while stage.engine.has_work():
            await step(stage, 1.0, 2.0)
        assert not stage.role.unfinished()
        assert not stage.context.frames.entries
        assert ("job", DECODE) in stage.context.given_back
        assert stage.engine.stats().num_free_pages == 16

    run(scene)


def test_a_prompt_that_never_fits_here_fails_with_its_next_token():
    async def scene(stage):
        stage.context.frames.gate.shut()
        stage.role.take(work_for("huge", 2000, num_made=3, max_tokens=9))
        await settled()
        assert stage.role.unfinished(), "until the log has it"
        stage.context.frames.gate.open()
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.finish, entry.index) == (FinishReason.FAILED, 3)
        assert Event.FINISHED in entry.stamps
        assert stage.context.given_back == [("huge", DECODE)]
        assert not stage.role.unfinished()

    run(scene)


def test_what_the_accepted_tokens_ended_already_is_only_told():
    async def scene(stage):
        stage.role.take(work_for("done", 10, num_made=2, max_tokens=2))
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.finish, entry.index, list(entry.ids)) == (FinishReason.LENGTH, 2, [])
        assert not stage.engine.has_work()
        assert stage.context.given_back == [("done", DECODE)]
        assert not stage.role.unfinished()

    run(scene)
