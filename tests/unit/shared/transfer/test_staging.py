import asyncio
import threading
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS
from shared.errors import StartupError
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes
from shared.transfer.staging import (
    ALIGNMENT,
    ARENA_BYTES,
    NUM_LANES,
    Arena,
    Staging,
    check_allocator,
    staging_bytes,
    to_completion,
)
from tests.contract.transfer_worlds import a_cache, a_layout

CPU = torch.device("cpu")


def place_of(arena, piece):
    """Where a piece lies in its arena."""
    return piece.data_ptr() - arena._memory.data_ptr()


async def some_turns():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_pieces_of_any_size_are_lent_beside_each_other():
    arena = Arena(4 * ALIGNMENT, CPU)
    async with arena.lease(1) as first, arena.lease(ALIGNMENT + 1) as second, arena.lease(ALIGNMENT) as third:
        assert [piece.numel() for piece in (first, second, third)] == [1, ALIGNMENT + 1, ALIGNMENT]
        assert [place_of(arena, piece) for piece in (first, second, third)] == [0, ALIGNMENT, 3 * ALIGNMENT]
        assert arena.num_free_bytes == 0
    assert arena.num_free_bytes == 4 * ALIGNMENT


async def test_what_came_back_is_lent_again_where_it_fits():
    arena = Arena(4 * ALIGNMENT, CPU)
    async with AsyncExitStack() as left, arena.lease(ALIGNMENT), AsyncExitStack() as right:
        await right.enter_async_context(arena.lease(2 * ALIGNMENT))
        await left.enter_async_context(arena.lease(ALIGNMENT))
        await right.aclose()
        async with arena.lease(2 * ALIGNMENT) as piece:
            assert place_of(arena, piece) == ALIGNMENT


@pytest.mark.parametrize("num_bytes", [0, 2 * ALIGNMENT + 1])
async def test_no_more_than_the_arena_is_lent_and_no_less_than_a_byte(num_bytes):
    arena = Arena(2 * ALIGNMENT, CPU)
    with pytest.raises(ValueError):
        await arena.lease(num_bytes).__aenter__()
    async with asyncio.timeout(5), arena.lease(2 * ALIGNMENT):
        pass


async def test_a_large_wish_is_not_passed_over_for_later_small_ones():
    arena = Arena(4 * ALIGNMENT, CPU)
    order = []

    async def use(name, num_bytes):
        async with arena.lease(num_bytes):
            order.append(name)
            await asyncio.sleep(0)

    async with arena.lease(ALIGNMENT):
        waiting = [asyncio.create_task(use("large", 4 * ALIGNMENT)), asyncio.create_task(use("small", 1))]
        await some_turns()
        assert order == []
    await asyncio.gather(*waiting)
    assert order == ["large", "small"]


async def test_a_wish_that_is_given_up_no_longer_stands_in_the_way():
    arena = Arena(4 * ALIGNMENT, CPU)
    async with arena.lease(ALIGNMENT):
        large = asyncio.create_task(arena.lease(4 * ALIGNMENT).__aenter__())
        small = asyncio.create_task(arena.lease(ALIGNMENT).__aenter__())
        await some_turns()
        large.cancel()
        async with asyncio.timeout(5):
            await small
    assert arena.num_free_bytes == 3 * ALIGNMENT


async def test_what_was_granted_to_someone_who_is_cancelled_just_then_comes_back():
    arena = Arena(ALIGNMENT, CPU)
    async with arena.lease(1):
        waiting = asyncio.create_task(arena.lease(1).__aenter__())
        await some_turns()
    waiting.cancel()  # the piece was given back, and granted, in this very turn
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert arena.num_free_bytes == ALIGNMENT


ARENA_UNITS = 8
ASK = st.tuples(st.just("ask"), st.integers(1, ARENA_UNITS * ALIGNMENT))
END = st.tuples(st.sampled_from(["return", "cancel"]), st.integers(0, 30))


class ArenaModel:
    """What an arena may do, against one that does it: who holds what, and who waits in which order."""

    def __init__(self):
        self.arena = Arena(ARENA_UNITS * ALIGNMENT, CPU)
        self.tasks = []
        self.returning = []
        self.held = {}
        self.granted = []
        self.asked = []

    async def use(self, number, num_bytes):
        try:
            async with self.arena.lease(num_bytes) as piece:
                assert piece.numel() == num_bytes
                start = place_of(self.arena, piece)
                self.held[number] = range(start, start + num_bytes)
                self.granted.append(number)
                await self.returning[number].wait()
        finally:
            self.held.pop(number, None)

    def ask(self, num_bytes):
        self.returning.append(asyncio.Event())
        self.asked.append(num_bytes)
        self.tasks.append(asyncio.create_task(self.use(len(self.tasks), num_bytes)))

    def check(self):
        places = sorted(self.held.values(), key=lambda place: place.start)
        assert all(place.start % ALIGNMENT == 0 and place.stop <= self.arena.num_bytes for place in places)
        assert all(one.stop <= other.start for one, other in pairwise(places))
        assert self.arena.num_free_bytes == self.arena.num_bytes - sum(
            -(-len(p) // ALIGNMENT) * ALIGNMENT for p in places
        )
        waiting = [n for n, task in enumerate(self.tasks) if not task.done() and n not in self.held]
        if waiting:
            edges = [0, *(edge for place in places for edge in (place.start, place.stop)), self.arena.num_bytes]
            gaps = [-(-start // ALIGNMENT) * ALIGNMENT for start in edges[::2]]
            assert all(end - start < self.asked[waiting[0]] for start, end in zip(gaps, edges[1::2], strict=True))
            assert waiting[0] > max(self.granted, default=-1)  # nobody was passed over


@given(st.lists(ASK | END, max_size=40))
async def test_arena_lends_each_byte_once_and_serves_in_the_order_of_asking(steps):
    model = ArenaModel()
    for verb, number in steps:
        if verb == "ask":
            model.ask(number)
        elif model.tasks and verb == "return":
            model.returning[number % len(model.tasks)].set()
        elif model.tasks:
            model.tasks[number % len(model.tasks)].cancel()
        if number % 3:  # else the next step meets this one half done
            await some_turns()
            model.check()
    for event in model.returning:
        event.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*model.tasks, return_exceptions=True)
    assert model.arena.num_free_bytes == model.arena.num_bytes


@pytest.mark.parametrize("fmt", WireFormat)
async def test_pages_go_out_and_in(fmt):
    layout = a_layout(num_layers=3)
    source, cache = a_cache(8, seed=1, layout=layout), a_cache(8, layout=layout)
    out, into = Staging(source, {}, arena_bytes=2**15), Staging(cache, {}, arena_bytes=2**15)
    layers = LayerSpan(1, 3)
    async with out.outgoing.lease(packed_bytes(layout, fmt, 2, 2)) as part:
        await out.pack([7, 1], layers, fmt, part, last_tokens=PAGE_TOKENS)
        await into.unpack(part, [0, 3], layers, fmt)
    came, sent = cache.pages[[0, 3], 1:], source.pages[[7, 1], 1:]
    assert torch.allclose(came, sent, atol={WireFormat.NATIVE: 0, WireFormat.INT8: 0.01, WireFormat.INT4: 0.1}[fmt])
    assert not cache.pages[:, 0].any()
    assert not cache.pages[[1, 2, 4, 5, 6, 7]].any()


async def test_tokens_beyond_the_last_valid_one_do_not_coarsen_what_is_packed():
    source, cache = a_cache(2, seed=1), a_cache(2)
    source.pages[0, :, :, 10:] = 1e4
    staging, into = Staging(source, {}, arena_bytes=2**13), Staging(cache, {}, arena_bytes=2**13)
    layers = LayerSpan(0, 1)
    async with staging.outgoing.lease(packed_bytes(source.layout, WireFormat.INT8, 1, 1)) as part:
        await staging.pack([0], layers, WireFormat.INT8, part, last_tokens=10)
        await into.unpack(part, [0], layers, WireFormat.INT8)
    assert torch.allclose(cache.pages[0, :, :, :10], source.pages[0, :, :, :10], atol=0.01)


async def test_warming_up_changes_no_page_and_keeps_no_memory():
    cache = a_cache(2, seed=1)
    before = cache.pages.clone()
    staging = Staging(cache, {}, arena_bytes=4096)
    await staging.warm_up()
    assert torch.equal(cache.pages, before)
    assert staging.outgoing.num_free_bytes == staging.incoming.num_free_bytes == 4096


async def test_leased_memory_is_cleared_and_no_other():
    staging = Staging(a_cache(2), {}, arena_bytes=8 * ALIGNMENT)
    async with staging.outgoing.lease(ALIGNMENT) as before, staging.outgoing.lease(10) as space:
        before.fill_(1)
        space.fill_(2)
        await staging.clear(space)
        assert not space.any()
        assert before.all()


async def test_an_arena_has_room_for_the_parts_of_a_link_and_one_of_another():
    staging = Staging(a_cache(2), {}, arena_bytes=64 * ALIGNMENT)
    async with asyncio.timeout(5), AsyncExitStack() as leases:
        for _ in range(NUM_LANES + 1):
            await leases.enter_async_context(staging.outgoing.lease(staging.max_part_bytes))


async def test_a_cancelled_wait_still_sees_the_work_to_its_end():
    go, done = threading.Event(), threading.Event()

    def work():
        go.wait(10)
        done.set()

    waiting = asyncio.create_task(to_completion(asyncio.to_thread(work)))
    await asyncio.sleep(0.01)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done.is_set()


async def test_what_the_work_raises_is_raised():
    async def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_completion(fail())


def test_arenas_too_small_for_a_layer_of_a_page_are_refused_at_start():
    with pytest.raises(StartupError, match="hold no layer"):
        Staging(a_cache(8), {}, arena_bytes=2 * 1024)


def test_what_a_worker_sets_aside_for_staging_is_both_arenas():
    assert staging_bytes("cuda") == 2 * ARENA_BYTES["cuda"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments: true"])
def test_expandable_segments_are_refused(name, value):
    with pytest.raises(StartupError, match=name):
        check_allocator({name: value})


def test_other_allocator_settings_pass():
    check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:False"})
