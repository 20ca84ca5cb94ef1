"""Views of the workers: from the store, with what this ingest placed since it was asked."""

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from services.ingest.cluster import Cluster
from shared.observe.metrics import IngestMetrics
from shared.policy.placement import Chosen
from shared.policy.profile import LinkRate, SpeedProfile
from shared.policy.views import ClusterView
from shared.request import Incarnation, WorkerRef
from shared.state import keys
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import Role
from shared.wire.explanation import Explanation
from tests.contract.state_worlds import a_card, a_key, a_load, a_placement

LEASE_MS = 10**6


class World:
    def __init__(self):
        self.now_s = 1_700_000_000.0
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.state = MemoryState(self.store)
        self.cluster = Cluster(self.state, IngestMetrics(CollectorRegistry()), lambda: self.now_s)
        self.num_placed = 0

    async def claim(self, name, role, load=None, **card):
        card = a_card(name, role=role, **card)
        slot = await self.state.claim_slot(card, load or a_load(), num_slots=8, lease_ms=LEASE_MS)
        return WorkerRef(slot, card.incarnation)

    async def place(self, chosen, *, count=True):
        self.num_placed += 1
        await self.state.place(
            a_key(f"r{self.num_placed}"),
            a_placement(f"p{self.num_placed}", chosen.prefill, chosen.decode),
            num_prefill_pages=chosen.num_prefill_pages,
            num_decode_pages=chosen.num_decode_pages,
            prefill_s=chosen.prefill_s,
            keep_ms=LEASE_MS,
        )
        if count:
            self.cluster.count(chosen)


def a_chosen(prefill, decode, num_prefill_pages=3, num_decode_pages=5, prefill_s=0.1):
    return Chosen(prefill, decode, num_prefill_pages, num_decode_pages, prefill_s, None, lambda: Explanation("", 0))


@pytest.fixture
async def world():
    world = World()
    world.p = await world.claim("p", Role.PREFILL)
    for name in ("d", "e"):
        world.now_s += 0.6 * keys.LEASE_MS / 1000
        ref = await world.claim(name, Role.DECODE)
        setattr(world, name, ref)
    await world.cluster.refresh()
    return world


async def test_a_view_has_what_the_worker_says_of_itself_and_what_was_placed_on_it(world):
    profile = SpeedProfile(1e-3, 2e-3, 3e-3, 4e-3, 5e-3)
    links = {Incarnation("p"): LinkRate(0.001, 1e9)}
    load = replace(a_load(draining=True), profile=profile, links=links)
    ref = await world.claim("f", Role.DECODE, load, num_pages=7)
    await world.place(a_chosen(world.p, world.d, 3, 5, 0.25), count=False)
    view = await world.cluster.refresh()
    by_name = {each.ref.incarnation: each for each in (*view.prefill, *view.decode)}
    said = by_name["f"]
    assert (said.ref, said.num_pages, said.max_batch_tokens, said.page_bytes) == (ref, 7, 256, 1024)
    assert (said.profile, said.links, said.takes_work) == (profile, links, False)
    prefill, decode = by_name["p"], by_name["d"]
    assert (prefill.num_credit_pages, prefill.num_credits, prefill.queued_prefill_s) == (3, 1, 0.25)
    assert (decode.num_credit_pages, decode.num_credits, decode.queued_prefill_s) == (5, 1, 0)
    assert decode.num_context_tokens == 5 * 64
    assert by_name["e"].num_credits == 0


@pytest.mark.parametrize("is_local", [False, True])
async def test_what_was_placed_since_counts_as_the_store_will_count_it(world, is_local):
    chosen = a_chosen(world.d, world.d, 0, 5, 0.1) if is_local else a_chosen(world.p, world.d)
    for _ in range(3):
        await world.place(chosen)
    counted = world.cluster.view
    assert sum(each.num_credits for each in counted.decode) == 3
    assert await world.cluster.refresh() == counted


async def test_a_placement_beside_a_reading_is_not_forgotten(world):
    """The store answers the reading before it takes the placement, which is told of first."""
    way_s = iter([(0.0, 0.05), (0.0, 0.05)])
    world.store.way_s = lambda: next(way_s, (0.0, 0.0))
    reading = asyncio.create_task(world.cluster.refresh())
    await asyncio.sleep(0.01)
    await world.place(a_chosen(world.p, world.d))
    view = await reading
    assert view.prefill[0].num_credits == 1
    assert await world.cluster.refresh() == view, "and counts once from the next one on"


async def test_of_two_readings_the_one_asked_for_later_counts(world):
    way_s = iter([(0.0, 0.05), (0.0, 0.05)])
    world.store.way_s = lambda: next(way_s, (0.0, 0.0))
    early = asyncio.create_task(world.cluster.refresh())
    await asyncio.sleep(0.01)
    await world.place(a_chosen(world.p, world.d), count=False)
    later = await world.cluster.refresh()
    assert later.prefill[0].num_credits == 1
    assert await early == later == world.cluster.view


async def test_views_of_workers_that_did_not_change_are_kept(world):
    first = world.cluster.view
    await world.place(a_chosen(world.p, world.d), count=False)
    second = await world.cluster.refresh()
    assert second.prefill[0] is not first.prefill[0]
    assert second.decode[0] is not first.decode[0]
    assert second.decode[1] is first.decode[1]


async def test_nobody_is_there_while_the_store_is_new_and_then_all_are_as_they_were(world):
    world.store.flush()
    assert await world.cluster.refresh() == ClusterView((), ())
    for ref, role in ((world.p, Role.PREFILL), (world.d, Role.DECODE)):
        await world.state.beat(ref.slot, a_card(ref.incarnation, role=role), a_load(), lease_ms=LEASE_MS)
    for _ in range(3):
        world.now_s += 0.4 * keys.LEASE_MS / 1000
        view = await world.cluster.refresh()
    assert [each.ref for each in (*view.prefill, *view.decode)] == [world.p, world.d]
