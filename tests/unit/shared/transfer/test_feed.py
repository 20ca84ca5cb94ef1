import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS, pages_for
from shared.kv.progress import Chunk, KvProgress
from shared.kv.wire_format import packed_bytes
from shared.transfer.cover import Cover
from shared.transfer.feed import PartFeed
from shared.transfer.offer import Offer
from shared.transfer.plan import LinkSpeed
from shared.transfer.port import Outcome
from shared.wire.wire_format import WireFormat
from tests.contract.transfer_worlds import SECRET, a_layout

LAYOUT = replace(a_layout(num_layers=8), head_dim=16)
SLOW = LinkSpeed(1e6, 1e-3)


class Marks:
    def __init__(self, done=0):
        self.done = done

    def num_done(self):
        return self.done


def a_feed(progress, want, *, speed=None, max_loss=WireFormat.NATIVE, max_part_pages=1000):
    offer = Offer(
        key="k",
        source="source",
        puller="puller",
        secret=SECRET,
        pages=tuple(range(100, 100 + pages_for(progress.num_tokens))),
        progress=progress,
        max_loss=max_loss,
        hold_s=1.0,
        on_end=lambda outcome: None,
    )
    feed = PartFeed(LAYOUT, offer, want, speed=lambda: speed, max_part_bytes=max_part_pages * LAYOUT.page_bytes)
    return offer, feed


async def all_of(feed):
    loads = []
    while (load := await feed.next()) is not None:
        loads.append(load)
    return loads


async def next_soon(feed):
    async with asyncio.timeout(5):
        return await feed.next()


async def waits(feed, loads=None):
    """Whether the feed has nothing to hand out for a while; what it has instead is added to `loads`."""
    try:
        async with asyncio.timeout(0.02):
            load = await feed.next()
    except TimeoutError:
        return True
    if loads is not None and load is not None:
        loads.append(load)
    return load is None


async def test_what_is_there_goes_at_once_in_parts_of_equal_size():
    _, feed = a_feed(KvProgress.all_there(5 * PAGE_TOKENS), (4, 3, 2, 1, 0), max_part_pages=3)
    loads = await all_of(feed)
    assert [load.pages for load in loads] == [(104, 103), (102, 101, 100)]
    assert [load.index for load in loads] == [0, 1]
    assert {load.num_bytes // load.part.num_pages for load in loads} == {LAYOUT.page_bytes}
    assert feed.num_parts == 2


async def test_a_page_goes_with_the_chunk_that_completes_it():
    progress = KvProgress(300)
    _, feed = a_feed(progress, (0, 1, 2, 3, 4))
    first, second = Marks(), Marks()
    progress.launched(Chunk(130, 200, first))
    assert (await next_soon(feed)).pages == (100, 101)  # found; of the third page 2 tokens are there
    assert await waits(feed)
    first.done = 8
    assert (await next_soon(feed)).pages == (102,)
    assert await waits(feed)
    progress.launched(Chunk(200, 300, second))
    assert await waits(feed)
    second.done = 8
    load = await next_soon(feed)
    assert (load.pages, load.last_tokens) == ((103, 104), 300 - 4 * PAGE_TOKENS)
    assert await feed.next() is None


async def test_chunks_computed_before_the_pull_go_together():
    progress = KvProgress(6 * PAGE_TOKENS)
    for index in range(3):
        progress.launched(Chunk(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS, Marks(8 if index < 2 else 0)))
    _, feed = a_feed(progress, range(6))
    assert (await next_soon(feed)).pages == (100, 101)
    assert await waits(feed)
    progress.complete()
    assert (await next_soon(feed)).pages == (102,)
    assert (await next_soon(feed)).pages == (103, 104, 105)


async def test_on_a_slow_link_layers_go_as_they_are_computed():
    progress = KvProgress(4 * PAGE_TOKENS, tokens_per_s=4 * PAGE_TOKENS / 0.25)
    _, feed = a_feed(progress, range(4), speed=SLOW)
    marks = Marks()
    progress.launched(Chunk(0, 4 * PAGE_TOKENS, marks))
    loads = []
    for marks.done in range(9):
        while not await waits(feed, loads):
            pass
        assert all(load.part.layers.end <= marks.done for load in loads)
        assert len({load.part.layers for load in loads}) <= marks.done
    assert sum(load.part.num_pages * load.part.layers.num_layers for load in loads) == 4 * 8
    assert len({load.part.layers for load in loads}) > 1


@settings(deadline=None)
@given(st.data())
def test_every_wanted_page_and_layer_is_handed_out_once_whatever_is_computed_when(data):
    num_tokens = data.draw(st.integers(1, 400))
    num_pages = pages_for(num_tokens)
    want = data.draw(st.permutations(range(num_pages)))[: data.draw(st.integers(0, num_pages))]
    found = data.draw(st.integers(0, num_tokens - 1))
    cuts = sorted({found, num_tokens, *data.draw(st.lists(st.integers(found, num_tokens), max_size=4))})
    speed = data.draw(st.sampled_from([None, SLOW, LinkSpeed(1e5, 0.01), LinkSpeed(1e11, 1e-5)]))
    max_loss = data.draw(st.sampled_from(list(WireFormat)))

    async def run():
        progress = KvProgress(num_tokens, tokens_per_s=data.draw(st.sampled_from([None, 100.0, 1e6])))
        _, feed = a_feed(progress, want, speed=speed, max_loss=max_loss, max_part_pages=2)
        feeding = asyncio.gather(*(all_of(feed) for _ in range(2)))
        for start, end in pairwise(cuts):
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
            progress.launched(Chunk(start, end, Marks(data.draw(st.integers(0, 8)))))
        await asyncio.sleep(0)
        progress.complete()
        return [load for loads in await feeding for load in loads]

    loads = asyncio.run(run())
    cover = Cover(len(want), 8)
    for load in loads:
        part = load.part
        cover.add(part.start, part.end, part.layers)
        indexes = want[part.start : part.end]
        assert load.pages == tuple(100 + index for index in indexes)
        assert load.num_bytes == packed_bytes(LAYOUT, load.format, part.num_pages, part.layers.num_layers)
        assert load.last_tokens == min(PAGE_TOKENS, num_tokens - indexes[-1] * PAGE_TOKENS)
        if load.format is not WireFormat.NATIVE:
            assert all((index + 1) * PAGE_TOKENS <= num_tokens for index in indexes[:-1])
        assert load.format is not WireFormat.INT4 or 0 not in indexes
        assert load.format.loss <= max_loss.loss
    assert cover.num_left == 0
    assert sorted(load.index for load in loads) == list(range(len(loads)))


@pytest.mark.parametrize("num_done", [0, 8])
async def test_an_offer_that_is_settled_feeds_nobody(num_done):
    progress = KvProgress(100)
    offer, feed = a_feed(progress, (0, 1))
    progress.launched(Chunk(0, 100, Marks(num_done)))
    waiting = [asyncio.create_task(feed.next()) for _ in range(2)]
    offer.settle(Outcome.WITHDRAWN)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting) == [None, None]


async def test_the_form_is_chosen_once():
    speeds = iter([LinkSpeed(1e5, 0.01), LinkSpeed(1e12, 1e-6), LinkSpeed(1e12, 1e-6)])
    progress = KvProgress(2 * PAGE_TOKENS, tokens_per_s=1e6)
    offer, _ = a_feed(progress, (0, 1), max_loss=WireFormat.INT8)
    feed = PartFeed(LAYOUT, offer, (0, 1), speed=lambda: next(speeds), max_part_bytes=2**20)
    progress.launched(Chunk(0, PAGE_TOKENS, Marks(8)))
    assert (await next_soon(feed)).format is WireFormat.INT8
    progress.launched(Chunk(PAGE_TOKENS, 2 * PAGE_TOKENS, Marks(8)))
    assert (await next_soon(feed)).format is WireFormat.INT8
