"""Following what workers announce: what is missed is asked for again, until it has come."""

import pytest
from prometheus_client import CollectorRegistry

from services.ingest.feeds import ASK_AGAIN_S, BlockFeeds
from shared.blocks import BlockHash
from shared.observe.metrics import IngestMetrics
from shared.request import Incarnation
from shared.state.memory import Answer, MemoryState, MemoryStore
from shared.state.port import BlockNews, StateUnavailable, pieces

W = Incarnation("w")


def blocks(*numbers):
    return tuple(BlockHash(number.to_bytes(16, "big")) for number in numbers)


CHAIN = blocks(*range(1, 9))


class World:
    """One worker, whose news are lost or come, and an ingest that follows it."""

    def __init__(self):
        self.now_s = 1_700_000_000.0
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.state = MemoryState(self.store)
        self.metrics = IngestMetrics(CollectorRegistry())
        self.num_told = 0
        self.follow_anew()

    def follow_anew(self):
        """Another ingest, that knows nothing yet."""
        self.feeds = BlockFeeds(self.state, self.metrics, lambda: self.now_s)
        self.feeds.keep_only([W])

    async def tell(self, *stored, evicted=(), is_full=False, is_lost=False):
        sequence, self.num_told = self.num_told, self.num_told + 1
        if not is_lost:
            await self.state.announce_blocks(W, sequence, BlockNews(blocks(*stored), blocks(*evicted), is_full=is_full))

    async def follow(self):
        await self.feeds.follow()
        return self.feeds.holders.overlap(W, CHAIN)[0]

    @property
    def is_asked(self):
        return self.store.wants_blocks(W)

    @property
    def num_asked(self):
        return self.metrics.block_list_requests._value.get()

    @property
    def num_gaps(self):
        return self.metrics.feed_gaps._value.get()


@pytest.fixture
async def world():
    """After the worker's first news."""
    world = World()
    await world.tell(1, 2)
    assert await world.follow() == 2
    assert not world.is_asked
    return world


async def test_news_add_up(world):
    await world.tell(3)
    await world.tell(4, evicted=(3,))
    assert await world.follow() == 2
    await world.tell(3)
    assert await world.follow() == 4
    assert (world.num_gaps, world.num_asked) == (0, 0)


async def test_a_gap_is_mended_by_the_full_list(world):
    await world.tell(3, is_lost=True)
    await world.tell(4)
    assert await world.follow() == 0, "what is known may have gone since"
    assert (world.num_gaps, world.num_asked) == (1, 1)
    assert world.is_asked
    await world.tell(5)
    assert await world.follow() == 0
    await world.tell(1, 2, 3, 4, 5, is_full=True)
    await world.tell(6)
    assert await world.follow() == 6
    assert not world.is_asked
    world.now_s += ASK_AGAIN_S
    await world.follow()
    assert (world.num_gaps, world.num_asked) == (1, 1)


async def test_a_list_in_pieces_of_which_one_is_lost_is_asked_for_again(world):
    held = blocks(*range(1, 5000))
    first, lost, *rest = pieces(BlockNews(held, is_full=True))
    for sequence, news in [(1, first), *enumerate(rest, start=3)]:
        await world.state.announce_blocks(W, sequence, news)
    assert lost
    await world.follow()
    assert world.is_asked
    assert world.num_gaps == 1
    for sequence, news in enumerate(pieces(BlockNews(held, is_full=True)), start=10):
        await world.state.announce_blocks(W, sequence, news)
    await world.follow()
    assert world.feeds.holders.overlap(W, held) == (len(held), len(held))
    assert not world.is_asked


async def test_who_does_not_answer_is_asked_again(world):
    await world.tell(3, is_lost=True)
    await world.tell(4)
    await world.follow()
    world.store.flush()
    world.now_s += ASK_AGAIN_S / 2
    await world.follow()
    assert not world.is_asked, "not so soon"
    world.now_s += ASK_AGAIN_S / 2
    await world.follow()
    assert world.is_asked
    assert (world.num_gaps, world.num_asked) == (1, 2)


async def test_an_ingest_that_comes_late_asks_for_what_is_not_kept_any_more(world):
    await world.tell(3)
    world.follow_anew()
    assert await world.follow() == 3, "all of it is there"
    world.store.flush()
    world.follow_anew()
    assert await world.follow() == 0
    assert world.is_asked, "though nobody says anything"
    await world.tell(1, 2, 3, is_full=True)
    assert await world.follow() == 3
    world.store.flush()
    await world.tell(4)
    world.follow_anew()
    assert await world.follow() == 0
    assert world.is_asked, "it begins in the middle"


async def test_after_a_loss_of_the_stores_memory_it_goes_on_where_nothing_was_missed(world):
    world.store.flush()
    assert await world.follow() == 2, "blocks are where they were"
    await world.tell(3)
    assert await world.follow() == 3
    assert not world.is_asked


async def test_who_is_gone_is_forgotten_and_not_asked(world):
    await world.tell(3, is_lost=True)
    await world.tell(1)
    world.feeds.keep_only([])
    assert await world.follow() == 0
    assert not world.is_asked


async def test_a_question_that_did_not_go_through_is_asked_at_the_next_reading(world):
    await world.tell(3, is_lost=True)
    await world.tell(1)
    world.store.answer = lambda name: Answer.REFUSED if name == "ask_for_blocks" else Answer.GIVEN
    with pytest.raises(StateUnavailable):
        await world.follow()
    world.store.answer = lambda _: Answer.GIVEN
    await world.follow()
    assert world.is_asked
