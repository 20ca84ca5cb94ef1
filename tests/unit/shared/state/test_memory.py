import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.request import Incarnation, RequestId
from shared.state.memory import Answer, MemoryState, MemoryStore
from shared.state.port import RequestHint, Role, StateUnavailable, WorkerCard, WorkerLoad

LEASE_MS = 2000
NUM_PARTITIONS = 16
MEMBERS = [Incarnation(name) for name in "abcde"]


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock=clock)


def a_card(name):
    return WorkerCard(Incarnation(name), Role.DECODE, name, "m", "f", 4096, 100, 8, 256, 1024, 0, "127.0.0.1:1", "l")


A_LOAD = WorkerLoad(num_free_pages=100, num_running=0, num_waiting=0)


async def test_an_outage_of_the_store_or_of_one_link(store):
    here, there = MemoryState(store), MemoryState(store)
    here.cut_off = True
    with pytest.raises(StateUnavailable):
        await here.group_members("g")
    assert await there.group_members("g") == frozenset()
    assert (await here.reachable(), await there.reachable()) == (False, True)

    store.away = True
    with pytest.raises(StateUnavailable):
        await there.group_members("g")


async def test_a_lost_answer_and_a_refused_call(store):
    state = MemoryState(store)
    hint = RequestHint(1, 2)
    store.answer = lambda name: Answer.REFUSED if name == "note_request" else Answer.GIVEN
    with pytest.raises(StateUnavailable):
        await state.note_request(RequestId("r"), hint, keep_ms=1000)
    assert await state.find_request(RequestId("r")) is None

    store.answer = lambda name: Answer.LOST if name == "note_request" else Answer.GIVEN
    with pytest.raises(StateUnavailable):
        await state.note_request(RequestId("r"), hint, keep_ms=1000)
    assert await state.find_request(RequestId("r")) == hint


async def test_a_flush_forgets_all(store):
    state = MemoryState(store)
    await state.claim_slot(a_card("a"), A_LOAD, num_slots=1, lease_ms=LEASE_MS)
    await state.note_request(RequestId("r"), RequestHint(1, 2), keep_ms=1000)
    store.flush()
    assert await state.workers(num_slots=1) == []
    assert await state.find_request(RequestId("r")) is None


STEPS = st.lists(
    st.tuples(st.sampled_from(["beat", "beat", "beat", "leave", "die", "wait"]), st.sampled_from(MEMBERS)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_partitions_have_one_holder_and_all_are_covered(steps):
    asyncio.run(check_leases(steps))


async def check_leases(steps):
    """A member believes what it was last told, until a lease after that it must not."""
    clock = Clock()
    state = MemoryState(MemoryStore(clock=clock))
    told = {}

    async def beat(member):
        held = await state.lease_partitions("g", member, num_partitions=NUM_PARTITIONS, lease_ms=LEASE_MS)
        told[member] = (held, clock.now_s + LEASE_MS / 1000)

    for action, member in steps:
        if action == "beat":
            await beat(member)
        elif action == "leave":
            await state.leave_group("g", member)
            told.pop(member, None)
        elif action == "wait":
            clock.now_s += 0.7
        believed = [p for held, ends_s in told.values() if ends_s > clock.now_s for p in held]
        assert len(believed) == len(set(believed))

    alive = [member for member, (_, ends_s) in told.items() if ends_s > clock.now_s]
    for _ in range(2):
        for member in alive:
            await beat(member)
    shares = [told[member][0] for member in alive]
    if shares:
        assert set().union(*shares) == set(range(NUM_PARTITIONS))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
