"""News of blocks in pieces of a bounded size."""

from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import BlockHash
from shared.state.port import MAX_NEWS_BLOCKS, BlockNews, pieces

TIERS = ("stored", "evicted", "host_stored", "host_evicted")


def blocks(start, count):
    return tuple(BlockHash(number.to_bytes(16, "big")) for number in range(start, start + count))


counts = st.sampled_from([0, 0, 1, MAX_NEWS_BLOCKS - 1, MAX_NEWS_BLOCKS, MAX_NEWS_BLOCKS + 1, 3 * MAX_NEWS_BLOCKS])


@given(st.tuples(counts, counts, counts, counts), st.booleans())
def test_pieces_tell_all_in_order_and_only_the_first_is_full(numbers, is_full):
    held = {name: blocks(10**6 * place, count) for place, (name, count) in enumerate(zip(TIERS, numbers, strict=True))}
    news = BlockNews(**held, is_full=is_full)
    told = pieces(news)
    for name in TIERS:
        assert sum((getattr(piece, name) for piece in told), ()) == held[name]
    assert [piece.is_full for piece in told] == [is_full] + [False] * (len(told) - 1)
    assert all(sum(len(getattr(piece, name)) for name in TIERS) <= MAX_NEWS_BLOCKS for piece in told)
    assert len(told) == max(1, -(-sum(numbers) // MAX_NEWS_BLOCKS))


def test_short_news_are_one_piece():
    news = BlockNews(blocks(0, 3), blocks(5, 2), is_full=True)
    assert pieces(news) == [news]
