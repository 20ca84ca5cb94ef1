"""A prefill at each of its stages, with every end that may meet it there."""

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from services.prefill.role import PrefillRole
from shared.blocks import token_ids
from shared.engine.fake import END_AT, fake_answer, fake_engine
from shared.request import FinishReason, PlacementId, RequestId, SamplingParams
from shared.transfer.port import Outcome
from shared.wire.to_worker import Assignment, DecodeWork, FirstToken, LocalWork, PrefillWork, Stop
from shared.wire.wire_format import WireFormat
from shared.worker.engine_thread import Step
from tests.unit.services.worker_context import DECODE, PREFILL, InlineEngine, a_context, settled
from tests.virtual_loop import run_virtually

IDS = tuple(range(3, 153))
KEY = PlacementId("a")


def some_work(ids=IDS, *, max_tokens=10, placement=KEY, deadline_s=1e12, **assignment):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return PrefillWork(
        Assignment(RequestId("r"), 0, 1, placement, len(ids), sampling, deadline_s, **assignment),
        token_ids(ids),
        PREFILL,
        DECODE,
    )


@asynccontextmanager
async def a_stage(num_pages=16, max_batch_tokens=64, **engine_settings):
    engine = fake_engine(num_pages=num_pages, max_batch_tokens=max_batch_tokens, **engine_settings)
    async with a_context(InlineEngine(engine), me=PREFILL) as context:
        role = PrefillRole(context, hold_s=5.0)

        async def step():
            """One step of the engine, and what follows from it."""
            output = engine.step()
            await settled()
            await role.handle(Step(output, started_s=0.0, ended_s=1.0))
            await settled()

        async def compute():
            while engine.has_work():
                await step()

        yield SimpleNamespace(context=context, role=role, engine=engine, step=step, compute=compute)
        engine.check()


def first_token(ids=IDS):
    return fake_answer(token_ids(ids), len(ids), SamplingParams(max_tokens=10, temperature=0.0), count=1)[0]


def num_used(engine):
    stats = engine.stats()
    return stats.num_pages - stats.num_free_pages


def run(scene, **settings):
    async def staged():
        async with a_stage(**settings) as stage:
            await scene(stage)

    run_virtually(staged())


def test_the_ticket_leaves_with_the_first_chunk_and_the_token_when_it_stands_in_the_log():
    async def scene(stage):
        handoff, frames = stage.context.handoff, stage.context.frames
        stage.role.take(some_work(max_wire_loss=WireFormat.INT8))
        await stage.step()
        (ticket,) = handoff.sent
        assert isinstance(ticket, DecodeWork)
        assert (ticket.ids, ticket.ticket.num_tokens) == (token_ids(IDS), len(IDS))
        assert ticket.ticket.max_loss is WireFormat.INT8
        assert frames.entries == []
        frames.gate.shut()
        await stage.compute()
        assert [list(entry.ids) for entry in frames.entries] == [[first_token()]]
        assert len(handoff.sent) == 1, "the token waits for its frame"
        assert len(stage.role.unfinished()) == 1
        frames.gate.open()
        await settled()
        assert handoff.sent[1:] == [FirstToken(KEY, DECODE, first_token())]
        assert not stage.role.unfinished()
        assert num_used(stage.engine) == 3, "its pages wait for the pull"
        assert not stage.context.given_back
        assert stage.context.computed == [(KEY, PREFILL)], "its pages are taken still"
        stage.context.transfer.end(KEY)
        assert num_used(stage.engine) == 0
        assert stage.context.given_back == [(KEY, PREFILL)]

    run(scene)


def test_decode_learns_what_is_computed_when_it_is():
    async def scene(stage):
        stage.role.take(some_work())
        seen = []
        for _ in range(4):
            await stage.step()
            (pages, _, rest) = stage.context.transfer.offers[KEY]
            progress = rest["progress"]
            chunks = [(chunk.start, chunk.end) for chunk in progress.chunks]
            seen.append((len(pages), chunks, progress.completed.is_set()))
        assert seen[0][0] == 3
        assert seen[-1][1:] == ([(0, 64), (64, 128), (128, 150)], True)
        assert seen[0][2] is False

    run(scene)


def test_the_frame_that_a_client_waits_for_goes_before_all_that_the_transfer_wants():
    async def scene(stage):
        stage.role.take(some_work())
        await stage.step()
        (_, _, rest) = stage.context.transfer.offers[KEY]
        told = []
        rest["progress"].complete = lambda: told.append(len(stage.context.frames.entries))
        await stage.compute()
        assert told == [1]

    run(scene)


def test_the_token_waits_for_the_ticket_that_decode_needs_first():
    async def scene(stage):
        stage.context.handoff.gate.shut()
        stage.role.take(some_work())
        await stage.compute()
        assert len(stage.context.frames.entries) == 1
        assert [type(message) for message in stage.context.handoff.sent] == [DecodeWork]
        assert len(stage.role.unfinished()) == 1
        stage.context.handoff.gate.open()
        await settled()
        assert [type(message) for message in stage.context.handoff.sent] == [DecodeWork, FirstToken]

    run(scene)


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("when", ["while it computes", "before the frame is acknowledged"])
def test_an_offer_that_ends_early_leaves_the_request_alone(when, outcome):
    async def scene(stage):
        stage.role.take(some_work())
        await stage.step()
        if when == "before the frame is acknowledged":
            stage.context.frames.gate.shut()
            await stage.compute()
        stage.context.transfer.end(KEY, outcome)
        assert len(stage.role.unfinished()) == 1
        assert num_used(stage.engine) == 3
        stage.context.frames.gate.open()
        await stage.compute()
        await settled()
        assert stage.context.handoff.sent[1:] == [FirstToken(KEY, DECODE, first_token())]
        assert num_used(stage.engine) == 0
        assert stage.context.given_back == [(KEY, PREFILL)]

    run(scene)


@pytest.mark.parametrize("stop_strings", [(), ("t",)])
def test_a_choice_that_ends_with_its_first_token_ends_at_decode_too(stop_strings):
    ids = IDS if stop_strings else (*IDS, END_AT, 0)

    async def scene(stage):
        if stop_strings:
            stage.context.tokeniser = object()
            stage.role._matched_stop = lambda *_: "t"
        stage.role.take(some_work(ids, stop_strings=stop_strings))
        await stage.compute()
        (entry,) = stage.context.frames.entries
        assert entry.finish is FinishReason.STOP
        assert [type(message) for message in stage.context.handoff.sent] == [DecodeWork, Stop]
        assert stage.context.transfer.withdrawn == [KEY]
        assert not stage.role.unfinished()
        assert num_used(stage.engine) == 3, "decode may be reading them"
        stage.context.transfer.end(KEY, Outcome.WITHDRAWN)
        assert num_used(stage.engine) == 0
        assert stage.context.given_back == [(KEY, PREFILL)], "decode gives its own back when it is told"

    run(scene)


def test_where_only_one_token_is_left_to_make_decode_hears_nothing():
    async def scene(stage):
        stage.role.take(some_work(max_tokens=1))
        await stage.compute()
        assert stage.context.frames.entries[0].finish is FinishReason.LENGTH
        assert not stage.context.handoff.sent
        assert not stage.context.transfer.offers
        assert num_used(stage.engine) == 0
        assert set(stage.context.given_back) == {(KEY, PREFILL), (KEY, DECODE)}

    run(scene)


def test_a_request_that_fails_ends_at_decode_too():
    async def scene(stage):
        stage.role.take(some_work())
        await stage.compute()
        assert stage.context.frames.entries[0].finish is FinishReason.FAILED
        assert [type(message) for message in stage.context.handoff.sent] == [DecodeWork, Stop]
        _, _, rest = stage.context.transfer.offers[KEY]
        assert not rest["progress"].completed.is_set()
        stage.context.transfer.end(KEY, Outcome.WITHDRAWN)
        assert num_used(stage.engine) == 0

    run(scene, poison_token_id=IDS[100])


def test_what_the_engine_refuses_ends_as_failed():
    async def scene(stage):
        stage.role.take(some_work())
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.finish, entry.index) == (FinishReason.FAILED, 0)
        assert not stage.context.handoff.sent
        assert not stage.role.unfinished()
        assert set(stage.context.given_back) == {(KEY, PREFILL), (KEY, DECODE)}

    run(scene, num_pages=2)


def test_work_past_its_deadline_is_not_begun():
    async def scene(stage):
        stage.role.take(some_work(deadline_s=1.0))
        assert not stage.engine.has_work()
        assert stage.context.given_back == [(KEY, PREFILL), (KEY, DECODE)]

    run(scene)


def test_a_stop_before_the_work_and_work_that_comes_twice_do_nothing():
    async def scene(stage):
        stage.role.take(Stop(KEY, PREFILL))
        stage.role.take(some_work())
        assert not stage.engine.has_work()
        stage.role.take(some_work(placement=PlacementId("b")))
        stage.role.take(some_work(placement=PlacementId("b")))
        await stage.compute()
        assert len(stage.context.frames.entries) == 1

    run(scene)


def test_of_a_message_that_is_not_for_prefill_the_log_tells_nothing_but_what_it_is():
    async def scene(stage):
        told = []
        stage.context.log = SimpleNamespace(error=lambda _, **details: told.append(details))
        stage.role.take(LocalWork(some_work().assignment, token_ids(IDS), PREFILL))
        assert told == [{"kind": "LocalWork"}]

    run(scene)


STOPS = ("before the first chunk", "while it computes", "while its frame is on its way", "when it was handed on")


@pytest.mark.parametrize("when", STOPS)
def test_a_stop_frees_all_in_every_stage(when):
    async def scene(stage):
        context = stage.context
        stage.role.take(some_work())
        await settled()
        if when != STOPS[0]:
            await stage.step()
        if when in STOPS[2:]:
            if when == STOPS[2]:
                context.frames.gate.shut()
            await stage.compute()
        stage.role.take(Stop(KEY, PREFILL))
        stage.role.take(Stop(KEY, PREFILL))
        context.frames.gate.open()
        await stage.compute()
        await settled()
        assert not stage.role.unfinished()
        kinds = [type(message) for message in context.handoff.sent]
        assert kinds == {STOPS[0]: [], STOPS[3]: [DecodeWork, FirstToken]}.get(when, [DecodeWork, Stop])
        if when == STOPS[0]:
            assert not context.transfer.withdrawn
        else:
            assert set(context.transfer.withdrawn) == {KEY}
            assert num_used(stage.engine) == 3, "decode may be reading them"
            context.transfer.end(KEY, Outcome.WITHDRAWN)
        assert num_used(stage.engine) == 0
        assert (KEY, PREFILL) in context.given_back
        stage.role.take(Stop(KEY, PREFILL))

    run(scene)


class Chance:
    """What happens next, at random: work, stops, steps, ends of offers, late acknowledgements."""

    def __init__(self, stage, rng, works):
        self.stage = stage
        self.rng = rng
        self.waiting = list(works)
        self.keys = [work.assignment.placement for work in works]

    async def happen(self):
        event = self.rng.choice((self.work, self.stop, self.step, self.offer_ends, self.frames, self.handoff, settled))
        await event()

    async def work(self):
        if self.waiting:
            self.stage.role.take(self.waiting.pop())

    async def stop(self):
        if self.rng.random() < 0.2:
            self.stage.role.take(Stop(self.rng.choice(self.keys), PREFILL))

    async def step(self):
        if self.stage.engine.has_work():
            await self.stage.step()

    async def offer_ends(self):
        transfer = self.stage.context.transfer
        if transfer.offers:
            key = self.rng.choice(sorted(transfer.offers))
            if key in transfer.withdrawn or self.rng.random() < 0.1:
                transfer.end(key, self.rng.choice(list(Outcome)))

    async def frames(self):
        self._turn(self.stage.context.frames.gate)

    async def handoff(self):
        self._turn(self.stage.context.handoff.gate)

    def _turn(self, gate):
        self.rng.choice((gate.open, gate.shut))()

    async def calm_down(self):
        """All that was held up happens."""
        context = self.stage.context
        for work in self.waiting:
            self.stage.role.take(work)
        context.frames.gate.open()
        context.handoff.gate.open()
        await self.stage.compute()
        await settled()
        assert not self.stage.role.unfinished()
        for key in list(context.transfer.offers):
            context.transfer.end(key)
        await settled()


def random_work(rng, key):
    ids = tuple(rng.randrange(3, 900) for _ in range(rng.choice((1, 64, 130))))
    return some_work(ids + rng.choice(((), (END_AT, 0))), placement=key, max_tokens=rng.choice((1, 2, 9)))


def test_a_stop_that_overtakes_the_news_of_the_first_chunk_leaves_no_ticket():
    async def scene(stage):
        stage.role.take(some_work())
        stage.engine.step()  # tells of the chunk; the loop has not heard it yet
        stage.role.take(Stop(KEY, PREFILL))
        await settled()
        await stage.compute()
        assert not stage.context.handoff.sent
        assert not stage.context.transfer.offers
        assert num_used(stage.engine) == 0

    run(scene)


def test_chunks_that_the_loop_has_not_heard_of_are_looked_at_before_the_token():
    async def scene(stage):
        stage.role.take(some_work(IDS[:10]))
        outputs = [stage.engine.step()]
        while not outputs[-1].tokens:
            outputs.append(stage.engine.step())
        for output in outputs:
            await stage.role.handle(Step(output, started_s=0.0, ended_s=1.0))
        await settled()
        assert [type(message) for message in stage.context.handoff.sent] == [DecodeWork, FirstToken]
        stage.context.transfer.end(KEY)

    run(scene)


def test_a_chunk_that_is_launched_while_the_worker_ends_is_not_offered():
    async def scene():
        engine = fake_engine()
        async with a_context(InlineEngine(engine), me=PREFILL) as context:
            role = PrefillRole(context, hold_s=5.0)
            role.take(some_work())
        engine.step()
        await settled()
        assert not context.transfer.offers

    run_virtually(scene())


@pytest.mark.parametrize("seed", range(30))
def test_in_any_order_of_events_all_is_freed_and_decode_is_told_once(seed):
    rng = random.Random(seed)

    async def scene(stage):
        chance = Chance(stage, rng, [random_work(rng, PlacementId(f"k{number}")) for number in range(6)])
        for _ in range(200):
            await asyncio.sleep(0)
            await chance.happen()
        await chance.calm_down()
        assert num_used(stage.engine) == 0
        assert not stage.role._prefills
        sent = stage.context.handoff.sent
        with_ticket = {message.assignment.placement for message in sent if isinstance(message, DecodeWork)}
        for key in chance.keys:
            told = [type(message) for message in sent if getattr(message, "placement", None) == key]
            assert told in ([], [FirstToken], [Stop], [FirstToken, Stop])
            assert (key in with_ticket) == bool(told), "who has a ticket learns how it goes on; the others hear nothing"
            assert (key, PREFILL) in stage.context.given_back

    run(scene)


@pytest.mark.parametrize(
    ("made", "sampling", "stops", "finish", "reason"),
    [
        ([300, 301, 302], {"max_tokens": 3}, (), FinishReason.LENGTH, None),
        ([300, 2], {}, (), FinishReason.STOP, None),
        ([300, 301], {"stop_token_ids": (301,)}, (), FinishReason.STOP, 301),
        ([300, 301, 302], {}, ("1 30",), FinishReason.STOP, "1 30"),
    ],
)
def test_work_whose_tokens_end_already_ends_at_once(made, sampling, stops, finish, reason):
    async def scene(stage):
        work = some_work()
        settings = SamplingParams(**{"max_tokens": 10, "temperature": 0.0, **sampling})
        assignment = replace(work.assignment, sampling=settings, stop_strings=stops)
        stage.role.take(replace(work, assignment=assignment, ids=token_ids([*IDS, *made])))
        await settled()
        (entry,) = stage.context.frames.entries
        assert (entry.index, list(entry.ids), entry.finish, entry.stop_reason) == (len(made), [], finish, reason)
        assert not stage.engine.has_work()
        assert not stage.context.handoff.sent
        assert not stage.role.unfinished()

    run(scene)
