import asyncio
import math
import random
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from services.decode.role import DecodeRole
from shared.blocks import PAGE_TOKENS, token_ids
from shared.engine.fake import fake_answer, fake_engine
from shared.engine.port import StepOutput, TokenOutput
from shared.request import Event, FinishReason
from shared.wire.to_worker import LocalWork, Stop
from shared.wire.wire_format import WireFormat
from shared.worker.engine_thread import Step
from tests.unit.services.decode.test_intake import TOKEN, a_ticket_for, a_token_for
from tests.unit.services.worker_context import DECODE, FakeTransfer, InlineEngine, a_context, settled
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


class WritingTransfer(FakeTransfer):
    """Its pulls bring what a fake engine computes of `a_ticket_for`'s ids."""

    def __init__(self, engine):
        super().__init__()
        self._pages = engine.cache.pages.numpy()

    async def pull(self, ticket, *, want, into, timeout_s):
        pulled = await super().pull(ticket, want=want, into=into, timeout_s=timeout_s)
        for index, page in zip(want, into, strict=True):
            positions = np.arange(index * PAGE_TOKENS, min((index + 1) * PAGE_TOKENS, ticket.num_tokens))
            kv = np.stack((3 + positions, 1 + positions), axis=-1)
            self._pages[page, 0, 0, : len(kv), 0], self._pages[page, 0, 1, : len(kv), 0] = kv, -kv
        return pulled


class Chance:
    """What happens next, at random: tickets, tokens, prompts to compute, stops, steps, pulls, a log that is full."""

    def __init__(self, role, context, engine, rng):
        self.role, self.context, self.engine, self.rng = role, context, engine, rng
        self.waiting = [self.random_work(f"k{number}") for number in range(10)]
        self.works = {work.assignment.placement: work for work in self.waiting}
        self.tokens = []
        self.stopped = set()

    def random_work(self, name):
        make = self.rng.choice((work_for, a_ticket_for))
        return make(name, self.rng.choice((1, 64, 65, 150, 400)), max_tokens=self.rng.choice((2, 9, 70)))

    async def happen(self):
        events = (self.work, self.token, self.stop, self.step, self.step, self.log, self.pulls, settled)
        await self.rng.choice(events)()

    async def work(self):
        if self.waiting:
            work = self.waiting.pop()
            self.role.take(work)
            if not isinstance(work, LocalWork):
                self.tokens.append(work.assignment.placement)

    async def token(self):
        if self.tokens:
            self.role.take(a_token_for(self.tokens.pop(self.rng.randrange(len(self.tokens)))))

    async def stop(self):
        if self.rng.random() < 0.15:
            self.stopped.add(self.rng.choice(sorted(self.works)))
            for key in self.stopped:
                self.role.take(Stop(key, DECODE))
            assert not self.stopped & {each.placement for each in self.role.unfinished()}

    async def step(self):
        if self.context.frames.gate.is_open and self.engine.has_work():
            ran = Step(self.engine.step(), 0.0, 1.0)
            if self.rng.random() < 0.3:  # what comes while the loop has not handled it
                await self.rng.choice((self.work, self.token, self.stop, settled))()
            await self.role.handle(ran)
            self.engine.check()

    async def log(self):
        self.rng.choice((self.context.frames.gate.open, self.context.frames.gate.shut))()

    async def pulls(self):
        transfer = self.context.transfer
        transfer.fails = self.rng.random() < 0.3
        self.rng.choice((transfer.gate.open, transfer.gate.shut))()

    async def calm_down(self):
        while self.waiting:
            await self.work()
        self.context.frames.gate.open()
        self.context.transfer.gate.open()
        for _ in range(1000):
            await self.token()
            await self.step()
            await asyncio.sleep(0.05)
            if not self.role.unfinished() and not self.engine.has_work():
                return
        raise AssertionError("somebody never ends")

    def check_answer(self, key, entries):
        """All of its tokens, and right; of what was stopped, the first ones."""
        work = self.works[key]
        behind = work.ids if isinstance(work, LocalWork) else work.ids + token_ids([TOKEN])
        expected = fake_answer(behind, len(work.ids), work.assignment.sampling)
        told = [token for entry in entries for token in entry.ids]
        assert told == (expected[: len(told)] if key in self.stopped else expected)
        assert [entry.index for entry in entries] == list(
            range(len(behind) - len(work.ids), work.assignment.sampling.max_tokens)
        )[: len(entries)]
        if key not in self.stopped:
            assert [entry.finish for entry in entries] == [None] * (len(entries) - 1) + [FinishReason.LENGTH]


@pytest.mark.parametrize("seed", range(30))
def test_in_any_order_of_events_all_is_told_right_and_all_is_freed(seed):
    async def scene():
        engine = fake_engine(num_pages=8, max_running=3, max_batch_tokens=96)
        async with a_context(InlineEngine(engine), me=DECODE, transfer=WritingTransfer(engine)) as context:
            role = DecodeRole(context, pull_timeout_s=5)
            chance = Chance(role, context, engine, random.Random(seed))
            for _ in range(300):
                await asyncio.sleep(0)
                await chance.happen()
            await chance.calm_down()
            await settled()
            assert engine.stats().num_free_pages == 8
            told = defaultdict(list)
            for entry in context.frames.entries:
                told[entry.placement].append(entry)
            for key, work in chance.works.items():
                chance.check_answer(key, told[key])
                assert (key, DECODE) in context.given_back
                num_computed = context.computed.count((key, DECODE))
                assert num_computed <= isinstance(work, LocalWork)
                assert num_computed or key in chance.stopped or not isinstance(work, LocalWork)

    run_virtually(scene())
