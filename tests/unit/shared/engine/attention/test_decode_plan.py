import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS
from shared.engine.attention import decode_plan
from shared.engine.attention.decode_plan import CUTTING, Cutting, DecodeWork, plan_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEAT_OF_ROW_0 = 7

lengths_of_rows = st.lists(st.integers(0, 4000) | st.integers(0, 200_000), min_size=1, max_size=90)


def plan(lengths, *, num_kv_heads=8, num_processors=132, cutting=CUTTING):
    """The items of rows of `lengths` keys, and the work that holds them."""
    work = DecodeWork.allocate(len(lengths), num_kv_heads, num_processors, DEVICE, cutting)
    work.items.fill_(-1)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    seats = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE) + SEAT_OF_ROW_0
    plan_decode(positions, seats, work)
    items = work.items.tolist()
    used = [item for item in items if item[decode_plan.NUM_SPLITS.value]]
    assert items[: len(used)] == used, "an unused item lies before a used one"
    return [Item(item) for item in used]


class Item:
    def __init__(self, words):
        self.row, self.seat, self.length, self.first, self.end, self.split, self.num_splits = words[:7]
        self.size = self.end - self.first


def num_pages(length):
    return -(-length // PAGE_TOKENS)


@settings(max_examples=25, deadline=None)
@given(
    lengths=lengths_of_rows,
    num_kv_heads=st.sampled_from([1, 2, 8]),
    num_processors=st.sampled_from([1, 16, 132]),
    cutting=st.builds(
        Cutting,
        min_pages=st.integers(1, 4),
        whole_pages=st.integers(1, 20),
        items_per_processor=st.integers(1, 8),
    ),
)
def test_every_page_of_every_row_is_in_one_item(lengths, num_kv_heads, num_processors, cutting):
    items = plan(lengths, num_kv_heads=num_kv_heads, num_processors=num_processors, cutting=cutting)
    places = {row: [] for row in range(len(lengths))}
    for place, item in enumerate(items):
        places[item.row].append(place)
    for row, own in places.items():
        assert own == list(range(own[0], own[0] + len(own))), "the splits of a row do not follow one another"
        parts = [items[place] for place in own]
        assert [part.split for part in parts] == list(range(len(parts)))
        assert {part.num_splits for part in parts} == {len(parts)}
        assert {(part.seat, part.length) for part in parts} == {(SEAT_OF_ROW_0 + row, lengths[row])}
        assert [part.first for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == num_pages(lengths[row])
        assert len(parts) == 1 or min(part.size for part in parts) > 0


@settings(max_examples=25, deadline=None)
@given(lengths=lengths_of_rows)
def test_larger_items_come_first(lengths):
    items = plan(lengths)
    sizes = [max(part.size for part in items if part.row == item.row) for item in items]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 64, 65, 130])
def test_batches_around_the_kernels_blocks(batch):
    items = plan([100 * (row + 1) for row in range(batch)])
    assert {item.row for item in items} == set(range(batch))
    assert sum(item.size for item in items) == sum(num_pages(100 * (row + 1)) for row in range(batch))


@pytest.mark.parametrize("batch", [16, 64, 256])
def test_equal_rows_that_fill_the_device_are_not_cut(batch):
    assert [item.num_splits for item in plan([1024] * batch)] == [1] * batch


def test_one_row_is_cut_for_the_whole_device():
    assert len(plan([8192])) == 16
    assert len(plan([1024])) == 8


def test_a_long_row_is_cut_among_short_ones():
    items = plan([500] * 31 + [32768])
    assert max(item.size for item in items) <= 24
    assert [item.row for item in items[:22]] == [31] * 22


def test_rows_without_keys_have_one_empty_item_at_the_end():
    items = plan([0, 300, 0])
    assert [(item.row, item.size, item.num_splits) for item in items[-2:]] == [(0, 0, 1), (2, 0, 1)]


def test_unused_items_of_an_earlier_plan_are_cleared():
    work = DecodeWork.allocate(4, 2, 132, DEVICE)
    seats = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for length in (100_000, 10):
        plan_decode(torch.full((4,), length - 1, dtype=torch.int32, device=DEVICE), seats, work)
    used = work.items[:, decode_plan.NUM_SPLITS.value] > 0
    assert used.tolist() == [True] * 4 + [False] * (len(work.items) - 4)


def test_a_smaller_batch_leaves_the_rest_of_the_items_alone():
    work = DecodeWork.allocate(6, 2, 4, DEVICE)
    work.items.fill_(-1)
    ones = torch.ones(2, dtype=torch.int32, device=DEVICE)
    plan_decode(ones, ones, work)
    assert (work.items[work.max_items(2) :] == -1).all()
    assert (work.items[: work.max_items(2), decode_plan.NUM_SPLITS.value] >= 0).all()


def test_empty_batch_does_nothing():
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    plan_decode(empty, empty, DecodeWork.allocate(1, 1, 1, DEVICE))
