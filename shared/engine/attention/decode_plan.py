"""Plan of a decode step's attention: the rows' pages cut into items of work, by a kernel, from lengths on the device.

Once a step, not once a layer. How many items there may be depends on the batch alone, so the step can be captured in
a CUDA graph, while their sizes follow the lengths: long rows are cut into many items, short rows are one each.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportArgumentType=false
# ruff: noqa: ANN001, ANN202
# triton has no types, and kernels take none.

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.blocks import PAGE_TOKENS

ITEM_WORDS = tl.constexpr(8)
ROW = tl.constexpr(0)
SEAT = tl.constexpr(1)
LENGTH = tl.constexpr(2)
START_PAGE = tl.constexpr(3)
END_PAGE = tl.constexpr(4)
SPLIT = tl.constexpr(5)
NUM_SPLITS = tl.constexpr(6)

ROWS_A_PROGRAM = tl.constexpr(32)
ROWS_A_TURN = tl.constexpr(64)
SPLITS_A_TURN = tl.constexpr(16)
UNUSED_A_TURN = tl.constexpr(128)


@dataclass(frozen=True, slots=True)
class Cutting:
    """How finely rows are cut, in pages that one item holds at most.

    An item holds what one program a processor would take, as merging costs more than an idle processor where there is
    little work. Where there is more than `whole_pages` a processor, items hold `whole_pages`, and still more where
    that would make more than `items_per_processor`.

    Attributes:
        min_pages: no item holds less, unless its row does.
        whole_pages: what a program may take without delaying the others' end, and merging would not pay for.
        items_per_processor: programs of cut rows for each multiprocessor, at most.
    """

    min_pages: int
    whole_pages: int
    items_per_processor: int


CUTTING = Cutting(min_pages=2, whole_pages=24, items_per_processor=4)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Items of work, for `num_kv_heads` programs each on `num_processors` multiprocessors.

    Attributes:
        items: int32 `[max_items, ITEM_WORDS]`: ROW of the batch, its SEAT and LENGTH in keys, pages START_PAGE to
            END_PAGE of the row, which are SPLIT of NUM_SPLITS of it. Largest items first; the splits of a row follow
            one another. Row at position -1: one item of length 0. Unused: NUM_SPLITS is 0, the rest undefined.
    """

    items: Tensor
    num_kv_heads: int
    num_processors: int
    cutting: Cutting

    @classmethod
    def allocate(
        cls,
        max_batch: int,
        num_kv_heads: int,
        num_processors: int,
        device: torch.device,
        cutting: Cutting = CUTTING,
    ) -> Self:
        """For batches of up to `max_batch` rows."""
        items = torch.zeros((0, ITEM_WORDS.value), dtype=torch.int32, device=device)
        work = cls(items, num_kv_heads, num_processors, cutting)
        return cls(
            items.new_zeros((work.max_items(max_batch), ITEM_WORDS.value)), num_kv_heads, num_processors, cutting
        )

    def max_items(self, batch: int) -> int:
        """Items that `batch` rows of any lengths may have."""
        return batch + self.num_processors * self.cutting.items_per_processor // self.num_kv_heads


def plan_decode(positions: Tensor, seats: Tensor, work: DecodeWork) -> None:
    """Cut rows of positions[b] + 1 keys at seat seats[b] into the first `work.max_items(B)` of `work.items`.

    Args:
        positions: int32 `[B]`; -1 for padding.
        seats: int32 `[B]`.
    """
    batch = len(positions)
    if batch == 0:
        return
    _plan_kernel[(triton.cdiv(batch, ROWS_A_PROGRAM.value),)](
        positions,
        seats,
        work.items,
        batch,
        work.max_items(batch),
        work.num_kv_heads,
        work.num_processors,
        work.cutting.min_pages,
        work.cutting.whole_pages,
        work.cutting.items_per_processor,
        padded_batch=max(triton.next_power_of_2(batch), ROWS_A_TURN.value),
        page_tokens=PAGE_TOKENS,
    )


@triton.jit
def _load_rows(positions, rows, batch, pages_an_item, page_tokens: tl.constexpr):
    """Length of each of `rows`, its pages, how many items they make (0 behind the batch) and the largest's pages."""
    length = tl.load(positions + rows, mask=rows < batch, other=-1) + 1
    pages = tl.cdiv(length, page_tokens)
    splits = tl.maximum(1, tl.cdiv(pages, pages_an_item))
    return length, pages, tl.where(rows < batch, splits, 0), tl.cdiv(pages, splits)


@triton.jit(
    do_not_specialize=[
        "batch",
        "max_items",
        "num_kv_heads",
        "num_processors",
        "min_pages",
        "whole_pages",
        "items_per_processor",
    ],
    do_not_specialize_on_alignment=["positions", "seats"],
)
def _plan_kernel(
    positions,
    seats,
    items,
    batch,
    max_items,
    num_kv_heads,
    num_processors,
    min_pages,
    whole_pages,
    items_per_processor,
    padded_batch: tl.constexpr,
    page_tokens: tl.constexpr,
):
    """One program for ROWS_A_PROGRAM rows; each looks at all rows to find the place of its own."""
    every = tl.arange(0, padded_batch)
    lengths = tl.load(positions + every, mask=every < batch, other=-1) + 1
    work = tl.sum(tl.cdiv(lengths, page_tokens)) * num_kv_heads
    evenly = tl.maximum(whole_pages, tl.cdiv(work, num_processors * items_per_processor))
    pages_an_item = tl.maximum(min_pages, tl.minimum(tl.cdiv(work, num_processors), evenly))

    rows = tl.program_id(0) * ROWS_A_PROGRAM + tl.arange(0, ROWS_A_PROGRAM)
    length, pages, splits, size = _load_rows(positions, rows, batch, pages_an_item, page_tokens)
    place = tl.zeros([ROWS_A_PROGRAM], tl.int32)
    num_items = 0
    for first in range(0, padded_batch, ROWS_A_TURN):
        others = first + tl.arange(0, ROWS_A_TURN)
        _, _, other_splits, other_size = _load_rows(positions, others, batch, pages_an_item, page_tokens)
        larger = other_size[None, :] > size[:, None]
        earlier = (other_size[None, :] == size[:, None]) & (others[None, :] < rows[:, None])
        place += tl.sum(tl.where(larger | earlier, other_splits[None, :], 0), axis=1)
        num_items += tl.sum(other_splits)

    seat = tl.load(seats + rows, mask=rows < batch, other=0)
    for first in range(0, tl.max(splits), SPLITS_A_TURN):
        split = first + tl.arange(0, SPLITS_A_TURN)[None, :]
        mask = split < splits[:, None]
        item = items + (place[:, None] + split) * ITEM_WORDS
        share = tl.maximum(splits, 1)[:, None]
        tl.store(item + ROW, rows[:, None] + 0 * split, mask=mask)
        tl.store(item + SEAT, seat[:, None] + 0 * split, mask=mask)
        tl.store(item + LENGTH, length[:, None] + 0 * split, mask=mask)
        tl.store(item + START_PAGE, pages[:, None] * split // share, mask=mask)
        tl.store(item + END_PAGE, pages[:, None] * (split + 1) // share, mask=mask)
        tl.store(item + SPLIT, split + 0 * rows[:, None], mask=mask)
        tl.store(item + NUM_SPLITS, splits[:, None] + 0 * split, mask=mask)

    for first in range(num_items + tl.program_id(0) * UNUSED_A_TURN, max_items, tl.num_programs(0) * UNUSED_A_TURN):
        unused = first + tl.arange(0, UNUSED_A_TURN)
        tl.store(items + unused * ITEM_WORDS + NUM_SPLITS, 0, mask=unused < max_items)
