from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS
from shared.engine.attention.prefill import (
    FIRST_POSITION,
    FIRST_ROW,
    NUM_ROWS,
    SEAT,
    Tiling,
    max_blocks,
    plan_blocks,
    prefill_attention,
    prefill_attention_reference,
    tilings_for,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tiling(block_rows=32, tile_pages=1, num_warps=4, num_stages=1, bulk_copy=False)
TILINGS = [replace(SMALL, tile_pages=pages, bulk_copy=bulk) for pages in (1, 2) for bulk in (False, True)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Chunk:
    start: int
    num_tokens: int


def plan(chunks, tokens_per_block):
    lengths = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    first_rows = (np.cumsum(lengths) - lengths).astype(np.int32)
    seats = np.arange(len(chunks), dtype=np.int32)[::-1]
    return plan_blocks(first_rows, lengths, starts, seats, tokens_per_block)


class Case:
    """Random queries of `chunks`, packed one after another, with pages in random order of a cache of three layers.

    Behind each sequence's end its last page is full of NaN.
    """

    def __init__(self, chunks, *, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32, layer_major=False):
        random = torch.Generator().manual_seed(0)
        width = max(-(-(chunk.start + chunk.num_tokens) // PAGE_TOKENS) for chunk in chunks)
        num_pages = len(chunks) * width
        one_layer = (2, PAGE_TOKENS, num_kv_heads, head_dim)
        if layer_major:
            layer_pages = torch.randn((3, num_pages, *one_layer), generator=random)[1]
        else:
            layer_pages = torch.randn((num_pages, 3, *one_layer), generator=random)[:, 1]
        self.layer_pages = _moved(layer_pages, dtype)
        # The table is part of a wider record, and q of a wider row, as in the engine.
        record = torch.full((len(chunks), 96 + width), -1, dtype=torch.int32)
        record[:, 96:] = torch.randperm(num_pages, generator=random).view(len(chunks), width)
        for chunk, row in zip(reversed(chunks), record[:, 96:], strict=True):
            end = chunk.start + chunk.num_tokens
            self.layer_pages[int(row[(end - 1) // PAGE_TOKENS]), :, (end - 1) % PAGE_TOKENS + 1 :] = torch.nan
        self.page_table = record.to(DEVICE)[:, 96:]
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        num_heads = num_kv_heads * group
        qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, generator=random)
        self.q = qkv.to(DEVICE, dtype)[:, :num_heads]
        self.scale = head_dim**-0.5
        self.chunks = chunks
        self.group = group

    def check(self, tiling, *, padding=0):
        blocks = plan(self.chunks, tiling.tokens_per_block(self.group))
        blocks = np.concatenate((blocks, np.zeros((padding, 4), np.int32)))
        blocks = torch.from_numpy(blocks).to(DEVICE)
        found, expected = (torch.full_like(self.q.flatten(1), torch.nan) for _ in range(2))
        inputs = (self.q, self.layer_pages, self.page_table, blocks)
        prefill_attention(*inputs, found, scale=self.scale, tiling=tiling)
        prefill_attention_reference(*inputs, expected, scale=self.scale)
        assert expected.isfinite().all()
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < TOLERANCE[self.q.dtype]


def _moved(view, dtype):
    """`view` on the device and in `dtype` with its strides kept."""
    moved = torch.empty_strided(view.shape, view.stride(), dtype=dtype, device=DEVICE)
    return moved.copy_(view)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_dims(head_dim, tiling):
    Case([Chunk(50, 30)], head_dim=head_dim).check(tiling)


@pytest.mark.parametrize("tiling", TILINGS)
def test_bfloat16(tiling):
    Case([Chunk(0, 20), Chunk(100, 40)], head_dim=96, dtype=torch.bfloat16).check(tiling)


@pytest.mark.parametrize("head_dim", [64, 80, 100, 136, 140])
def test_heads_that_begin_where_the_copy_engine_cannot_are_read_by_threads(head_dim):
    tiling = tilings_for(head_dim, 2, torch.bfloat16, 1).of(30)
    assert tiling.bulk_copy == (head_dim % 8 == 0)
    Case([Chunk(50, 30)], num_kv_heads=2, group=1, head_dim=head_dim, dtype=torch.bfloat16).check(tiling)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group):
    Case([Chunk(60, 35)], num_kv_heads=1, group=group).check(SMALL)


@pytest.mark.parametrize("bulk_copy", [False, True])
@pytest.mark.parametrize("tile_pages", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 127])
@pytest.mark.parametrize("num_tokens", [1, 64, 65])
def test_page_borders(start, num_tokens, tile_pages, bulk_copy):
    tiling = replace(SMALL, block_rows=64, tile_pages=tile_pages, bulk_copy=bulk_copy)
    Case([Chunk(start, num_tokens)], num_kv_heads=1, group=1).check(tiling)


@pytest.mark.parametrize("bulk_copy", [False, True])
@pytest.mark.parametrize("layer_major", [False, True])
def test_page_order(layer_major, bulk_copy):
    Case([Chunk(70, 20), Chunk(0, 90)], layer_major=layer_major).check(replace(SMALL, bulk_copy=bulk_copy))


def test_packed_chunks_with_padding_blocks():
    Case([Chunk(0, 5), Chunk(130, 1), Chunk(64, 64), Chunk(3, 17)]).check(SMALL, padding=3)


def test_large_scores_do_not_overflow():
    case = Case([Chunk(0, 70)])
    case.q *= 300
    case.check(SMALL)


def test_empty_plan_and_empty_blocks_leave_the_output():
    case = Case([Chunk(0, 4)])
    for num_blocks in (0, 2):
        blocks = torch.zeros((num_blocks, 4), dtype=torch.int32, device=DEVICE)
        out = torch.full_like(case.q.flatten(1), 7)
        prefill_attention(case.q, case.layer_pages, case.page_table, blocks, out, scale=1.0, tiling=SMALL)
        assert (out == 7).all()


def test_rows_of_no_block_are_left():
    case = Case([Chunk(0, 6)])
    blocks = torch.tensor([[2, 3, 1, 0]], dtype=torch.int32, device=DEVICE)
    out = torch.full_like(case.q.flatten(1), 7)
    prefill_attention(case.q, case.layer_pages, case.page_table, blocks, out, scale=1.0, tiling=SMALL)
    assert (out == 7).all(1).tolist() == [True, True, False, False, False, True]


chunk_lists = st.lists(st.builds(Chunk, st.integers(0, 10_000), st.integers(1, 300)), max_size=8)


@given(chunks=chunk_lists, tokens_per_block=st.integers(1, 128))
def test_plan_covers_every_row_once(chunks, tokens_per_block):
    blocks = plan(chunks, tokens_per_block)
    expected, row = [], 0
    for seat, chunk in zip(reversed(range(len(chunks))), chunks, strict=True):
        expected += [(row + i, chunk.start + i, seat) for i in range(chunk.num_tokens)]
        row += chunk.num_tokens
    covered = [
        (block[FIRST_ROW] + i, block[FIRST_POSITION] + i, block[SEAT])
        for block in blocks
        for i in range(block[NUM_ROWS])
    ]
    assert sorted(covered) == expected
    assert blocks.dtype == np.int32
    assert ((blocks[:, NUM_ROWS] > 0) & (blocks[:, NUM_ROWS] <= tokens_per_block)).all()


def test_plan_goes_run_by_run_with_the_most_keys_first():
    blocks = plan([Chunk(0, 40), Chunk(300, 20), Chunk(30, 50)], 32)
    assert blocks[:, [FIRST_POSITION, NUM_ROWS, SEAT]].tolist() == [
        [300, 20, 1], [62, 18, 0], [30, 32, 0], [32, 8, 2], [0, 32, 2],
    ]  # fmt: skip


@given(chunks=chunk_lists, tokens_per_block=st.integers(1, 128))
def test_max_blocks_bounds_every_plan(chunks, tokens_per_block):
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    assert len(plan(chunks, tokens_per_block)) <= max_blocks(num_tokens, len(chunks), tokens_per_block)


def test_max_blocks_is_reached():
    assert len(plan([Chunk(0, 33), Chunk(0, 1), Chunk(0, 32)], 32)) == max_blocks(66, 3, 32)
