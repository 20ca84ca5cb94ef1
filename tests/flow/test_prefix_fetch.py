"""A prompt whose first pages another worker holds, through all services: fetched, and handed over as any other."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.ingest import placer
from shared.blocks import PAGE_TOKENS
from shared.engine.fake import fake_engine
from shared.observe.metrics import LocalPrefill, PrefixFetch
from shared.policy.placement import Chosen, Fetch
from shared.request import Incarnation, WorkerRef
from tests.flow.system import MODEL
from tests.flow.test_whole import a_body, a_system, answer, expected

NUM_PAGES = 4
FIRST = list(range(10, 10 + NUM_PAGES * PAGE_TOKENS + 30))
SECOND = [*FIRST[: NUM_PAGES * PAGE_TOKENS], *range(400, 470)]
"""Begins as FIRST does."""


class Brain:
    """Places all as the test says, whatever the policy would do."""

    def __init__(self, system, monkeypatch):
        self.prefill = self.decode = self.fetch = None
        self._system = system
        decide = placer.place

        def place(*arguments, **options):
            chosen = decide(*arguments, **options)
            if not isinstance(chosen, Chosen) or self.prefill is None:
                return chosen
            return replace(chosen, prefill=self.prefill, decode=self.decode, fetch=self.fetch)

        monkeypatch.setattr(placer, "place", place)

    async def next(self, prefill, decode, source=None, num_pages=NUM_PAGES):
        self.prefill, self.decode = await self.ref(prefill), await self.ref(decode)
        self.fetch = None if source is None else Fetch(await self.ref(source), num_pages)

    async def ref(self, worker):
        workers = await worker.service._parts.state.workers(num_slots=64)
        return next(each.ref for each in workers if each.card.incarnation == worker.incarnation)


@asynccontextmanager
async def a_cluster(monkeypatch, **settings):
    async with a_system(prefills=2, decodes=2, **settings) as system:
        system.brain = Brain(system, monkeypatch)
        yield system


async def run(system, prompt, num_new=12):
    state = await system.ended(await system.submit(a_body(prompt, num_new)))
    assert answer(state) == expected(prompt, num_new)


def fetches(worker):
    metrics = worker.service._parts.metrics
    counts = {outcome: metrics.prefix_fetches.labels(MODEL, outcome)._value.get() for outcome in PrefixFetch}
    return {outcome: count for outcome, count in counts.items() if count}


async def test_a_prefill_worker_gets_what_another_holds_and_hands_over_all_of_it(monkeypatch):
    async with a_cluster(monkeypatch) as system:
        first, second, decode, _ = system.workers
        await system.brain.next(first, decode)
        await run(system, FIRST)
        await system.brain.next(second, decode, source=first)
        await run(system, SECOND)
        assert fetches(second) == {PrefixFetch.WHOLE: 1}
        assert second.engine.stats().num_prefix_hits == NUM_PAGES * PAGE_TOKENS
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 0
        await system.quiet()


async def test_a_decode_worker_gives_the_history_that_it_has_to_whoever_computes_the_next_turn(monkeypatch):
    async with a_cluster(monkeypatch) as system:
        first, second, decode, other = system.workers
        await system.brain.next(first, decode)
        await run(system, FIRST)
        await system.brain.next(second, other, source=decode)
        await run(system, SECOND)
        assert fetches(second) == {PrefixFetch.WHOLE: 1}
        await system.quiet()


async def test_a_decode_worker_that_computes_a_prompt_itself_fetches_too(monkeypatch):
    async with a_cluster(monkeypatch) as system:
        first, _, decode, other = system.workers
        await system.brain.next(first, decode)
        await run(system, FIRST)
        await system.brain.next(other, other, source=decode)
        await run(system, SECOND)
        assert fetches(other) == {PrefixFetch.WHOLE: 1}
        assert system.num_local_prefills(LocalPrefill.CHOSEN) == 1
        await system.quiet()


async def test_a_wrong_hint_costs_a_count_and_the_computing_and_no_token(monkeypatch):
    async with a_cluster(monkeypatch, make_engine=lambda: fake_engine(num_pages=12)) as system:
        first, second, decode, _ = system.workers
        await system.brain.next(first, decode)
        await run(system, FIRST)
        for number in range(3):
            await run(system, [500 + number, *range(100, 100 + 9 * PAGE_TOKENS)])  # evicts FIRST
        await system.brain.next(second, decode, source=first)
        await run(system, SECOND)
        assert fetches(second) == {PrefixFetch.GONE: 1}
        assert second.engine.stats().num_prefix_hits == 0
        await system.quiet()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_source_that_dies_costs_no_more(monkeypatch, when):
    async with a_cluster(monkeypatch) as system:
        first, second, decode, other = system.workers
        await system.brain.next(first, other)
        await run(system, FIRST)
        await system.brain.next(second, decode, source=first)
        system.network.delay_s = 0.3
        job = await system.submit(a_body(SECOND, 12))
        if when == "meanwhile":
            async with asyncio.timeout(10):
                while not system.network.links:
                    await asyncio.sleep(0.005)
        await first.kill()
        system.workers.remove(first)
        state = await system.ended(job)
        assert answer(state) == expected(SECOND, 12)
        assert fetches(second) == {PrefixFetch.FAILED: 1}
        await system.quiet()


async def test_a_source_that_is_gone_from_the_registry_is_left_out(monkeypatch):
    async with a_cluster(monkeypatch) as system:
        _, second, decode, _ = system.workers
        await system.brain.next(second, decode)
        system.brain.fetch = Fetch(WorkerRef(40, Incarnation("gone")), NUM_PAGES)
        await run(system, FIRST)
        assert fetches(second) == {}
        await system.quiet()
