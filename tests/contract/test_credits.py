"""Credits under two ingests, workers that die, calls made twice and lost answers: the real Redis and the twin.

A model tells what stands after each call. Nothing is ever taken over a worker's pages or its places, the sums are those
of what stands, and when all is given back nothing is left.
"""

import asyncio
import copy
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared.request import Incarnation, PlacementId, WorkerRef
from shared.state import keys
from shared.state.memory import MemoryState
from shared.state.port import Placement, PlacementKey, Role
from shared.state.redis import redis_state
from tests.contract.state_worlds import MemoryWorld, a_card, a_key, a_load, a_placement, own_database

NUM_SLOTS = 4
LEASE_MS = 10**7
LONG_MS = 10**6
MICROSECONDS = 1_000_000


@dataclass
class Worker:
    ref: WorkerRef
    num_pages: int
    max_running: int
    takes_work: bool = True


@dataclass
class Model:
    """What must stand in the store; credits are (pages, work in us, end in ms)."""

    now_ms: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)
    credits: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    standing: dict[PlacementKey, tuple[Placement, int]] = field(default_factory=dict)

    def place(self, key, placement, needs, keep_ms):
        """Needs: incarnation -> (pages, work)."""
        found = self.standing.get(key)
        if found is not None and found[1] > self.now_ms:
            return found[0]
        if not all(self._has_room(ref, needs[ref.incarnation][0]) for ref in (placement.prefill, placement.decode)):
            return None
        ends_ms = self.now_ms + keep_ms
        for name, (pages, work_us) in needs.items():
            self.credits[name][placement.id] = (pages, work_us, ends_ms)
        self.standing[key] = (placement, ends_ms)
        return placement

    def _has_room(self, ref, pages):
        worker = self.workers.get(ref.incarnation)
        if worker is None or not worker.takes_work:
            return False
        taken = self.credits[ref.incarnation].values()
        return len(taken) < worker.max_running and sum(each[0] for each in taken) + pages <= worker.num_pages

    def taken(self, name):
        taken = self.credits[name].values()
        return sum(each[0] for each in taken), len(taken), sum(each[1] for each in taken)


class Credits(RuleBasedStateMachine):
    """Two ingests, and workers whose credits they share.

    Attributes:
        redis_url: None is the twin, where time passes too.
    """

    redis_url = None

    def __init__(self):
        super().__init__()
        self.model = Model()
        self.known: list[tuple[PlacementId, str]] = []
        self.refs: list[WorkerRef] = []
        self.num_names = 0
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.states = self.runner.run(self._connect())

    async def _connect(self):
        if self.redis_url is None:
            self.world = MemoryWorld()
            return [MemoryState(self.world.store) for _ in range(2)]
        states = [await self.stack.enter_async_context(redis_state(self.redis_url)) for _ in range(2)]
        await states[0]._client.flushdb()
        return states

    def call(self, *calls):
        async def made():
            return await asyncio.gather(*calls)

        return self.runner.run(made())

    def name(self, kind):
        self.num_names += 1
        return f"{kind}{self.num_names}"

    @initialize()
    def two_workers(self):
        self.worker_starts(10, 4)
        self.worker_starts(30, 2)

    @precondition(lambda self: len(self.model.workers) < NUM_SLOTS)
    @rule(num_pages=st.integers(0, 30), max_running=st.integers(1, 4))
    def worker_starts(self, num_pages, max_running):
        name = self.name("w")
        card = a_card(name, num_pages=num_pages, max_running=max_running, role=Role.DECODE)
        (slot,) = self.call(self.states[0].claim_slot(card, a_load(), num_slots=NUM_SLOTS, lease_ms=LEASE_MS))
        ref = WorkerRef(slot, Incarnation(name))
        self.model.workers[name] = Worker(ref, num_pages, max_running)
        self.model.credits[name] = {}
        self.refs.append(ref)

    @precondition(lambda self: self.model.workers)
    @rule(data=st.data())
    def worker_dies(self, data):
        name = data.draw(st.sampled_from(sorted(self.model.workers)))
        ref = self.model.workers.pop(name).ref
        self.call(self.states[0].release_slot(ref.slot, ref.incarnation))

    @precondition(lambda self: self.model.workers)
    @rule(data=st.data(), draining=st.booleans())
    def worker_beats(self, data, draining):
        self._beat(data.draw(st.sampled_from(sorted(self.model.workers))), draining)

    def _beat(self, name, draining):
        worker = self.model.workers[name]
        card = a_card(name, num_pages=worker.num_pages, max_running=worker.max_running)
        load = a_load(draining=draining)
        (renewed,) = self.call(self.states[0].beat(worker.ref.slot, card, load, lease_ms=LEASE_MS))
        assert renewed is not None
        worker.takes_work = not draining
        held = self.model.credits[name]
        self.model.credits[name] = {key: each for key, each in held.items() if each[2] > self.model.now_ms}

    def _draw_placing(self, data):
        """A question, new or asked before, and what is wanted: of live and of dead workers, of two or of one."""
        key = a_key(f"r{data.draw(st.integers(0, 9))}", epoch=data.draw(st.integers(1, 2)))
        refs = [worker.ref for worker in self.model.workers.values()] * 3 + self.refs[-3:]
        prefill, decode = data.draw(st.sampled_from(refs)), data.draw(st.sampled_from(refs))
        placement = a_placement(self.name("p"), prefill, decode)
        pages = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        work_us = data.draw(st.integers(0, 10**7))
        keep_ms = data.draw(st.sampled_from([LONG_MS, 3000] if self.redis_url is None else [LONG_MS]))
        needs = {prefill.incarnation: (pages[0], work_us)}
        if prefill == decode:
            needs = {prefill.incarnation: (sum(pages), work_us)}
        else:
            needs[decode.incarnation] = (pages[1], 0)
        return key, placement, pages, work_us, needs, keep_ms

    def _place(self, state, placing):
        key, placement, (prefill, decode), work_us, _, keep_ms = placing
        return state.place(
            key,
            placement,
            num_prefill_pages=prefill,
            num_decode_pages=decode,
            prefill_s=work_us / MICROSECONDS,
            keep_ms=keep_ms,
        )

    def _expect(self, model, placing):
        key, placement, _, _, needs, keep_ms = placing
        return model.place(key, placement, needs, keep_ms)

    def _know(self, placing, found):
        if found is not None:
            self.known += [(found.id, ref.incarnation) for ref in (found.prefill, found.decode)]

    @rule(data=st.data(), again=st.booleans())
    def an_ingest_places(self, data, again):
        """Again: the first answer is lost, and perhaps the ingest with it."""
        placing = self._draw_placing(data)
        for state in self.states if again else self.states[:1]:
            expected = self._expect(self.model, placing)
            (found,) = self.call(self._place(state, placing))
            assert found == expected
            self._know(placing, found)
            assert self.call(state.find_placement(placing[0])) == [found]

    @rule(data=st.data())
    def both_place_at_once(self, data):
        placings = [self._draw_placing(data), self._draw_placing(data)]
        found = self.call(*(self._place(*each) for each in zip(self.states, placings, strict=True)))
        for order in ((0, 1), (1, 0)):
            model = copy.deepcopy(self.model)
            answers = {index: self._expect(model, placings[index]) for index in order}
            if [answers[0], answers[1]] == found:
                self.model = model
                break
        else:
            pytest.fail(f"no order of the two tells {found}")
        for placing, each in zip(placings, found, strict=True):
            self._know(placing, each)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), again=st.booleans())
    def a_prefill_is_computed(self, data, again):
        placement, name = data.draw(st.sampled_from(self.known))
        self.call(*(state.computed(placement, Incarnation(name)) for state in self.states[: 1 + again]))
        if placement in self.model.credits[name]:
            pages, _, ends_ms = self.model.credits[name][placement]
            self.model.credits[name][placement] = (pages, 0, ends_ms)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), again=st.booleans())
    def a_placement_is_given_back(self, data, again):
        self._give_back(*data.draw(st.sampled_from(self.known)), again=again)

    def _give_back(self, placement, name, *, again=False):
        self.call(*(state.give_back(placement, Incarnation(name)) for state in self.states[: 1 + again]))
        self.model.credits[name].pop(placement, None)

    @precondition(lambda self: self.redis_url is None)
    @rule(ms=st.integers(1, 5000))
    def time_passes(self, ms):
        self.world.now_s += ms / 1000
        self.model.now_ms += ms
        for name, worker in self.model.workers.items():
            self._beat(name, not worker.takes_work)

    @invariant()
    def the_store_knows_just_what_stands(self):
        (found,) = self.call(self.states[0].workers(num_slots=NUM_SLOTS))
        assert {each.card.incarnation for each in found} == set(self.model.workers)
        for each in found:
            pages, count, work_us = self.model.taken(each.card.incarnation)
            assert (each.num_credit_pages, each.num_credits) == (pages, count)
            assert each.credit_work_s == work_us / MICROSECONDS
            assert pages <= each.card.num_pages
            assert count <= each.card.max_running

    def teardown(self):
        try:
            for placement, name in self.known:
                self._give_back(placement, name)
            self.the_store_knows_just_what_stands()
            self.runner.run(self._check_nothing_is_left())
        finally:
            self.runner.run(self.stack.aclose())
            self.runner.close()

    async def _check_nothing_is_left(self):
        """Of the dead neither."""
        for ref in self.refs:
            if self.redis_url is None:
                traces = self.world.store.traces(ref.incarnation)
                assert traces is None or not traces.credits
            else:
                left = await self.states[0]._client.hgetall(keys.worker_credits(ref.incarnation))
                assert left in ({}, {b"total": b"0", b"work": b"0"})


def run(machine, *, max_examples):
    quick = settings(
        max_examples=max_examples,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(machine, settings=quick)


def test_credits_of_the_twin():
    run(Credits, max_examples=30)


def test_credits_of_the_real_store(redis_url):
    class RealCredits(Credits):
        """On a server."""

    RealCredits.redis_url = own_database(redis_url)
    run(RealCredits, max_examples=12)
