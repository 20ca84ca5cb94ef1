"""What every coordination store does: the real Redis and the twin in memory."""

import asyncio
import socket
from dataclasses import replace
from random import Random

import orjson
import pytest
import structlog
from prometheus_client import CollectorRegistry

from shared.blocks import BlockHash
from shared.policy.admission import BacklogReport, Outlook
from shared.policy.limits import TenantLimits, Verdict
from shared.policy.line import Blocked
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Incarnation, PlacementId, RequestId, WorkerRef
from shared.state import keys, redis
from shared.state.port import BlockNews, LiveWorker, Renewed, RequestHint, StateUnavailable, WorkerLoad, pieces
from shared.state.redis import redis_state
from tests.contract.state_worlds import MemoryWorld, a_card, a_key, a_load, a_placement, own_database, redis_world

NUM_SLOTS = 4
NUM_PARTITIONS = 16
KEEP_MS = 60_000


@pytest.fixture(params=["memory", "redis"])
def server(request):
    """URL of the real server, or None for the twin."""
    return None if request.param == "memory" else request.getfixturevalue("redis_url")


@pytest.fixture
async def world(server):
    if server is None:
        yield MemoryWorld()
        return
    async with redis_world(server) as world:
        yield world


@pytest.fixture
def state(world):
    return world.state


async def claim(world, name, **card):
    """The worker's ref; its slot is the lowest free one."""
    slot = await world.state.claim_slot(
        a_card(name, **card), a_load(), num_slots=NUM_SLOTS, lease_ms=10 * world.lease_ms
    )
    return None if slot is None else WorkerRef(slot, Incarnation(name))


async def beat(world, *workers):
    for worker in workers:
        card = a_card(worker.incarnation)
        assert await world.state.beat(worker.slot, card, a_load(), lease_ms=10 * world.lease_ms)


async def lease(world, member, num_partitions=NUM_PARTITIONS, group="g"):
    return await world.state.lease_partitions(
        group, Incarnation(member), num_partitions=num_partitions, lease_ms=world.lease_ms
    )


async def place(world, prefill, decode, name="p", key=None, need=(10, 20)):
    return await world.state.place(
        key or a_key(),
        a_placement(name, prefill, decode),
        num_prefill_pages=need[0],
        num_decode_pages=need[1],
        prefill_s=need[2] if len(need) > 2 else 0.0,
        keep_ms=KEEP_MS,
    )


async def credits_of(world):
    """Incarnation -> (pages, placements) taken."""
    return {
        found.card.incarnation: (found.num_credit_pages, found.num_credits)
        for found in await world.state.workers(num_slots=NUM_SLOTS)
    }


# Workers


async def test_workers_take_the_lowest_free_slot_and_keep_it(world):
    assert [await claim(world, name) for name in "abcd"] == [WorkerRef(i, Incarnation(n)) for i, n in enumerate("abcd")]
    assert await claim(world, "e") is None, "all are taken"
    assert await claim(world, "c") == WorkerRef(2, Incarnation("c")), "asked again"

    await world.state.release_slot(1, Incarnation("b"))
    assert await claim(world, "e") == WorkerRef(1, Incarnation("e"))


async def test_only_its_holder_releases_a_slot(world):
    await claim(world, "a")
    await world.state.release_slot(0, Incarnation("b"))
    assert await claim(world, "b") == WorkerRef(1, Incarnation("b"))
    await world.state.release_slot(0, Incarnation("a"))
    await world.state.release_slot(0, Incarnation("a"))
    assert await claim(world, "c") == WorkerRef(0, Incarnation("c"))


async def test_workers_show_card_and_latest_load(world, state):
    await claim(world, "a")
    await claim(world, "b", num_pages=7)
    drained = a_load(5, draining=True)
    assert await state.beat(1, a_card("b", num_pages=7), drained, lease_ms=world.lease_ms)

    assert await state.workers(num_slots=NUM_SLOTS) == [
        LiveWorker(0, a_card("a"), a_load(), 0, 0, 0.0),
        LiveWorker(1, a_card("b", num_pages=7), drained, 0, 0, 0.0),
    ]
    await state.release_slot(0, Incarnation("a"))
    assert [found.slot for found in await state.workers(num_slots=NUM_SLOTS)] == [1]


async def test_workers_show_the_speeds_they_measured(world, state):
    profile = SpeedProfile(4.3e-3, 1e-5, 3e-8, 2.16e-5, 1e-9)
    loads = [
        a_load(),
        replace(a_load(), profile=profile),
        replace(a_load(), profile=profile, links={Incarnation("peer"): LinkRate(3.5e-4, 3.4e11)}),
        replace(a_load(draining=True), profile=replace(profile, row_s=2e-5)),
    ]
    await state.claim_slot(a_card("a"), loads[-1], num_slots=NUM_SLOTS, lease_ms=world.lease_ms)
    for load in (*loads, *loads):
        assert await state.beat(0, a_card("a"), load, lease_ms=world.lease_ms) == Renewed()
        (found,) = await state.workers(num_slots=NUM_SLOTS)
        assert found.load == load


async def test_readings_beside_each_other_and_a_beat_are_each_whole(state):
    def load(number):
        return WorkerLoad(number, 0, 0, links={Incarnation("peer"): LinkRate(1.0, number)})

    await state.claim_slot(a_card("a"), load(1), num_slots=NUM_SLOTS, lease_ms=10_000)
    for number in range(2, 12):
        beating = state.beat(0, a_card("a"), load(number), lease_ms=10_000)
        (before,), (beside,), _, (behind,) = await asyncio.gather(
            state.workers(num_slots=NUM_SLOTS),
            state.workers(num_slots=2),
            beating,
            state.workers(num_slots=NUM_SLOTS),
        )
        (after,) = await state.workers(num_slots=NUM_SLOTS)
        assert after.load == load(number)
        assert all(each.load in (load(number - 1), load(number)) for each in (before, beside, behind))


async def test_a_beat_renews_the_lease(world, state):
    card = a_card("a")
    await state.claim_slot(card, a_load(), num_slots=NUM_SLOTS, lease_ms=world.lease_ms)
    for _ in range(3):
        await world.pass_time(world.lease_ms * 2 // 3)
        assert await state.beat(0, card, a_load(), lease_ms=world.lease_ms)
    assert len(await state.workers(num_slots=NUM_SLOTS)) == 1


async def test_a_worker_that_does_not_beat_loses_its_slot(world, state):
    card = a_card("a")
    await state.claim_slot(card, a_load(), num_slots=NUM_SLOTS, lease_ms=world.lease_ms)
    for _ in range(6):
        await lease(world, "an edge that lives on")
        await world.pass_time(world.lease_ms // 4)

    assert await state.workers(num_slots=NUM_SLOTS) == []
    await lease(world, "an edge that lives on")
    assert not await state.beat(0, card, a_load(), lease_ms=world.lease_ms), "though nobody has taken the slot"
    assert await claim(world, "b") == WorkerRef(0, Incarnation("b"))
    assert not await state.beat(0, card, a_load(), lease_ms=world.lease_ms)
    assert await state.beat(0, a_card("b"), a_load(), lease_ms=world.lease_ms)


async def test_a_worker_takes_its_slot_again_after_the_store_lost_its_memory(world, state):
    await claim(world, "a")
    await claim(world, "b")
    await world.pass_time(world.lease_ms // 2)
    await world.flush()

    assert await claim(world, "c") == WorkerRef(0, Incarnation("c")), "a is too late"
    assert not await state.beat(0, a_card("a"), a_load(), lease_ms=world.lease_ms)
    assert await state.beat(1, a_card("b"), a_load(), lease_ms=world.lease_ms)
    assert {found.slot: found.card.incarnation for found in await state.workers(num_slots=NUM_SLOTS)} == {
        0: "c",
        1: "b",
    }


async def test_a_worker_takes_its_slot_again_after_nobody_reached_the_store(world, state):
    card = a_card("a")
    await state.claim_slot(card, a_load(), num_slots=NUM_SLOTS, lease_ms=world.lease_ms)
    await world.pass_time(2 * world.lease_ms)
    assert await state.workers(num_slots=NUM_SLOTS) == []
    assert await state.beat(0, card, a_load(), lease_ms=world.lease_ms)


async def test_the_store_tells_since_when_its_word_counts(world, state):
    lease_ms = world.lease_ms
    assert await state.up_ms(lease_ms=lease_ms) == 0
    for _ in range(6):
        await world.pass_time(lease_ms // 4)
        await lease(world, "a")
    assert lease_ms * 3 // 2 <= await state.up_ms(lease_ms=lease_ms) < lease_ms * 4

    await world.pass_time(lease_ms * 5 // 8)
    assert await state.up_ms(lease_ms=lease_ms) == 0, "nobody was here for half a lease"
    await world.pass_time(lease_ms // 4)
    assert await state.up_ms(lease_ms=lease_ms) >= lease_ms // 4
    await world.flush()
    assert await state.up_ms(lease_ms=lease_ms) == 0


# Partitions


async def test_a_lone_member_holds_all(world):
    assert await lease(world, "a") == set(range(NUM_PARTITIONS))
    assert await lease(world, "a") == set(range(NUM_PARTITIONS))
    assert await world.state.group_members("g") == {"a"}


async def test_groups_are_apart(world):
    assert await lease(world, "a", group="g") == await lease(world, "b", group="h") == set(range(NUM_PARTITIONS))


async def test_members_share_evenly_once_each_has_been_told(world):
    await lease(world, "a")
    assert await lease(world, "b") == frozenset(), "nothing is free yet"
    assert len(await lease(world, "a")) == 8
    assert len(await lease(world, "b")) == 8
    assert await lease(world, "a") | await lease(world, "b") == set(range(NUM_PARTITIONS))


@pytest.mark.parametrize("num_members", [3, 5, 16, 17])
async def test_shares_differ_by_one_at_most(world, num_members):
    members = [f"m{number}" for number in range(num_members)]
    for _ in range(2):
        for member in members:
            await lease(world, member)
    held = [await lease(world, member) for member in members]

    assert sorted(partition for share in held for partition in share) == list(range(NUM_PARTITIONS))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert [await lease(world, member) for member in members] == held, "and then nothing moves"


async def test_who_leaves_gives_up_all(world, state):
    await lease(world, "a")
    await lease(world, "b")
    await lease(world, "a")
    await lease(world, "b")

    await state.leave_group("g", Incarnation("a"))
    await state.leave_group("g", Incarnation("a"))

    assert await state.group_members("g") == {"b"}
    assert await lease(world, "b") == set(range(NUM_PARTITIONS))


async def test_who_does_not_renew_loses_all(world, state):
    await lease(world, "a")
    await lease(world, "b")
    await lease(world, "a")
    await world.pass_time(world.lease_ms * 3 // 5)
    await lease(world, "b")
    await world.pass_time(world.lease_ms * 3 // 5)

    assert await state.group_members("g") == {"b"}
    assert await lease(world, "b") == set(range(NUM_PARTITIONS))
    assert await lease(world, "a") == frozenset(), "back, and told that it holds nothing"


async def test_no_partition_ever_has_two_holders(world):
    """Members come, go and stop; each believes what it was last told, for one lease."""
    random = Random(3)
    members = [f"m{number}" for number in range(4)]
    told: dict[str, frozenset[int]] = {}
    for _ in range(120):
        member = random.choice(members)
        if random.random() < 0.1:
            await world.state.leave_group("g", Incarnation(member))
            told.pop(member, None)
        else:
            told[member] = await lease(world, member)
        held = [partition for share in told.values() for partition in share]
        assert len(held) == len(set(held))
    for _ in range(2):
        for member in told:
            told[member] = await lease(world, member)
    assert set().union(*told.values()) == set(range(NUM_PARTITIONS))


# Placement


async def test_a_placement_takes_credits_on_both_workers_and_gives_them_back(world, state):
    prefill, decode = await claim(world, "a"), await claim(world, "b")
    placed = await place(world, prefill, decode)

    assert placed == a_placement("p", prefill, decode)
    assert await credits_of(world) == {"a": (10, 1), "b": (20, 1)}

    await state.give_back(PlacementId("p"), Incarnation("a"))
    await state.give_back(PlacementId("p"), Incarnation("a"))
    await state.give_back(PlacementId("unknown"), Incarnation("b"))
    assert await credits_of(world) == {"a": (0, 0), "b": (20, 1)}


async def work_of(world):
    """Incarnation -> seconds of prefill that are not computed yet."""
    return {each.card.incarnation: each.credit_work_s for each in await world.state.workers(num_slots=NUM_SLOTS)}


async def test_work_is_on_the_prefill_worker_until_it_is_computed(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    await place(world, a, b, "p1", a_key("r1"), need=(10, 20, 0.25))
    await place(world, a, b, "p2", a_key("r2"), need=(1, 2, 1.0000004))
    assert await work_of(world) == {"a": 1.25, "b": 0}

    for _ in range(2):
        await state.computed(PlacementId("p1"), Incarnation("a"))
        await state.computed(PlacementId("p1"), Incarnation("b"))
        await state.computed(PlacementId("unknown"), Incarnation("a"))
    assert await work_of(world) == {"a": 1.0, "b": 0}
    assert await credits_of(world) == {"a": (11, 2), "b": (22, 2)}, "its pages are still there"
    await place(world, a, b, "p1", a_key("r1"), need=(10, 20, 0.25))
    assert await work_of(world) == {"a": 1.0, "b": 0}, "asked again it takes nothing"

    await state.give_back(PlacementId("p2"), Incarnation("a"))
    await state.computed(PlacementId("p2"), Incarnation("a"))
    assert await work_of(world) == {"a": 0, "b": 0}


async def test_work_that_nobody_computes_ends_with_its_credit(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    for name, keep_ms in (("short", world.lease_ms // 2), ("long", KEEP_MS)):
        await state.place(
            a_key(name),
            a_placement(name, a, b),
            num_prefill_pages=1,
            num_decode_pages=1,
            prefill_s=0.5,
            keep_ms=keep_ms,
        )
    await world.pass_time(world.lease_ms // 2 + 20)
    await beat(world, a, b)
    assert await work_of(world) == {"a": 0.5, "b": 0}


async def test_one_worker_may_do_both_and_is_one_credit(world, state):
    a = await claim(world, "a")
    await place(world, a, a, "p", need=(0, 20, 0.5))
    assert (await credits_of(world), await work_of(world)) == ({"a": (20, 1)}, {"a": 0.5})
    await state.computed(PlacementId("p"), a.incarnation)
    assert (await credits_of(world), await work_of(world)) == ({"a": (20, 1)}, {"a": 0})
    await state.give_back(PlacementId("p"), a.incarnation)
    assert await credits_of(world) == {"a": (0, 0)}


async def test_asked_again_a_placement_stands(world, state):
    a, b, c = [await claim(world, name) for name in "abc"]
    first = await place(world, a, b, "p")
    await state.give_back(PlacementId("p"), Incarnation("a"))

    assert await place(world, a, b, "p") == first
    assert await state.find_placement(a_key()) == first
    assert await state.find_placement(a_key(epoch=2)) is None
    assert await place(world, c, b, "another") == first, "the first answer to the same question"
    assert await credits_of(world) == {"a": (0, 0), "b": (20, 1), "c": (0, 0)}, "nothing is taken twice"

    assert await place(world, c, b, "q", key=a_key(epoch=2)) == a_placement("q", c, b)
    assert await place(world, c, b, "s", key=a_key(choice=1)) == a_placement("s", c, b)
    assert await credits_of(world) == {"a": (0, 0), "b": (60, 3), "c": (20, 2)}


async def test_a_worker_is_never_overbooked(world):
    a, b = await claim(world, "a", num_pages=30), await claim(world, "b", num_pages=50)
    assert await place(world, a, b, "p1", a_key("r1"), need=(10, 30))
    assert await place(world, a, b, "p2", a_key("r2"), need=(10, 21)) is None, "b has 20 left"
    assert await credits_of(world) == {"a": (10, 1), "b": (30, 1)}, "and nothing was taken on a"
    assert await place(world, a, b, "p3", a_key("r2"), need=(20, 20)), "to the last page"
    assert await place(world, a, b, "p4", a_key("r4"), need=(0, 1)) is None
    assert await place(world, a, b, "p5", a_key("r5"), need=(0, 0)), "nothing needs nothing"


async def test_concurrent_placements_never_overbook(world):
    a, b = await claim(world, "a", num_pages=55), await claim(world, "b", num_pages=1000)
    placed = await asyncio.gather(*(place(world, a, b, f"p{n}", a_key(f"r{n}")) for n in range(20)))
    assert sum(found is not None for found in placed) == 5
    assert await credits_of(world) == {"a": (50, 5), "b": (100, 5)}


async def test_a_worker_is_given_no_more_than_it_runs_at_once(world, state):
    a, b = await claim(world, "a", num_pages=1000), await claim(world, "b", num_pages=1000, max_running=2)
    placed = await asyncio.gather(*(place(world, a, b, f"p{n}", a_key(f"r{n}")) for n in range(5)))
    assert sum(found is not None for found in placed) == 2
    assert await credits_of(world) == {"a": (20, 2), "b": (40, 2)}
    given = next(found for found in placed if found is not None)
    await state.give_back(given.id, Incarnation("b"))
    assert await place(world, a, b, "next", a_key("next")) is not None


async def test_one_worker_may_do_both(world, state):
    a = await claim(world, "a", num_pages=30)
    assert await place(world, a, a, "p1", need=(10, 21)) is None
    assert await place(world, a, a, "p2", need=(10, 20)) == a_placement("p2", a, a)
    assert await credits_of(world) == {"a": (30, 1)}
    await state.give_back(PlacementId("p2"), Incarnation("a"))
    assert await credits_of(world) == {"a": (0, 0)}


async def test_nothing_is_placed_on_a_worker_that_lost_its_slot(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    assert await place(world, replace(a, incarnation=Incarnation("older")), b) is None
    assert await place(world, replace(a, slot=3), b) is None
    await state.release_slot(b.slot, b.incarnation)
    assert await place(world, a, b) is None
    assert await credits_of(world) == {"a": (0, 0)}

    c = await claim(world, "c")
    assert c.slot == b.slot
    assert await place(world, a, c) is not None


@pytest.mark.parametrize("why_not", ["draining", "log_away"])
async def test_nothing_is_placed_on_a_worker_that_has_said_it_takes_none(world, state, why_not):
    a, b = await claim(world, "a"), await claim(world, "b")
    assert await place(world, a, b, "p", a_key("r1")) is not None
    assert await state.beat(b.slot, a_card("b"), a_load(**{why_not: True}), lease_ms=world.lease_ms)
    assert await place(world, a, b, "q", a_key("r2")) is None
    assert await place(world, a, b, "p", a_key("r1")) == a_placement("p", a, b), "what stands, stands"
    assert await credits_of(world) == {"a": (10, 1), "b": (20, 1)}


async def test_credits_belong_to_an_incarnation_and_outlast_a_lost_lease(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    await place(world, a, b)
    await state.release_slot(a.slot, a.incarnation)
    await claim(world, "a2")
    assert (await credits_of(world))["a2"] == (0, 0)

    await state.release_slot(0, Incarnation("a2"))
    await claim(world, "a")
    assert (await credits_of(world))["a"] == (10, 1)


async def test_a_placement_is_forgotten_after_its_time(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    wanted = a_placement("p", a, b)
    await state.place(a_key(), wanted, num_prefill_pages=1, num_decode_pages=1, prefill_s=0.0, keep_ms=world.lease_ms)
    await world.pass_time(world.lease_ms + 20)
    assert await state.find_placement(a_key()) is None
    assert await place(world, b, a, "q") == a_placement("q", b, a)


async def test_credits_that_nobody_gives_back_end_with_the_placements_time(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")
    await place(world, a, b, "long")
    await state.place(
        a_key(epoch=2),
        a_placement("p", a, b),
        num_prefill_pages=1,
        num_decode_pages=2,
        prefill_s=0.0,
        keep_ms=world.lease_ms // 2,
    )
    await beat(world, a, b)
    assert await credits_of(world) == {"a": (11, 2), "b": (22, 2)}

    await world.pass_time(world.lease_ms // 2 + 20)
    await beat(world, a, b)
    assert await credits_of(world) == {"a": (10, 1), "b": (20, 1)}
    await state.give_back(PlacementId("p"), Incarnation("a"))
    await state.give_back(PlacementId("long"), Incarnation("a"))
    assert await credits_of(world) == {"a": (0, 0), "b": (20, 1)}


async def test_the_first_note_of_a_request_stands(world, state):
    name = RequestId("r")
    assert await state.find_request(name) is None
    await state.note_request(name, RequestHint(3, 17), keep_ms=world.lease_ms)
    await state.note_request(name, RequestHint(3, 99), keep_ms=world.lease_ms)
    assert await state.find_request(name) == RequestHint(3, 17)

    await world.pass_time(world.lease_ms + 20)
    assert await state.find_request(name) is None


# Blocks


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


async def test_block_feeds_are_read_from_a_cursor(state):
    a, b = Incarnation("a"), Incarnation("b")
    await state.announce_blocks(a, 0, BlockNews((block(1), block(2))))
    await state.announce_blocks(b, 0, BlockNews((block(9),)))
    await state.announce_blocks(a, 1, BlockNews((block(3),), (block(1),)))

    entries = await state.read_block_feeds({a: "0", b: "0", Incarnation("unknown"): "0"})
    of_a = [entry for entry in entries if entry.incarnation == a]
    assert [(entry.sequence, entry.news.stored, entry.news.evicted) for entry in of_a] == [
        (0, (block(1), block(2)), ()),
        (1, (block(3),), (block(1),)),
    ]
    assert len(entries) == 3

    assert await state.read_block_feeds({a: of_a[0].cursor}) == [of_a[1]]
    assert list(await state.read_block_feeds({a: of_a[1].cursor})) == []
    assert list(await state.read_block_feeds({})) == []
    await state.announce_blocks(a, 2, BlockNews((), (block(3),)))
    assert [entry.sequence for entry in await state.read_block_feeds({a: of_a[1].cursor})] == [2]


async def test_an_announcement_made_again_stands_once(state):
    a = Incarnation("a")
    for sequence in (0, 1, 1, 0):
        await state.announce_blocks(a, sequence, BlockNews((block(sequence),)))
    assert [entry.sequence for entry in await state.read_block_feeds({a: "0"})] == [0, 1]


async def test_a_long_feed_forgets_its_start(state, monkeypatch):
    monkeypatch.setattr(keys, "BLOCK_FEED_LENGTH", 5)
    a = Incarnation("a")
    for sequence in range(8):
        await state.announce_blocks(a, sequence, BlockNews((block(sequence),)))
    assert [entry.sequence for entry in await state.read_block_feeds({a: "0"})] == [3, 4, 5, 6, 7]


async def test_after_a_loss_a_feed_goes_on_with_a_gap(world, state):
    a = Incarnation("a")
    await state.announce_blocks(a, 0, BlockNews((block(0),)))
    (first,) = await state.read_block_feeds({a: "0"})
    await state.announce_blocks(a, 1, BlockNews((block(1),)))
    await world.flush()
    await state.announce_blocks(a, 2, BlockNews((block(2),)))
    assert [entry.sequence for entry in await state.read_block_feeds({a: first.cursor})] == [2]


async def test_a_feed_tells_of_both_tiers(state):
    a = Incarnation("a")
    all_at_once = BlockNews((block(1),), (block(2), block(3)), (block(2),), (block(4),))
    each = [
        BlockNews(stored=(block(5),)),
        BlockNews(evicted=(block(5),)),
        BlockNews(host_stored=(block(5),)),
        BlockNews(host_evicted=(block(5),)),
        BlockNews(is_full=True),
    ]
    await state.announce_blocks(a, 0, all_at_once)
    assert [entry.news for entry in await state.read_block_feeds({a: "0"})] == [all_at_once]
    for sequence, news in enumerate(each[:-1], start=1):
        await state.announce_blocks(a, sequence, news)
    assert [entry.news for entry in await state.read_block_feeds({a: "1-0"})] == each[:-1]
    await state.announce_blocks(a, 5, each[-1])
    assert [entry.news for entry in await state.read_block_feeds({a: "1-0"})] == each[-1:], "of one that holds nothing"


async def test_a_full_list_takes_the_place_of_what_stood_in_the_feed(state):
    a = Incarnation("a")
    for sequence in range(3):
        await state.announce_blocks(a, sequence, BlockNews((block(sequence),)))
    full = BlockNews((block(1), block(2)), is_full=True)
    await state.announce_blocks(a, 3, full)
    await state.announce_blocks(a, 4, BlockNews((block(4),)))
    await state.announce_blocks(a, 3, full)
    for cursor in ("0", "2-0", "3-0"):
        entries = await state.read_block_feeds({a: cursor})
        assert [(entry.sequence, entry.news.is_full) for entry in entries] == [(3, True), (4, False)]


async def read_all(state, cursor="0"):
    found = []
    while entries := await state.read_block_feeds({Incarnation("a"): cursor}):
        found += entries
        cursor = entries[-1].cursor
    return found


async def test_a_long_list_is_read_bit_by_bit(state):
    held = tuple(block(number) for number in range(40_000))
    announced = pieces(BlockNews(held, host_stored=held[:3], is_full=True))
    for sequence, news in enumerate(announced):
        await state.announce_blocks(Incarnation("a"), sequence, news)
    entries = await read_all(state)
    assert [entry.sequence for entry in entries] == list(range(len(announced)))
    assert [entry.news for entry in entries] == announced


async def test_a_worker_hears_at_its_beats_that_its_blocks_are_wanted_until_it_tells_them(world, state):
    a, b = await claim(world, "a"), await claim(world, "b")

    async def is_wanted(worker):
        card = a_card(worker.incarnation)
        renewed = await state.beat(worker.slot, card, a_load(), lease_ms=10 * world.lease_ms)
        return renewed.blocks_wanted

    assert not await is_wanted(a)
    for _ in range(2):
        await state.ask_for_blocks(a.incarnation)
    await state.announce_blocks(a.incarnation, 0, BlockNews((block(0),)))
    assert [await is_wanted(a), await is_wanted(a), await is_wanted(b)] == [True, True, False]

    await state.announce_blocks(a.incarnation, 1, BlockNews((block(0),), is_full=True))
    assert not await is_wanted(a)
    await state.ask_for_blocks(a.incarnation)
    await state.announce_blocks(a.incarnation, 1, BlockNews((block(0),), is_full=True))
    assert await is_wanted(a), "what came twice answers nobody who asked in between"


async def test_a_question_for_blocks_is_lost_with_the_stores_memory_and_with_time(world, state, monkeypatch):
    a = await claim(world, "a")
    await state.ask_for_blocks(a.incarnation)
    await world.flush()
    assert await state.beat(a.slot, a_card("a"), a_load(), lease_ms=10 * world.lease_ms) == Renewed()
    monkeypatch.setattr(keys, "WORKER_TRACES_MS", world.lease_ms // 4)
    await state.ask_for_blocks(a.incarnation)
    await world.pass_time(world.lease_ms // 4 + 20)
    assert await state.beat(a.slot, a_card("a"), a_load(), lease_ms=10 * world.lease_ms) == Renewed()


async def test_traces_of_a_worker_end_a_while_after_its_last_beat(world, state, monkeypatch):
    monkeypatch.setattr(keys, "WORKER_TRACES_MS", world.lease_ms)
    a, b = await claim(world, "a"), await claim(world, "b")
    await place(world, a, b)
    await state.announce_blocks(a.incarnation, 0, BlockNews((block(0),)))
    for _ in range(3):
        await world.pass_time(world.lease_ms // 2)
        assert await state.beat(a.slot, a_card("a"), a_load(), lease_ms=10 * world.lease_ms)

    assert await credits_of(world) == {"a": (10, 1), "b": (0, 0)}
    assert len(await state.read_block_feeds({a.incarnation: "0"})) == 1
    await world.pass_time(world.lease_ms + 20)
    assert await credits_of(world) == {"a": (0, 0), "b": (0, 0)}
    assert list(await state.read_block_feeds({a.incarnation: "0"})) == []


async def test_reachable(state):
    assert await state.reachable()


# What only a real connection can do


async def test_a_server_that_does_not_answer_is_unavailable(monkeypatch):
    monkeypatch.setattr(redis, "CALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(redis, "ATTEMPT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with redis_state(f"redis://127.0.0.1:{silent.getsockname()[1]}/0") as state:
            with pytest.raises(StateUnavailable):
                await state.workers(num_slots=1)
            assert not await state.reachable()
    async with redis_state("redis://127.0.0.1:1/0") as state:
        with pytest.raises(StateUnavailable):
            await state.group_members("g")


async def test_calls_survive_cut_connections_and_forgotten_scripts(redis_url):
    async with redis_world(redis_url) as world, redis_state(own_database(redis_url)) as other:
        for number in range(10):
            await other._client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            if number % 3 == 0:
                await other._client.script_flush()
            assert await lease(world, "a", num_partitions=number + 1) == set(range(number + 1))


async def test_a_cancelled_call_leaves_its_connection_in_order(redis_url):
    async with redis_world(redis_url) as world:
        for number in range(50):
            await world.state.note_request(RequestId(f"r{number}"), RequestHint(0, number), keep_ms=KEEP_MS)
        for number in range(50):
            call = asyncio.create_task(world.state.find_request(RequestId(f"r{number}")))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            call.cancel()
            following = (number + 7) % 50
            assert await world.state.find_request(RequestId(f"r{following}")) == RequestHint(0, following)


async def test_who_is_of_another_version_is_passed_over_told_of_once_and_lives(redis_url):
    async with redis_world(redis_url) as world:
        state, server, registry = world.state, world.state._client, CollectorRegistry()
        registry.register(state.unreadable)
        for name in ("good", "lacks a field", "has strange speeds", "has a strange load", "says nothing", "newer"):
            await state.claim_slot(a_card(name), a_load(), num_slots=8, lease_ms=KEEP_MS)
        cards = {name: orjson.loads(orjson.dumps(a_card(name))) for name in ("lacks a field", "newer")}
        del cards["lacks a field"]["page_bytes"]
        cards["newer"]["a_field_of_tomorrow"] = 7
        for name, told in (
            ("lacks a field", {"card": orjson.dumps(cards["lacks a field"]), "version": "2"}),
            ("newer", {"card": orjson.dumps(cards["newer"]), "version": "2"}),
            ("has strange speeds", {"speeds": b'{"profile": {"base_s": "fast"}}', "version": "2"}),
            ("has a strange load", {"load": b'{"num_free_pages": 3}'}),
        ):
            await server.hset(keys.worker(Incarnation(name)), mapping=told)
        await server.hdel(keys.worker(Incarnation("says nothing")), "version", "card", "load", "speeds")
        await state.report_backlog(Incarnation("good"), BacklogReport(3, 1.5, None), lease_ms=KEEP_MS)
        at_ms = (await server.hget(keys.backlogs(), "good")).split()[0]
        await server.hset(keys.backlogs(), "strange", at_ms + b' {"num_waiting": "many"}')

        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                found = await state.registry(num_slots=8)
                assert [each.card.incarnation for each in found.workers] == ["good", "newer"]
                assert found.unreadable == {"lacks a field", "has strange speeds", "has a strange load", "says nothing"}
                assert [each.member for each in await state.backlogs(lease_ms=KEEP_MS)] == ["good"]
        assert sorted(line["incarnation"] for line in lines) == sorted([*found.unreadable, "strange"])
        assert "page_bytes" in next(line["error"] for line in lines if line["incarnation"] == "lacks a field")
        assert registry.get_sample_value("baton_unreadable_reports", {"kind": "worker"}) == 4
        assert registry.get_sample_value("baton_unreadable_reports", {"kind": "backlog"}) == 1

        await state.beat(1, a_card("lacks a field"), a_load(), lease_ms=KEEP_MS)
        assert len((await state.registry(num_slots=8)).workers) == 3
        assert registry.get_sample_value("baton_unreadable_reports", {"kind": "worker"}) == 3


async def test_announcements_of_another_version_are_passed_over(redis_url):
    async with redis_world(redis_url) as world:
        state, strange, known = world.state, Incarnation("strange"), Incarnation("known")
        for fields in ({"kind": "more", "stored": b"half a hash"}, {"sort": "more", "stored": b"h" * 16}):
            await state._client.xadd(keys.block_feed(strange), fields)
        await state.announce_blocks(known, 0, BlockNews(stored=(BlockHash(b"h" * 16),)))
        for _ in range(2):
            found = await state.read_block_feeds({strange: "0", known: "0"})
            assert [entry.incarnation for entry in found] == [known]
            (metric,) = state.unreadable.collect()
            assert {sample.labels["kind"]: sample.value for sample in metric.samples} == {
                "worker": 0,
                "backlog": 0,
                "feed": 1,
            }


# Admission


async def test_a_backlog_is_known_for_a_lease(world, state):
    outlook = Outlook(12.5, 3.25, 0.0, 0.0125, 0.01, 120.5)
    first = BacklogReport(3, 1.5, None, 2, 60.5, outlook, Blocked(1, 7.5), 0.25)
    second = BacklogReport(0, 0.0, 12.25)
    await state.report_backlog(Incarnation("a"), BacklogReport(9, 9.0, 9.0), lease_ms=world.lease_ms)
    await state.report_backlog(Incarnation("a"), first, lease_ms=world.lease_ms)
    await world.pass_time(world.lease_ms // 2)
    await state.report_backlog(Incarnation("b"), second, lease_ms=world.lease_ms)

    found = sorted(await state.backlogs(lease_ms=world.lease_ms), key=lambda each: each.age_s)
    assert [(each.member, each.report) for each in found] == [("b", second), ("a", first)]
    assert found[1].age_s >= world.lease_ms / 2000
    await world.pass_time(world.lease_ms * 3 // 4)
    await state.report_backlog(Incarnation("b"), second, lease_ms=world.lease_ms)
    assert [each.report for each in await state.backlogs(lease_ms=world.lease_ms)] == [second]
    await world.pass_time(world.lease_ms * 5 // 4)
    assert await state.backlogs(lease_ms=world.lease_ms) == []


async def take(state, name, limits, *, tenant="acme", num_tokens=1, keep_ms=KEEP_MS):
    return await state.take_place(tenant, RequestId(name), limits, num_tokens=num_tokens, keep_ms=keep_ms)


async def test_without_limits_every_request_gets_a_place(state):
    for name in ("r1", "r2"):
        verdict = await take(state, name, TenantLimits(), num_tokens=10**9)
        assert verdict == Verdict(None, 0.0, {})
    assert await state.tenant_of(RequestId("r2")) == "acme"
    assert await state.tenant_of(RequestId("r3")) is None


async def test_so_many_requests_of_a_tenant_at_once(state):
    limits = TenantLimits(max_concurrent=2)
    assert [(await take(state, name, limits)).refused_by for name in ("r1", "r2", "r3")] == [None, None, "concurrent"]
    assert (await take(state, "r1", limits)).refused_by is None, "asked again"
    assert (await take(state, "r3", limits, tenant="other")).refused_by is None
    assert (await take(state, "r4", limits)).retry_after_s > 0

    await state.leave_place(RequestId("r1"), num_tokens=1)
    await state.leave_place(RequestId("r1"), num_tokens=1)
    assert await state.tenant_of(RequestId("r1")) is None
    assert [(await take(state, name, limits)).refused_by for name in ("r4", "r5")] == [None, "concurrent"]


async def test_a_place_that_nobody_gives_back_ends(world, state):
    limits = TenantLimits(max_concurrent=1)
    await take(state, "r1", limits, keep_ms=300)
    assert (await take(state, "r2", limits)).refused_by == "concurrent"
    await world.pass_time(400)
    assert await state.tenant_of(RequestId("r1")) is None
    assert (await take(state, "r2", limits)).refused_by is None


async def test_a_short_place_does_not_end_a_long_one(world, state):
    limits = TenantLimits(max_concurrent=2)
    await take(state, "long", limits)
    await take(state, "short", limits, keep_ms=200)
    await world.pass_time(300)
    assert [(await take(state, name, limits)).refused_by for name in ("r1", "r2")] == [None, "concurrent"]


async def test_requests_of_a_minute_come_back_with_time(world, state):
    limits = TenantLimits(requests_per_minute=2, max_concurrent=100)
    first = await take(state, "r1", limits)
    assert (first.budgets["requests"].limit, first.budgets["requests"].remaining) == (2, 1)
    assert 29 < first.budgets["requests"].reset_s <= 30
    assert (await take(state, "r1", limits)).budgets["requests"].remaining == 1, "charged once"
    await take(state, "r2", limits)
    refused = await take(state, "r3", limits)
    assert refused.refused_by == "requests"
    assert 25 < refused.retry_after_s <= 30
    assert await state.tenant_of(RequestId("r3")) is None
    await state.leave_place(RequestId("r1"), num_tokens=0)
    assert (await take(state, "r3", limits)).refused_by == "requests", "the end of one does not make it unasked"

    fast = TenantLimits(requests_per_minute=600)
    assert (await take(state, "r3", fast)).refused_by == "requests", "a higher limit begins with what was left"
    for _ in range(20):  # asked again and again, it grows all the same
        await world.pass_time(10)
        await take(state, "r4", fast)
    assert await state.tenant_of(RequestId("r4")) == "acme"


async def test_tokens_are_charged_as_guessed_and_then_as_they_were(world, state):
    limits = TenantLimits(tokens_per_minute=1000)
    assert (await take(state, "r1", limits, num_tokens=600)).budgets["tokens"].remaining in range(400, 410)
    refused = await take(state, "r2", limits, num_tokens=600)
    assert refused.refused_by == "tokens"
    assert 5 < refused.retry_after_s <= 12
    await state.leave_place(RequestId("r1"), num_tokens=100)
    await state.leave_place(RequestId("r1"), num_tokens=100)
    assert (await take(state, "r2", limits, num_tokens=600)).budgets["tokens"].remaining in range(300, 320)
    await state.leave_place(RequestId("r2"), num_tokens=1200)
    indebted = await take(state, "r3", limits, num_tokens=1)
    assert (indebted.refused_by, indebted.budgets["tokens"].remaining) == ("tokens", 0)
    assert 10 < indebted.retry_after_s <= 20


async def test_a_request_dearer_than_a_minute_waits_for_a_full_budget(state):
    limits = TenantLimits(tokens_per_minute=1000)
    assert (await take(state, "r1", limits, num_tokens=3000)).refused_by is None
    assert (await take(state, "r2", limits, num_tokens=1)).retry_after_s > 100
    assert (await take(state, "r2", limits, tenant="other", num_tokens=3000)).refused_by is None


async def test_a_limit_that_is_taken_away_and_given_again_begins_full(state):
    limits = TenantLimits(requests_per_minute=1)
    await take(state, "r1", limits)
    await take(state, "r2", TenantLimits())
    assert (await take(state, "r3", limits)).refused_by is None


async def test_an_emptied_store_forgets_places_and_charges(world, state):
    limits = TenantLimits(max_concurrent=1, requests_per_minute=1)
    await take(state, "r1", limits)
    await world.flush()
    await state.leave_place(RequestId("r1"), num_tokens=5)
    assert (await take(state, "r2", limits)).refused_by is None
