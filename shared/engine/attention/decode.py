"""Paged attention of one query row a sequence, in Triton: the decode step's attention.

The keys of a row are split among several programs so that a small batch still fills the device and one long row does
not delay the others, and the last program of a row to finish merges what they found (flash-decoding: Dao, Haziza,
Massa, Sizov 2023). What each program does is read from the plan of the step, see `decode_plan`. The grid depends on the
batch alone, never on the lengths, which only the device knows: a launch can be captured in a CUDA graph. Programs
without work return at once.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202, ANN201
# triton has no types, and kernels take none.

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.blocks import PAGE_TOKENS
from shared.engine.attention.decode_plan import (
    END_PAGE,
    ITEM_WORDS,
    LENGTH,
    NUM_SPLITS,
    ROW,
    SEAT,
    SPLIT,
    START_PAGE,
    DecodeWork,
)
from shared.engine.layers.overlap import launch_options, overlaps

MIN_DOT_ROWS = tl.constexpr(16)
"""Rows that a matrix multiplication takes at least; the query heads of a KV head are padded to it."""

MERGE_CHUNK = tl.constexpr(8)
"""Splits that the merging program reads together."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one program walks its keys: pages a turn, warps, and stages of Triton's software pipeline.

    A page's number is loaded a level before its keys, so the keys have (num_stages - 1) // 2 buffers.
    """

    block_pages: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What the programs of one launch leave for each other. Launches that may overlap need one each.

    Attributes:
        work: the plan of the step.
        partial: float32 `[slots, head_dim]`, an item's output for one query head, as if its keys were all.
        weight: float32 `[slots]`, log2 of the sum of exp2 of the item's scores: by this the parts are weighed.
        arrived: int32 `[max_batch * num_kv_heads]`, items that have left their part; 0 between launches.
    """

    work: DecodeWork
    partial: Tensor
    weight: Tensor
    arrived: Tensor

    @classmethod
    def allocate(
        cls, max_batch: int, num_heads: int, num_kv_heads: int, head_dim: int, num_processors: int, device: torch.device
    ) -> Self:
        """For batches of up to `max_batch` rows on a device of `num_processors` multiprocessors."""
        work = DecodeWork.allocate(max_batch, num_kv_heads, num_processors, device)
        slots = len(work.items) * num_heads
        return cls(
            work=work,
            partial=torch.empty((slots, head_dim), dtype=torch.float32, device=device),
            weight=torch.empty(slots, dtype=torch.float32, device=device),
            arrived=torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device),
        )


def decode_attention(
    q: Tensor,
    layer_pages: Tensor,
    page_table: Tensor,
    out: Tensor,
    scratch: DecodeScratch,
    *,
    scale: float,
) -> None:
    """Attend each row of `q` to the keys of its seat up to its length, as `plan_decode` wrote into `scratch.work`.

    The plan is to be of the same B rows. A row of length 0 is padding, its output is 0.

    Args:
        q: `[B, num_heads, head_dim]`, rows at any distance, each contiguous.
        layer_pages: `[num_pages, 2, PAGE_TOKENS, num_kv_heads, head_dim]`, pages at any distance, each contiguous.
        page_table: int32 `[num_seats, max_pages]`, rows at any distance.
        out: `[B, num_heads * head_dim]`, contiguous, of q's dtype; written.
        scratch: for B rows or more of these heads.
        scale: what the products of q and k are multiplied by.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = layer_pages.shape[3]
    if batch == 0:
        return
    work = scratch.work
    tiling = tiling_for(q.dtype, head_dim, batch * num_kv_heads / work.num_processors)
    overlap = overlaps(batch, q.device)
    decode_kernel[num_kv_heads, work.max_items(batch)](
        q,
        layer_pages,
        page_table,
        work.items,
        out,
        scratch.partial,
        scratch.weight,
        scratch.arrived,
        q.stride(0),
        layer_pages.stride(0),
        page_table.stride(0),
        scale * math.log2(math.e),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_tokens=PAGE_TOKENS,
        block_pages=tiling.block_pages,
        overlap=overlap,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **launch_options(overlap),
    )


def tiling_for(dtype: torch.dtype, head_dim: int, programs_per_processor: float) -> Tiling:
    """The fastest of those measured on an H200.

    Three programs with two buffers, or four with one, are resident on a processor. The former end sooner when few are
    left; the latter pay where they let all rows of a batch, uncut, run at once.
    """
    if dtype == torch.float32:
        return Tiling(block_pages=1, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Tiling(block_pages=1, num_warps=4, num_stages=3)
    num_stages = 3 if 3 < programs_per_processor <= 4 else 5
    return Tiling(block_pages=1, num_warps=2, num_stages=num_stages)


@triton.jit
def _row_of_head(num_heads: tl.constexpr, num_kv_heads: tl.constexpr, padded_rows: tl.constexpr):
    """Query heads of this program's KV head and which of the padded rows are heads at all."""
    group: tl.constexpr = num_heads // num_kv_heads
    rows = tl.arange(0, padded_rows)
    return tl.program_id(0) * group + rows, rows < group


@triton.jit
def _attend_pages(
    q,
    layer_pages,
    pages,
    first_page,
    last_page,
    length,
    page_stride,
    scale,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    block_pages: tl.constexpr,
):
    """Attend `q` `[rows, padded_dim]` to the keys of pages [first_page, last_page) that lie below `length`.

    `scale` includes log2(e), for exp2. Returns the output float32 `[rows, padded_dim]` as if these keys were all, and
    log2 of the sum of exp2 of the scores `[rows]`.
    """
    block_keys: tl.constexpr = block_pages * page_tokens
    rows: tl.constexpr = q.shape[0]
    dims = tl.arange(0, padded_dim)
    keys = tl.arange(0, block_keys)
    row_stride: tl.constexpr = num_kv_heads * head_dim
    offsets = (keys % page_tokens)[:, None] * row_stride + tl.program_id(0) * head_dim + dims[None, :]
    end = tl.minimum(length, last_page * page_tokens)

    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mixed = tl.zeros([rows, padded_dim], tl.float32)
    for first in range(first_page, last_page, block_pages):
        page = tl.load(pages + first).to(tl.int64) * page_stride
        if block_pages == 2:
            second = tl.load(pages + tl.minimum(first + 1, last_page - 1)).to(tl.int64) * page_stride
            page = tl.where(keys < page_tokens, page, second)[:, None]
        seen = first * page_tokens + keys < end
        mask = seen[:, None]
        if padded_dim != head_dim:
            mask = mask & (dims < head_dim)[None, :]
        key = tl.load(layer_pages + page + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - new_top)
        share = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(share, axis=1)
        value = tl.load(layer_pages + page + page_tokens * row_stride + offsets, mask=mask, other=0.0)
        mixed = tl.dot(share.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        top = new_top
    return mixed / total[:, None], top + tl.log2(total)


@triton.jit
def _merge_splits(
    partial,
    weight,
    first_slot,
    num_splits,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """Weigh the parts of `num_splits` splits, `num_heads` slots apart, into `[padded rows, padded_dim]`."""
    group: tl.constexpr = num_heads // num_kv_heads
    padded_rows: tl.constexpr = triton.next_power_of_2(group)
    heads, is_head = _row_of_head(num_heads, num_kv_heads, padded_rows)
    dims = tl.arange(0, padded_dim)
    splits = tl.arange(0, MERGE_CHUNK)

    top = tl.full([padded_rows], float("-inf"), tl.float32)
    total = tl.zeros([padded_rows], tl.float32)
    mixed = tl.zeros([padded_rows, padded_dim], tl.float32)
    for first in range(0, num_splits, MERGE_CHUNK):
        slots = first_slot + (first + splits)[:, None] * num_heads + heads[None, :]
        used = (first + splits < num_splits)[:, None] & is_head[None, :]
        # Read from L2: the parts come from other multiprocessors.
        logs = tl.load(weight + slots, mask=used, other=float("-inf"), cache_modifier=".cg")
        part_mask = used[:, :, None] & (dims < head_dim)[None, None, :]
        parts = tl.load(
            partial + slots[:, :, None] * head_dim + dims[None, None, :],
            mask=part_mask,
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(logs, axis=0))
        new_top = tl.where(is_head, new_top, 0.0)
        shrink = tl.exp2(top - new_top)
        share = tl.exp2(logs - new_top[None, :])
        total = total * shrink + tl.sum(share, axis=0)
        mixed = mixed * shrink[:, None] + tl.sum(parts * share[:, :, None], axis=0)
        top = new_top
    return mixed / tl.where(is_head, total, 1.0)[:, None]


@triton.jit(do_not_specialize_on_alignment=["page_table"], do_not_specialize=["table_stride"])
def decode_kernel(
    q,
    layer_pages,
    page_table,
    items,
    out,
    partial,
    weight,
    arrived,
    q_stride,
    page_stride,
    table_stride,
    scale,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    block_pages: tl.constexpr,
    overlap: tl.constexpr,
):
    """One program a KV head (axis 0) and item of work (axis 1); see `decode_attention`."""
    if overlap:
        gdc_launch_dependents()
        gdc_wait()
    group: tl.constexpr = num_heads // num_kv_heads
    padded_rows: tl.constexpr = max(MIN_DOT_ROWS, triton.next_power_of_2(group))
    padded_dim: tl.constexpr = triton.next_power_of_2(head_dim)
    item = items + tl.program_id(1) * ITEM_WORDS
    row = tl.load(item + ROW).to(tl.int64)
    seat = tl.load(item + SEAT).to(tl.int64)
    length = tl.load(item + LENGTH)
    first_page = tl.load(item + START_PAGE)
    end_page = tl.load(item + END_PAGE)
    split = tl.load(item + SPLIT)
    num_splits = tl.load(item + NUM_SPLITS)
    if num_splits == 0:
        return
    heads, is_head = _row_of_head(num_heads, num_kv_heads, padded_rows)
    dims = tl.arange(0, padded_dim)
    in_dim = (dims < head_dim)[None, :]
    head_mask = is_head[:, None] & in_dim
    out_offsets = row * num_heads * head_dim + heads[:, None] * head_dim + dims[None, :]
    if length == 0:
        tl.store(out + out_offsets, tl.zeros([padded_rows, padded_dim], out.dtype.element_ty), mask=head_mask)
        return

    queries = tl.load(
        q + row * q_stride + heads[:, None] * head_dim + dims[None, :],
        mask=head_mask,
        other=0.0,
    )
    mixed, log_sum = _attend_pages(
        queries,
        layer_pages,
        page_table + seat * table_stride,
        first_page,
        end_page,
        length,
        page_stride,
        scale,
        num_kv_heads,
        head_dim,
        padded_dim,
        page_tokens,
        block_pages,
    )
    if num_splits == 1:
        tl.store(out + out_offsets, mixed.to(out.dtype.element_ty), mask=head_mask)
        return

    slots = tl.program_id(1) * num_heads + heads
    tl.store(partial + slots[:, None] * head_dim + dims[None, :], mixed, mask=head_mask)
    tl.store(weight + slots, log_sum, mask=is_head)
    # All threads' parts must be written before one thread says so.
    tl.debug_barrier()
    counter = arrived + row * num_kv_heads + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") < num_splits - 1:
        return
    tl.store(counter, 0)
    first_slot = (tl.program_id(1) - split) * num_heads
    merged = _merge_splits(partial, weight, first_slot, num_splits, num_heads, num_kv_heads, head_dim, padded_dim)
    merged_heads, is_merged_head = _row_of_head(num_heads, num_kv_heads, triton.next_power_of_2(group))
    tl.store(
        out + row * num_heads * head_dim + merged_heads[:, None] * head_dim + dims[None, :],
        merged.to(out.dtype.element_ty),
        mask=is_merged_head[:, None] & in_dim,
    )
