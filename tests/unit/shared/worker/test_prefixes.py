"""Prompts whose first pages come from a peer: real engines, the twin's transfers, a virtual clock, and faults."""

import asyncio
from collections import deque
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from shared.blocks import PAGE_TOKENS, token_ids
from shared.engine.fake import fake_answer, fake_engine
from shared.engine.port import EngineRequest
from shared.observe.metrics import PrefixFetch, WorkerMetrics
from shared.policy.profile import SpeedProfile
from shared.request import Incarnation, SamplingParams, WorkerRef
from shared.transfer.local import LocalNetwork, LocalTransfer
from shared.wire.to_worker import FetchTicket
from shared.worker.lending import EngineLender
from shared.worker.prefixes import UNMEASURED_LIMIT_S, Prefixes
from tests.late_host_pages import LateHostPages
from tests.virtual_loop import run_virtually

NUM_NEW = 3
STEP_S = 0.05
ADDRESS = "source:1"


class SteppedEngine:
    """An engine on the loop: its steps take a while, and commands wait for the end of one.

    Attributes:
        answers: ids by key.
        extra_s: every command waits so much longer.
    """

    def __init__(self, engine, tasks):
        self.engine = engine
        self.answers = {}
        self.extra_s = 0.0
        self._commands = deque()
        self._task = tasks.create_task(self._run())

    def call(self, command):
        future = asyncio.get_running_loop().create_future()
        self._commands.append((asyncio.get_running_loop().time() + self.extra_s, command, future))
        return future

    async def call_beside(self, command):
        return await self.call(command)

    async def _run(self):
        while True:
            await asyncio.sleep(STEP_S)
            while self._commands and self._commands[0][0] <= asyncio.get_running_loop().time():
                _, command, future = self._commands.popleft()
                try:
                    result, error = command(self.engine), None
                except ValueError as raised:
                    result, error = None, raised
                if not future.cancelled():
                    future.set_result(result) if error is None else future.set_exception(error)
            if self.engine.has_work():
                for token in self.engine.step().tokens:
                    self.answers.setdefault(token.key, []).append(token.token_id)
            self.engine.check()

    @property
    def is_idle(self):
        return not self._commands and not self.engine.has_work() and not self.engine.stats().num_waiting

    def stop(self):
        self._task.cancel()


class Worker:
    """One end: an engine, its transfer, and how prompts enter."""

    def __init__(self, place, name, address, num_pages, **engine_settings):
        self.name = Incarnation(name)
        self.metrics = WorkerMetrics(CollectorRegistry(), "m")
        late = partial(LateHostPages, max_looks=3)
        engine = fake_engine(num_pages=num_pages, max_batch_tokens=128, host_pages=late, **engine_settings)
        self.engine = SteppedEngine(engine, place.tasks)
        self.transfer = LocalTransfer(
            place.network,
            engine.cache,
            address=address,
            incarnation=self.name,
            clock=asyncio.get_running_loop().time,
            max_part_bytes=2 * engine.cache.layout.page_bytes,
        )
        self.lender = EngineLender(self.engine, self.metrics)
        self.profile = None
        self.prefixes = Prefixes(
            SimpleNamespace(
                me=WorkerRef(0, self.name),
                engine=self.engine,
                transfer=self.transfer,
                tasks=place.tasks,
                clock_s=asyncio.get_running_loop().time,
                page_bytes=engine.cache.layout.page_bytes,
                metrics=self.metrics,
                log=structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical")),
                profile=lambda: self.profile,
            )
        )

    def count_of(self, outcome):
        return self.metrics.prefix_fetches.labels("m", outcome)._value.get()

    @property
    def counts(self):
        return {outcome: self.count_of(outcome) for outcome in PrefixFetch if self.count_of(outcome)}


class Place:
    """A peer that holds prefixes, and a worker that computes prompts."""

    def __init__(self, tasks, lifetime):
        self.tasks = tasks
        self.network = LocalNetwork(delay_s=0.01, bytes_per_s=None)
        self._lifetime = lifetime
        self.asked = {}
        self._numbers = count()
        self.num_tickets = 0

    async def start(self, num_pages=16, source_pages=16, **host_memory):
        self.source_life = AsyncExitStack()
        self.source = Worker(self, "source", ADDRESS, source_pages, **host_memory)
        await self.source_life.enter_async_context(self.source.transfer)
        self.source.transfer.lend_from(self.source.lender)
        self.puller = Worker(self, "puller", "puller:1", num_pages, **host_memory)
        await self._lifetime.enter_async_context(self.puller.transfer)

    async def die(self):
        """The source ends; whatever asks for it later finds nobody."""
        await self.source_life.aclose()

    def run_at_source(self, prompt):
        key = f"s{next(self._numbers)}"
        self.asked[key] = (self.source, prompt)
        self.source.engine.call(lambda engine: engine.add(a_request(key, prompt)))

    def run_at_puller(self, prompt, num_pages, source="source"):
        key = f"p{next(self._numbers)}"
        self.asked[key] = (self.puller, prompt)
        self.num_tickets += num_pages > 0
        ticket = FetchTicket(WorkerRef(1, Incarnation(source)), ADDRESS, num_pages)
        self.puller.prefixes.add(a_request(key, prompt), ticket).add_done_callback(lambda done: done.exception())
        return key

    def abort(self, key):
        worker, _ = self.asked.pop(key)
        worker.engine.call(lambda engine: engine.abort(key))

    async def idle(self):
        async with asyncio.timeout(1000):
            while True:
                await asyncio.sleep(1.0)
                engines = self.source.engine, self.puller.engine
                if all(engine.is_idle for engine in engines) and sum(self.puller.counts.values()) == self.num_tickets:
                    await asyncio.sleep(1.0)
                    return

    def check(self):
        """All were answered right, nothing is left behind, and each ticket was counted once."""
        for key, (worker, prompt) in self.asked.items():
            assert worker.engine.answers[key] == answer(prompt), key
        for worker in (self.source, self.puller):
            engine = worker.engine.engine
            assert engine.stats().num_free_pages == engine.stats().num_pages
            assert not engine._scheduler.blocks._fills
            assert not engine._scheduler.blocks._loans
            assert worker.transfer.num_offers == 0
        assert not self.network.links


def a_prompt(family, length):
    return tuple(3 + (7 * family + place) % 200 for place in range(length))


def a_request(key, prompt):
    return EngineRequest(key, token_ids(prompt), len(prompt), SamplingParams(max_tokens=NUM_NEW, temperature=0.0))


def answer(prompt):
    return list(fake_answer(token_ids(prompt), len(prompt), SamplingParams(max_tokens=NUM_NEW, temperature=0.0)))


def at_place(scene, **options):
    async def run():
        async with AsyncExitStack() as lifetime, asyncio.TaskGroup() as tasks:
            place = Place(tasks, lifetime)
            await place.start(**options)
            await scene(place)
            await place.idle()
            place.check()
            await place.die()
            for task in tasks._tasks:
                task.cancel()

    run_virtually(run())


PROMPT = a_prompt(0, 5 * PAGE_TOKENS + 20)


async def hold(place, prompt=PROMPT):
    """Let the source compute a prompt, and so hold its pages."""
    place.run_at_source(prompt)
    while not place.source.engine.answers:
        await asyncio.sleep(STEP_S)
    await asyncio.sleep(10 * STEP_S)


def cached(place):
    return place.puller.engine.engine.stats().num_prefix_hits


def test_what_the_peer_holds_is_not_computed():
    async def scene(place):
        await hold(place)
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.WHOLE: 1}
        assert cached(place) == 5 * PAGE_TOKENS
        page_bytes = place.puller.transfer.cache.layout.page_bytes
        assert place.puller.metrics.prefix_fetch_bytes._value.get() == 5 * page_bytes
        assert place.source.metrics.lent_pages._value.get() == 5

    at_place(scene)


@pytest.mark.parametrize(("num_held", "outcome"), [(3, PrefixFetch.PART), (0, PrefixFetch.GONE)])
def test_what_it_does_not_hold_is(num_held, outcome):
    async def scene(place):
        if num_held:
            await hold(place, PROMPT[: num_held * PAGE_TOKENS])
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {outcome: 1}
        assert cached(place) == num_held * PAGE_TOKENS

    at_place(scene)


def test_what_is_here_is_not_fetched_again():
    async def scene(place):
        await hold(place)
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.WHOLE: 1, PrefixFetch.NEEDLESS: 1}

    at_place(scene)


def test_what_is_in_the_peers_host_memory_comes_too():
    async def scene(place):
        await hold(place)
        for family in range(1, 20):
            place.run_at_source(a_prompt(family, PAGE_TOKENS + 1))
            await asyncio.sleep(10 * STEP_S)  # time to save what it evicts
        restored = place.source.engine.engine.stats().num_restored_bytes
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.WHOLE: 1}
        assert place.source.engine.engine.stats().num_restored_bytes > restored

    at_place(scene, source_pages=8, num_host_pages=64)


def test_two_who_want_the_same_pages_fetch_them_once():
    async def scene(place):
        await hold(place)
        for _ in range(2):
            place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.WHOLE: 1, PrefixFetch.NEEDLESS: 1}
        assert cached(place) == 2 * 5 * PAGE_TOKENS

    at_place(scene)


def test_a_request_that_is_stopped_leaves_the_fetch_to_others():
    async def scene(place):
        await hold(place)
        first = place.run_at_puller(PROMPT, 5)
        place.run_at_puller(PROMPT, 5)
        await asyncio.sleep(1.5 * STEP_S)
        place.abort(first)
        await place.idle()
        assert cached(place) == 5 * PAGE_TOKENS

    at_place(scene)


def test_a_fetch_that_takes_longer_than_computing_is_given_up():
    async def scene(place):
        await hold(place)
        place.source.engine.extra_s = 100.0
        asked_s = asyncio.get_running_loop().time()
        key = place.run_at_puller(PROMPT, 5)
        while key not in place.puller.engine.answers:
            await asyncio.sleep(STEP_S)
        assert asyncio.get_running_loop().time() - asked_s < UNMEASURED_LIMIT_S + 1.0
        assert place.puller.counts == {PrefixFetch.FAILED: 1}

    at_place(scene)


def test_the_limit_follows_from_the_workers_own_speed():
    async def scene(place):
        await hold(place)
        place.puller.profile = SpeedProfile(1.0, 0.0, 0.0, 0.1, 0.0)  # 32 s for five pages
        place.source.engine.extra_s = 20.0
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.WHOLE: 1}

    at_place(scene)


def test_without_room_for_the_pages_the_prompt_is_computed():
    async def scene(place):
        await hold(place)
        place.run_at_puller(a_prompt(1, 11 * PAGE_TOKENS), 0)
        await asyncio.sleep(3 * STEP_S)
        place.run_at_puller(PROMPT, 5)
        await place.idle()
        assert place.puller.counts == {PrefixFetch.NO_ROOM: 1}

    at_place(scene, num_pages=14)


def test_a_prompt_that_the_engine_never_runs_fetches_nothing():
    async def scene(place):
        await hold(place)
        refused = place.puller.prefixes.add(
            a_request("a", (*PROMPT, 10**6)), FetchTicket(WorkerRef(1, Incarnation("source")), ADDRESS, 5)
        )
        with pytest.raises(ValueError, match="vocab_size"):
            await refused
        assert place.source.metrics.lent_pages._value.get() == 0

    at_place(scene)


LENGTHS = st.sampled_from([40, PAGE_TOKENS, 2 * PAGE_TOKENS + 1, 4 * PAGE_TOKENS, 6 * PAGE_TOKENS + 30])
PROMPTS = st.builds(a_prompt, st.integers(0, 2), LENGTHS)
EVENTS = st.one_of(
    st.tuples(st.just("compute"), PROMPTS),
    st.tuples(st.just("fetch"), PROMPTS, st.integers(0, 8)),
    st.tuples(st.just("stranger"), PROMPTS, st.integers(1, 8)),
    st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.04, 0.2, 1.0, 5.0])),
    st.tuples(st.just("late"), st.sampled_from([0.0, 0.1, 1.9, 3.0])),
    st.tuples(st.just("slow"), st.sampled_from([0.0, 0.01, 0.5, 3.0])),
    st.tuples(st.just("cut")),
    st.tuples(st.just("break")),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("die")),
)


def abort_one(place, index):
    keys = [key for key in place.asked if key.startswith("p")]
    if keys:
        place.abort(keys[index % len(keys)])


HAPPEN = {
    "compute": Place.run_at_source,
    "fetch": Place.run_at_puller,
    "stranger": lambda place, *details: place.run_at_puller(*details, source="an earlier start"),
    "late": lambda place, seconds: setattr(place.source.engine, "extra_s", seconds),
    "slow": lambda place, seconds: setattr(place.network, "delay_s", seconds),
    "cut": lambda place: place.network.cut(ADDRESS),
    "break": lambda place: place.network.fail_next_pull(),
    "abort": abort_one,
}
AWAITED = {"sleep": lambda _, seconds: asyncio.sleep(seconds), "die": Place.die}


@given(st.lists(EVENTS, max_size=25), st.sampled_from([8, 12, 30]), st.sampled_from([0, 20]))
@settings(max_examples=40, deadline=None)
@example([("compute", PROMPT), ("sleep", 5.0), ("fetch", PROMPT, 5), ("sleep", 0.04), ("cut",)], 12, 0)
@example([("compute", PROMPT), ("sleep", 5.0), ("fetch", PROMPT, 5), ("sleep", 0.2), ("die",)], 12, 0)
@example([("compute", PROMPT), ("sleep", 5.0), ("late", 3.0), ("fetch", PROMPT, 5), ("sleep", 1.0), ("die",)], 12, 0)
@example([("compute", PROMPT), ("sleep", 5.0), ("break",), ("fetch", PROMPT, 5)], 12, 0)
def test_whatever_happens_no_page_is_wrong_and_none_is_lost(events, num_pages, num_host_pages):
    async def scene(place):
        for kind, *details in events:
            if kind in HAPPEN:
                HAPPEN[kind](place, *details)
            else:
                await AWAITED[kind](place, *details)
        place.source.engine.extra_s = 0.0
        place.network.delay_s = 0.0

    at_place(scene, num_pages=num_pages, source_pages=num_pages, num_host_pages=num_host_pages)
