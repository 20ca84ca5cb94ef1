"""Attention of prompt chunks over paged keys and values, as a Triton kernel with its torch reference.

A block of query rows is a few neighbouring tokens of one sequence, each with all query heads that share one KV head:
these heads read the same keys, and few tokens at a time leave little of the causal diagonal to be masked away.
Softmax is kept running over tiles of keys (FlashAttention-2, Dao 2023), in base 2 and float32.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportMissingTypeStubs=false
# pyright: reportOperatorIssue=false, reportUntypedFunctionDecorator=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202, N803
# Triton is untyped, and its kernels are Python in form only.

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shared.blocks import PAGE_TOKENS

FIRST_ROW, NUM_ROWS, FIRST_POSITION, SEAT = range(4)
"""Columns of a plan of blocks. NUM_ROWS 0: nothing to do."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
        block_rows: query rows (tokens times query heads of a KV head) of one program, a power of two from 16 on.
        tile_pages: pages whose keys share one step of the running softmax, 1 or 2.
        num_warps: warps of one program; 4 for at most 64 or 128 rows, else 8.
        num_stages: tiles of keys and values in flight or in use.
        bulk_copy: whether the copy engine (TMA) brings the pages, else the threads do.
    """

    block_rows: int
    tile_pages: int
    num_warps: int
    num_stages: int
    bulk_copy: bool

    def tokens_per_block(self, group: int) -> int:
        """Tokens of one block where `group` query heads share a KV head."""
        return self.block_rows // group


@dataclass(frozen=True, slots=True)
class Tilings:
    """Which tiling a step takes.

    Attributes:
        small: for steps that would leave processors idle if they were cut into `large` blocks.
        large: reads keys and values half as often.
        large_from: token rows of a step from which on it takes `large`.
    """

    small: Tiling
    large: Tiling
    large_from: int

    @property
    def max_group(self) -> int:
        """Query heads that may share a KV head: a block holds a token's all."""
        return min(self.small.block_rows, self.large.block_rows)

    def of(self, num_tokens: int) -> Tiling:
        """For a step of `num_tokens` token rows."""
        return self.large if num_tokens >= self.large_from else self.small


BULK_ALIGNMENT_BYTES = 16
"""What the copy engine brings begins at a multiple: heads of other sizes are brought by threads."""

PROGRAMS_A_PROCESSOR = 3
"""Programs of large blocks that each processor should have for them to pay: two run at a time."""


def tilings_for(head_dim: int, num_heads: int, dtype: torch.dtype, num_processors: int) -> Tilings:
    """Those measured fastest on an H200; `num_processors` are the device's."""
    aligned = head_dim * dtype.itemsize % BULK_ALIGNMENT_BYTES == 0
    if dtype == torch.float32:
        only = Tiling(block_rows=16, tile_pages=1, num_warps=8, num_stages=1, bulk_copy=False)
        return Tilings(only, only, 0)
    if head_dim > 128:
        only = Tiling(block_rows=128, tile_pages=1, num_warps=8, num_stages=2, bulk_copy=aligned)
        return Tilings(only, only, 0)
    small = Tiling(block_rows=64, tile_pages=1, num_warps=4, num_stages=3, bulk_copy=aligned)
    large = replace(small, block_rows=128, num_stages=2 if head_dim > 64 else 3)
    return Tilings(small, large, -(-PROGRAMS_A_PROCESSOR * num_processors * large.block_rows // num_heads))


def max_blocks(num_tokens: int, num_runs: int, tokens_per_block: int) -> int:
    """Most blocks that any `num_runs` runs of `num_tokens` tokens in all are cut into."""
    return min(num_tokens, (num_tokens + num_runs * (tokens_per_block - 1)) // tokens_per_block)


def plan_blocks(
    first_rows: NDArray[np.int32],
    num_tokens: NDArray[np.int32],
    starts: NDArray[np.int32],
    seats: NDArray[np.int32],
    tokens_per_block: int,
) -> NDArray[np.int32]:
    """Cut runs of token rows into blocks: run by run, so that blocks that run together read the same keys, and of the
    runs and of each run's blocks those with most keys first, so that the last to run are short.

    Run i is the rows `first_rows[i]` and on, `num_tokens[i]` of them, at positions `starts[i]` and on of `seats[i]`.
    Returns int32 `[num_blocks, 4]` with the columns FIRST_ROW, NUM_ROWS, FIRST_POSITION, SEAT.
    """
    counts = -(-num_tokens // tokens_per_block)
    run = np.repeat(np.arange(len(counts)), counts)
    offset = (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens_per_block
    rows = np.minimum(tokens_per_block, num_tokens[run] - offset)
    positions = starts[run] + offset
    blocks = np.stack((first_rows[run] + offset, rows, positions, seats[run]), axis=1).astype(np.int32)
    return blocks[np.lexsort((-positions, run, -(starts + num_tokens)[run]))]


def prefill_attention(
    q: Tensor,
    layer_pages: Tensor,
    page_table: Tensor,
    blocks: Tensor,
    out: Tensor,
    *,
    scale: float,
    tiling: Tiling,
) -> None:
    """Attend each row of `blocks` to positions 0 to its own, whose keys and values are in the pages.

    Args:
        q: `[T, num_heads, head_dim]`, rows of any stride, heads one after another.
        layer_pages: `[num_pages, 2, PAGE_TOKENS, num_kv_heads, head_dim]` of q's dtype; pages of any stride.
            What lies behind the last key in its page is of no matter.
        page_table: int32 `[num_seats, max_pages]`, rows of any stride.
        blocks: int32 `[num_blocks, 4]` as `plan_blocks` makes them for `tiling.tokens_per_block`.
        out: `[T, num_heads * head_dim]`, contiguous; rows in no block are left as they are.
        scale: factor of the scores, positive.
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads = layer_pages.shape[3]
    if not blocks.shape[0]:
        return
    row_stride = num_kv_heads * head_dim
    pages = _page_rows(layer_pages, head_dim) if tiling.bulk_copy else layer_pages
    _prefill_kernel[(num_kv_heads, blocks.shape[0])](
        q,
        pages,
        page_table,
        blocks,
        out,
        scale * math.log2(math.e),
        q.stride(0),
        layer_pages.stride(0) // row_stride,
        page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE=PAGE_TOKENS,
        BLOCK_ROWS=tiling.block_rows,
        TILE_PAGES=tiling.tile_pages,
        BULK_COPY=tiling.bulk_copy,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def prefill_attention_reference(
    q: Tensor, layer_pages: Tensor, page_table: Tensor, blocks: Tensor, out: Tensor, *, scale: float
) -> None:
    """The same in plain torch and float32, block by block."""
    group = q.shape[1] // layer_pages.shape[3]
    for first_row, num_rows, first_position, seat in blocks.tolist():
        if not num_rows:
            continue
        length = first_position + num_rows
        pages = page_table[seat, : -(-length // PAGE_TOKENS)].long()
        keys, values = layer_pages[pages].float().transpose(0, 1).flatten(1, 2)[:, :length]
        rows = slice(first_row, first_row + num_rows)
        scores = torch.einsum("thd,khd->htk", q[rows].float(), keys.repeat_interleave(group, 1)) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first_position + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        mixed = torch.einsum("htk,khd->thd", weights, values.repeat_interleave(group, 1))
        out[rows] = mixed.flatten(1).to(out.dtype)


def _page_rows(layer_pages: Tensor, head_dim: int) -> TensorDescriptor:
    """The pages as one matrix of token rows for the copy engine, the rows of other layers between them."""
    num_pages, _, _, num_kv_heads, _ = layer_pages.shape
    width = num_kv_heads * head_dim
    num_rows = (num_pages - 1) * (layer_pages.stride(0) // width) + 2 * PAGE_TOKENS
    rows = layer_pages.as_strided((num_rows, width), (width, 1))
    return TensorDescriptor.from_tensor(rows, [PAGE_TOKENS, triton.next_power_of_2(head_dim)])


@triton.jit
def _load_page(
    pages,
    page,
    page_rows,
    head,
    WHICH: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BULK_COPY: tl.constexpr,
):
    """Keys (WHICH 0) or values (1) of one KV head in one page, `[PAGE, PADDED_DIM]`.

    Columns from HEAD_DIM on are those of the next head or 0 with BULK_COPY, else 0.
    """
    if BULK_COPY:
        loaded = pages.load([page * page_rows + WHICH * PAGE, head * HEAD_DIM])
    else:
        row = page.to(tl.int64) * page_rows + WHICH * PAGE + tl.arange(0, PAGE)
        dim = tl.arange(0, PADDED_DIM)
        pointers = pages + (row * NUM_KV_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        if PADDED_DIM == HEAD_DIM:
            loaded = tl.load(pointers)
        else:
            loaded = tl.load(pointers, mask=dim[None, :] < HEAD_DIM, other=0.0)
    return loaded


@triton.jit
def _scores(q, keys, positions, first_key, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """Scores of the keys at positions `first_key` and on; those behind a row's own position are -inf if MASKED."""
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if MASKED:
        visible = first_key + tl.arange(0, PAGE)[None, :] <= positions[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _known(values, num_known, PAGE: tl.constexpr):
    """`values` with 0 behind the first `num_known` rows: what lies there may be NaN, which a weight of 0 would keep."""
    return tl.where(tl.arange(0, PAGE)[:, None] < num_known, values, 0.0)


@triton.jit
def _attend_tiles(
    q,
    positions,
    pages,
    page_numbers,
    page_rows,
    head,
    scale,
    first_tile,
    last_tile,
    num_keys,
    highest,
    total,
    mixed,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    BULK_COPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take tiles [first_tile, last_tile) of keys into the running softmax.

    `highest` (in base 2, scaled) and `total` are `[rows]`, `mixed` is `[rows, PADDED_DIM]` before division by `total`.
    Page numbers are read one tile ahead, so that no load of a page waits for its number.
    """
    last_page = (num_keys - 1) // PAGE
    page = tl.load(page_numbers + tl.minimum(first_tile * TILE_PAGES, last_page))
    second_page = tl.load(page_numbers + tl.minimum(first_tile * TILE_PAGES + 1, last_page))
    for tile in tl.range(first_tile, last_tile, num_stages=1 if MASKED else None):
        first_key = tile * (TILE_PAGES * PAGE)
        keys = _load_page(pages, page, page_rows, head, 0, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, BULK_COPY)
        values = _load_page(pages, page, page_rows, head, 1, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, BULK_COPY)
        if MASKED:
            values = _known(values, num_keys - first_key, PAGE)
        scores = _scores(q, keys, positions, first_key, PAGE, MASKED)
        tile_highest = tl.max(scores, 1)
        if TILE_PAGES == 2:
            keys = _load_page(
                pages, second_page, page_rows, head, 0, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, BULK_COPY
            )
            second_values = _load_page(
                pages, second_page, page_rows, head, 1, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, BULK_COPY
            )
            if MASKED:
                second_values = _known(second_values, num_keys - first_key - PAGE, PAGE)
            second_scores = _scores(q, keys, positions, first_key + PAGE, PAGE, MASKED)
            tile_highest = tl.maximum(tile_highest, tl.max(second_scores, 1))
        new_highest = tl.maximum(highest, tile_highest * scale)
        fade = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores * scale - new_highest[:, None])
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        if TILE_PAGES == 2:
            weights = tl.exp2(second_scores * scale - new_highest[:, None])
            total += tl.sum(weights, 1)
            mixed = tl.dot(weights.to(second_values.dtype), second_values, mixed, input_precision="ieee")
        highest = new_highest
        next_page = (tile + 1) * TILE_PAGES
        page = tl.load(page_numbers + tl.minimum(next_page, last_page))
        second_page = tl.load(page_numbers + tl.minimum(next_page + 1, last_page))
    return highest, total, mixed


@triton.jit(do_not_specialize=["scale", "page_rows"])
def _prefill_kernel(
    q,
    pages,
    page_table,
    blocks,
    out,
    scale,
    q_stride,
    page_rows,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    BULK_COPY: tl.constexpr,
):
    head = tl.program_id(0)
    block = blocks + tl.program_id(1) * 4
    first_row = tl.load(block)
    num_rows = tl.load(block + 1)
    first_position = tl.load(block + 2)
    page_numbers = page_table + tl.load(block + 3).to(tl.int64) * table_stride
    if num_rows == 0:
        return

    row = tl.arange(0, BLOCK_ROWS)
    # Rows behind the block's last do the work of its last token again and store nothing.
    token = tl.minimum(row // GROUP, num_rows - 1)
    query_head = head * GROUP + row % GROUP
    dim = tl.arange(0, PADDED_DIM)
    inside = dim[None, :] < HEAD_DIM
    q_rows = (first_row + token).to(tl.int64) * q_stride + query_head * HEAD_DIM
    queries = tl.load(q + q_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    positions = first_position + token

    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, PADDED_DIM], tl.float32)
    tile_keys: tl.constexpr = TILE_PAGES * PAGE
    num_keys = first_position + num_rows
    num_full = (first_position + 1) // tile_keys
    num_tiles = tl.cdiv(num_keys, tile_keys)
    highest, total, mixed = _attend_tiles(
        queries, positions, pages, page_numbers, page_rows, head, scale, 0, num_full, num_keys,
        highest, total, mixed,
        NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, TILE_PAGES, BULK_COPY, False,
    )  # fmt: skip
    highest, total, mixed = _attend_tiles(
        queries, positions, pages, page_numbers, page_rows, head, scale, num_full, num_tiles, num_keys,
        highest, total, mixed,
        NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE, TILE_PAGES, BULK_COPY, True,
    )  # fmt: skip

    mixed = mixed / total[:, None]
    out_rows = (first_row + token).to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM) + query_head * HEAD_DIM
    stored = (row < num_rows * GROUP)[:, None] & inside
    tl.store(out + out_rows[:, None] + dim[None, :], mixed.to(out.dtype.element_ty), mask=stored)
