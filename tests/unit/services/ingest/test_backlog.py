"""By what the backlog places: a recent view, and a fresh one where that was wrong."""

import asyncio
from array import array
from collections import deque
from contextlib import suppress
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import structlog
from prometheus_client import CollectorRegistry

from services.ingest.backlog import Backlog, EndedBefore, Expired
from services.ingest.cluster import VIEW_MAX_AGE_S, Cluster
from services.ingest.lengths import Lengths
from services.ingest.placer import Placer
from services.ingest.work import Placed, Waiting
from shared.observe.metrics import IngestMetrics
from shared.policy.admission import BacklogReport
from shared.policy.lengths import LengthKey
from shared.policy.placement import NeverFits, Rules
from shared.policy.profile import SpeedProfile
from shared.request import Incarnation, PlacementId, Priority, RequestId, SamplingParams
from shared.state import keys
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import PlacementKey, Role
from tests.contract.state_worlds import a_card, a_load

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))
NUM_PROMPT_TOKENS = 60


class CountingState(MemoryState):
    """Counts how often it was asked for the workers and for a placement."""

    num_looks = num_places = 0

    async def workers(self, *, num_slots):
        self.num_looks += 1
        return await super().workers(num_slots=num_slots)

    async def place(self, *args, **kwargs):
        self.num_places += 1
        return await super().place(*args, **kwargs)


class World:
    def __init__(self, state=None):
        self.now_s = 1_700_000_000.0
        self.ended = set()
        self.state = state or CountingState(MemoryStore(clock=lambda: self.now_s))
        metrics = IngestMetrics(CollectorRegistry())
        self.cluster = Cluster(self.state, metrics, lambda: self.now_s)
        ids = count()
        self.lengths = Lengths(metrics)
        self.placer = Placer(
            self.state,
            self.cluster,
            self.lengths,
            Rules(ttft_goal_s=2.0, tpot_goal_s=0.1, local_prefill=False),
            clock_s=lambda: self.now_s,
            new_placement_id=lambda: PlacementId(f"p{next(ids)}"),
            metrics=metrics,
        )
        self.backlog = Backlog(
            self.placer,
            self.lengths,
            has_ended=lambda job: job.request_id in self.ended,
            clock_s=lambda: self.now_s,
            metrics=metrics,
            log=SILENT,
        )

    async def claim(self, name, role, **card):
        card = a_card(name, role=role, **card)
        slot = await self.state.claim_slot(card, a_load(), num_slots=8, lease_ms=10 * keys.LEASE_MS)
        return slot, card

    async def placed(self, name, max_tokens=20):
        """What becomes of a request, when it is alone in the line."""
        self.backlog.add(self.waiting(name, max_tokens))
        _, settled = await self.backlog.next()
        return settled

    def waiting(
        self, name="r", max_tokens=20, epoch=1, *, tenant="t", priority=Priority.STANDARD, num_prompt=NUM_PROMPT_TOKENS
    ):
        job = SimpleNamespace(
            request_id=name, tenant=tenant, accepted_s=self.now_s, deadline_s=self.now_s + 60, priority=priority
        )
        admitted = SimpleNamespace(
            job=job,
            spec=SimpleNamespace(model="m", chat=False, stop=()),
            prompt_ids=array("i", range(num_prompt)),
            sampling=SamplingParams(max_tokens),
            cache_salt="t",
        )
        return Waiting(None, admitted, 0, epoch, array("i"), self.now_s)


@pytest.fixture
async def world():
    """One prefill worker, two decode workers, in a store that has been up for longer than a lease."""
    world = World()
    await world.claim("prefill", Role.PREFILL)
    for name in ("d0", "d1"):
        world.now_s += 0.6 * keys.LEASE_MS / 1000
        await world.claim(name, Role.DECODE)
    return world


async def test_a_recent_view_is_enough(world):
    await world.cluster.refresh()
    for name in ("a", "b", "c"):
        await world.placed(name)
    assert (world.state.num_looks, world.state.num_places) == (1, 3)


async def test_before_the_first_look_and_when_it_was_long_ago_the_store_is_asked(world):
    assert world.cluster.recent() is None
    await world.placed("a")
    world.now_s += VIEW_MAX_AGE_S + 0.01
    assert world.cluster.recent() is None
    await world.placed("b")
    assert world.state.num_looks == 2


async def test_its_own_placements_count_in_the_view(world):
    await world.cluster.refresh()
    placed = [await world.placed(name) for name in "abcd"]
    decoders = [each.placement.decode.incarnation for each in placed]
    assert sorted(decoders) == ["d0", "d0", "d1", "d1"]
    assert world.state.num_looks == 1

    seen = world.cluster.view
    assert await world.cluster.refresh() == seen, "as the store has them"


async def test_what_stands_already_is_not_counted_again(world):
    await world.cluster.refresh()
    first = await world.placed("a")
    await world.cluster.refresh()
    seen = world.cluster.view
    assert await world.placed("a") == Placed(first.placement, None)
    assert world.cluster.view == seen


async def test_a_worker_that_left_since_is_refused_by_the_store_and_another_is_found(world):
    await world.cluster.refresh()
    (gone,) = [worker.ref for worker in world.cluster.view.decode if worker.ref.incarnation == "d0"]
    await world.state.release_slot(gone.slot, gone.incarnation)
    placed = [await world.placed(name) for name in "ab"]
    assert {each.placement.decode.incarnation for each in placed} == {"d1"}
    assert world.state.num_looks == 2


async def test_a_view_that_says_never_is_not_believed(world):
    await world.cluster.refresh()
    for name in ("prefill2", "d2"):
        role = Role.PREFILL if name == "prefill2" else Role.DECODE
        slot, card = await world.claim(name, role, num_pages=200)
        world.state._store.holder(slot).card = replace(card, max_context=100_000)
    placed = await world.placed("long", max_tokens=5000)
    assert placed.placement.decode.incarnation == "d2"
    assert isinstance(await world.placed("longer", max_tokens=20_000), NeverFits)


@pytest.fixture
async def small_world():
    """Workers of ten pages each."""
    world = World()
    for name, role in (("small prefill", Role.PREFILL), ("small decode", Role.DECODE)):
        await world.claim(name, role, num_pages=10)
    for _ in range(3):
        world.now_s += 0.4 * keys.LEASE_MS / 1000
        await world.state.up_ms(lease_ms=keys.LEASE_MS)
    return world


async def test_a_choice_that_ran_waits_for_a_worker_that_holds_it_and_nobody_behind_it(small_world):
    world = small_world
    world.backlog.add(world.waiting("ran", max_tokens=1000, epoch=2))
    world.backlog.add(world.waiting("fits"))
    waiting, settled = await world.backlog.next()
    assert (waiting.admitted.job.request_id, settled.placement.decode.incarnation) == ("fits", "small decode")
    placing = asyncio.create_task(world.backlog.next())
    await asyncio.sleep(0.1)
    assert not placing.done()
    assert world.backlog.report(0).num_waiting == 0, "edges must not refuse because of it"
    for name, role in (("large prefill", Role.PREFILL), ("large decode", Role.DECODE)):
        await world.claim(name, role)
    await world.cluster.refresh()
    async with asyncio.timeout(5):
        waiting, settled = await placing
    assert (waiting.admitted.job.request_id, settled.placement.decode.incarnation) == ("ran", "large decode")


async def test_a_choice_that_ran_and_fits_nowhere_expires(small_world):
    world = small_world
    world.backlog.add(world.waiting("ran", max_tokens=1000, epoch=2))
    placing = asyncio.create_task(world.backlog.next())
    await asyncio.sleep(0.1)
    world.now_s += 61
    async with asyncio.timeout(5):
        _, settled = await placing
    assert settled == Expired()


def in_line(world, *waiting):
    for each in waiting:
        world.backlog.add(each)


async def names_placed(world, num):
    """The next so many that are placed."""
    names = []
    async with asyncio.timeout(5):
        for _ in range(num):
            waiting, settled = await world.backlog.next()
            assert isinstance(settled, Placed)
            names.append(waiting.admitted.job.request_id)
    return names


async def test_classes_then_tenants_in_turn_and_who_lost_its_workers_first(world):
    await world.cluster.refresh()
    in_line(world, *(world.waiting(f"a{n}", tenant="a") for n in range(3)), world.waiting("b0", tenant="b"))
    in_line(world, world.waiting("batch", priority=Priority.BATCH), world.waiting("lost", epoch=2))
    in_line(world, world.waiting("urgent", priority=Priority.INTERACTIVE), world.waiting("lost later", epoch=3))
    assert await names_placed(world, 8) == ["lost", "lost later", "urgent", "a0", "b0", "a1", "a2", "batch"]


async def test_something_small_goes_by_while_there_is_no_room_for_the_first(small_world):
    world = small_world
    await world.cluster.refresh()
    await world.placed("runs", max_tokens=100)
    in_line(world, world.waiting("large", num_prompt=500, max_tokens=120))
    in_line(world, *(world.waiting(f"small{n}", max_tokens=4) for n in range(20)))
    assert await names_placed(world, 2) == ["small0", "small1"]
    assert world.backlog._metrics.overtaken._value.get() == 2
    assert world.backlog.report(0).num_waiting == 19


def told_of_line(world):
    """What metrics say of the line, by class."""
    return {priority: gauge._value.get() for priority, gauge in world.backlog._metrics.backlog.items()}


async def test_batch_leaves_room_for_who_comes_next_and_waits(world):
    """A quarter of the decode workers' pages and places stay free, however much of it waits."""
    await world.claim("roomy prefill", Role.PREFILL, max_running=100)
    await world.cluster.refresh()
    in_line(world, *(world.waiting(f"batch{n}", priority=Priority.BATCH) for n in range(40)))
    placing = asyncio.create_task(names_placed(world, 40))
    await asyncio.sleep(0.3)
    assert not placing.done()
    view = await world.cluster.refresh()
    for worker in view.decode:
        assert worker.num_credits == 0.75 * worker.max_running
    report = world.backlog.report(0)
    assert (report.num_waiting, report.oldest_batch_wait_s, report.placed_per_s) == (0, 0.0, None)
    num_placed = sum(worker.num_credits for worker in view.decode)
    assert told_of_line(world) == {Priority.INTERACTIVE: 0, Priority.STANDARD: 0, Priority.BATCH: 40 - num_placed}
    world.now_s += 1
    assert world.backlog.report(0).oldest_batch_wait_s == 1
    in_line(world, world.waiting("urgent"))
    await asyncio.sleep(0.1)
    view = await world.cluster.refresh()
    assert sum(worker.num_credits for worker in view.decode) == 2 * 0.75 * view.decode[0].max_running + 1
    placing.cancel()


async def test_lengths_that_were_learnt_are_the_room_that_is_kept(world):
    await world.cluster.refresh()
    key = LengthKey("t", "m", "completion", NUM_PROMPT_TOKENS)
    for _ in range(300):
        world.lengths._predictor.observe(key, 700, is_cut=False)
    view = world.placer._request_view(world.waiting(max_tokens=2000))
    assert view.expected_new_tokens == pytest.approx(700, rel=0.1)
    assert view.reserve_new_tokens == pytest.approx(700, rel=0.1)
    resumed = replace(world.waiting(max_tokens=2000, epoch=2), accepted_ids=array("i", range(400)))
    assert world.placer._request_view(resumed).expected_new_tokens == pytest.approx(300, rel=0.3)
    await world.placed("one", max_tokens=2000)
    assert world.placer._usual.num_new_tokens == pytest.approx(700, rel=0.1)


@pytest.fixture
async def slow_world(world):
    """Its prefill worker takes 3 s for a prompt of 3000 tokens, and somebody has just come."""
    slow = SpeedProfile(base_s=0.001, row_s=1e-5, context_s=0.0, token_s=1e-3, pair_s=0.0)
    card = a_card("slow prefill", role=Role.PREFILL)
    await world.state.release_slot(0, Incarnation("prefill"))
    await world.state.claim_slot(card, replace(a_load(), profile=slow), num_slots=8, lease_ms=10 * keys.LEASE_MS)
    await world.cluster.refresh()
    await world.placed("somebody")
    return world


async def test_a_long_batch_prompt_waits_for_a_quiet_time_and_no_other_batch_behind_it(slow_world):
    world = slow_world
    in_line(world, world.waiting("long", priority=Priority.BATCH, num_prompt=3000))
    in_line(world, *(world.waiting(f"b{n}", priority=Priority.BATCH, num_prompt=600) for n in range(5)))
    for number in range(5):
        waiting, settled = await world.backlog.next()
        assert waiting.admitted.job.request_id == f"b{number}", "together they are as large as it"
        for worker in (settled.placement.prefill, settled.placement.decode):
            await world.state.give_back(settled.placement.id, worker.incarnation)
        await world.cluster.refresh()
    placing = asyncio.create_task(names_placed(world, 1))
    await asyncio.sleep(0.1)
    assert not placing.done()
    assert world.backlog.report(0).quiet_s == 0
    await world.state.computed(PlacementId("p0"), Incarnation("slow prefill"))
    for _ in range(4):
        world.now_s += 0.8
        world.backlog.note_others([BacklogReport(0, 0.0, None, quiet_s=0.0), BacklogReport(0, 0.0, None)])
        await world.state.up_ms(lease_ms=keys.LEASE_MS)
    await asyncio.sleep(0.1)
    assert not placing.done(), "somebody came to another ingest"
    world.backlog.note_others([BacklogReport(0, 0.0, None, quiet_s=3.0)])
    assert await placing == ["long"]


@pytest.mark.parametrize(("epoch", "wait_s"), [(1, 3605), (2, 5)], ids=["parked", "ran before"])
async def test_a_batch_job_has_waited_since_it_was_accepted(world, epoch, wait_s):
    """It may have been parked for hours: whoever comes now would be, too."""
    batch, urgent = world.waiting("b", epoch=epoch, priority=Priority.BATCH), world.waiting("urgent")
    world.now_s += 3600
    in_line(world, *(replace(each, admitted_s=world.now_s) for each in (batch, urgent)))
    world.now_s += 5
    report = world.backlog.report(0)
    assert (report.oldest_batch_wait_s, report.oldest_wait_s) == (wait_s, 5)


@pytest.mark.parametrize("priority", Priority)
async def test_who_waits_aside_for_a_larger_worker_is_not_counted_as_waiting(world, priority):
    """Its worker was larger than those that are there now. Batch never counts."""
    is_counted = priority is not Priority.BATCH
    for name, is_placed in (("found", True), ("late", False)):
        await world.cluster.refresh()
        in_line(world, world.waiting(name, max_tokens=20_000, epoch=2, priority=priority))
        assert world.backlog.report(0).num_waiting == is_counted
        placing = asyncio.create_task(world.backlog.next())
        await asyncio.sleep(0.05)
        assert world.backlog.report(0).num_waiting == 0
        if is_placed:
            for role in Role:
                card = replace(a_card(f"large {role}", role=role, num_pages=1000), max_context=50_000)
                await world.state.claim_slot(card, a_load(), num_slots=8, lease_ms=10 * keys.LEASE_MS)
            await world.cluster.refresh()
        else:
            world.now_s += 61
        async with asyncio.timeout(5):
            assert isinstance((await placing)[1], Placed if is_placed else Expired)
        assert world.backlog.report(0).num_waiting == 0
        for slot, role in enumerate(Role, 3):
            await world.state.release_slot(slot, Incarnation(f"large {role}"))


async def test_a_long_batch_prompt_that_waits_aside_expires(slow_world):
    world = slow_world
    in_line(world, world.waiting("long", priority=Priority.BATCH, num_prompt=3000))
    placing = asyncio.create_task(world.backlog.next())
    await asyncio.sleep(0.1)
    assert world.backlog._too_long
    in_line(world, world.waiting("urgent", num_prompt=4000))
    world.now_s += 61
    async with asyncio.timeout(5):
        assert type((await placing)[1]) is Expired
        assert type((await world.backlog.next())[1]) is Expired
    assert not len(world.backlog._line)
    assert not world.backlog._too_long, "its prompt is not kept"


async def test_batch_waits_while_somebody_waits_for_room_at_another_ingest(world):
    await world.cluster.refresh()
    calm, rushed = BacklogReport(3, 0.01, None), BacklogReport(1, 0.4, 0.0)
    world.backlog.note_others([calm, rushed])
    in_line(world, world.waiting("batch", priority=Priority.BATCH))
    placing = asyncio.create_task(names_placed(world, 1))
    await asyncio.sleep(0.3)
    assert not placing.done()
    world.backlog.note_others([calm, calm])
    assert await placing == ["batch"]


async def test_what_has_ended_leaves_the_line_and_its_credits_are_free(world):
    """Its placement's answer was lost, and so nobody told its workers."""
    await world.cluster.refresh()
    placed = await world.placed("r")
    in_line(world, world.waiting("r"), world.waiting("other"))
    world.ended.add("r")
    waiting, settled = await world.backlog.next()
    assert (waiting.admitted.job.request_id, settled) == ("r", EndedBefore())
    assert await world.state.find_placement(PlacementKey(RequestId("r"), 0, 1)) == placed.placement
    assert sum(each.num_credits for each in await world.state.workers(num_slots=8)) == 0
    assert await names_placed(world, 1) == ["other"]


async def test_who_has_ended_overtakes_nobody(small_world):
    world = small_world
    await world.cluster.refresh()
    await world.placed("runs", max_tokens=100)
    in_line(world, world.waiting("large", num_prompt=500, max_tokens=120))
    in_line(world, *(world.waiting(f"small{n}", max_tokens=4) for n in range(2)))
    world.ended.add("small0")
    assert await names_placed(world, 1) == ["small1"]


async def test_a_large_one_is_placed_though_another_ingest_has_ever_so_many_small_ones(small_world):
    """Each ingest keeps its own line, and one that looks fifty times a second finds all room that becomes free."""
    here, there = small_world, World(small_world.state)
    there.now_s = here.now_s
    await there.cluster.refresh()
    running = deque([(await there.placed(f"first{number}", max_tokens=30)).placement for number in range(4)])
    num_passed = 0

    async def time_passes():
        """One of those that run ends, and the lines are told of."""
        here.now_s += 0.2
        there.now_s = here.now_s
        done = running.popleft()
        for worker in (done.prefill, done.decode):
            await here.state.give_back(done.id, worker.incarnation)
        for name, role in (("small prefill", Role.PREFILL), ("small decode", Role.DECODE)):
            await here.claim(name, role, num_pages=10)
        told = [each.backlog.report(0) for each in (here, there)]
        here.backlog.note_others(told[1:])
        there.backlog.note_others(told[:1])
        for each in (here, there):
            await each.cluster.refresh()

    in_line(here, here.waiting("large", max_tokens=400))
    placing = asyncio.create_task(here.backlog.next())
    await asyncio.sleep(0.05)
    while not placing.done() and num_passed < 100:
        await time_passes()
        in_line(there, there.waiting(f"small{num_passed}", max_tokens=30))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                _, settled = await there.backlog.next()
                running.append(settled.placement)
                num_passed += 1
    assert placing.done(), f"{num_passed} others were placed meanwhile"
    assert num_passed < 60
