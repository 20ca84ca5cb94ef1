"""What one step computes, as the device needs it: a shape, and the words that fill it.

    token rows:    decode rows, padded to a bucket | tokens of the chunks, one chunk's behind the other | padding
    sampled rows:  decode rows, padded to a bucket | last rows of the chunks that end a prompt          | padding

A decode row's token and position come from its seat, those of chunks are sent. So the words of a step of decode rows
are its seats alone, and do not change as long as the same sequences decode.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportArgumentType=false
# ruff: noqa: ANN001, ANN202
# triton is untyped, and so are the arguments of kernels.

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from shared.engine.attention.prefill import max_blocks, plan_blocks
from shared.engine.batch import BatchRow
from shared.engine.host_copies import Words
from shared.engine.seats import Word, is_decode
from shared.request import SamplingParams

ALIGNMENT_WORDS = 32
"""Every part of the words begins at a multiple: kernels are compiled anew for pointers of another alignment."""

SMALL_PREFILLS = (64, 128, 256, 512)
"""Token rows of the prefill steps that are padded to a shape known beforehand."""

SMALL_DECODES = (8, 16, 32, 64, 96, 128, 192, 256)
"""Decode rows beside such chunks, likewise."""

MAX_SMALL_CHUNKS = 8
"""Chunks of such a step."""

UNCUT_PADDING = 8
"""Rows added to such a step where there would be 64 beyond a multiple of 128, above 512: there cuBLAS cuts the depth of
its products and adds up the parts. Measured on an H200, all products of Llama's 8B | 1B, ms:

    rows      512          576           584           640           704           768
              9.43|1.64    11.63|2.02    11.41|1.88    12.03|1.94    13.99|2.39    14.17|2.27
"""

SEATS_A_PROGRAM = 256

Array = TypeVar("Array", Words, Tensor)


class Draw(Enum):
    """How the tokens of a step are drawn: as simply as its rows allow."""

    GREEDY = auto()
    """The likeliest token of every row."""

    SAMPLED = auto()
    """By temperature, top-k, top-p and min-p."""

    EXTRAS = auto()
    """The same with penalties, forbidden ends or log probabilities."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many rows of each kind, padding included.

    Attributes:
        num_decode: decode rows: the first of the token rows and the first of the sampled rows.
        num_tokens: token rows.
        num_blocks: of prefill attention.
        num_sampled: sampled rows.
    """

    num_decode: int
    num_tokens: int
    num_blocks: int
    num_sampled: int

    @property
    def is_decode(self) -> bool:
        """Whether there are decode rows alone."""
        return self.num_tokens == self.num_decode


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """Views of the words of one step, on either side; all int32.

    Attributes:
        seats: `[num_tokens]`, of each token row.
        sampled_rows: `[num_sampled]`, the token row of each; empty in decode steps, where they are the same.
        sampled_seats: `[num_sampled]`.
        ends: `[num_sampled]`, position of the drawn token; 0 in padding rows. Those of decode rows come from the seats.
        ids, positions: `[num_tokens]`; position -1 in padding rows. Those of decode rows come from the seats.
        blocks: `[num_blocks, 4]`, see `prefill_attention`.
    """

    seats: Array
    sampled_rows: Array
    sampled_seats: Array
    ends: Array
    ids: Array
    positions: Array
    blocks: Array

    @classmethod
    def of(cls, words: Array, shape: StepShape) -> "StepInputs[Array]":
        """The parts of `words`, which may be longer."""
        num_listed = 0 if shape.is_decode else shape.num_sampled
        lengths = (
            shape.num_tokens, num_listed, num_listed, shape.num_sampled, shape.num_tokens, shape.num_tokens,
            4 * shape.num_blocks,
        )  # fmt: skip
        parts: list[Array] = []
        offset = 0
        for length in lengths:
            parts.append(words[offset : offset + length])
            offset += _aligned(length)
        seats, sampled_rows, sampled_seats, ends, ids, positions, blocks = parts
        if shape.is_decode:
            sampled_seats = seats
        return cls(seats, sampled_rows, sampled_seats, ends, ids, positions, blocks.reshape(-1, 4))


def num_words(shape: StepShape) -> int:
    """Length of the words of a step, at most."""
    lengths = [shape.num_tokens] * 3 + [shape.num_sampled] * 3 + [4 * shape.num_blocks]
    return sum(map(_aligned, lengths))


def padding_words(shape: StepShape, nobody: int) -> Words:
    """The words of a step without a row."""
    words = np.zeros(num_words(shape), dtype=np.int32)
    inputs = StepInputs[Words].of(words, shape)
    inputs.seats.fill(nobody)
    inputs.sampled_seats.fill(nobody)
    inputs.positions.fill(-1)
    return words


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        words: to be sent, unless the same were sent for this shape before.
        drawn: (row of the batch, sampled row) of each token wanted.
    """

    shape: StepShape
    words: Words
    draw: Draw
    drawn: list[tuple[int, int]]


class StepPlanner:
    """Plans the steps of one runner.

    `tokens_per_block` gives the tokens of a block of prefill attention in a step of so many token rows.

    Attributes:
        decode_buckets: numbers of decode rows that there are shapes for, ascending, the last for `max_running` rows.
    """

    def __init__(
        self, max_running: int, max_batch_tokens: int, nobody: int, tokens_per_block: Callable[[int], int]
    ) -> None:
        self.decode_buckets = decode_buckets(max_running)
        self._max_batch_tokens = max_batch_tokens
        self._nobody = nobody
        self._tokens_per_block = tokens_per_block
        self._small_decodes = [size for size in SMALL_DECODES if size < max_running]
        self._small_decodes += [max_running] if max_running <= SMALL_DECODES[-1] else []
        self._small_chunks = [size for size in SMALL_PREFILLS if size <= max_batch_tokens]

    @property
    def decode_shapes(self) -> list[StepShape]:
        return [self._decode_shape(bucket) for bucket in self.decode_buckets]

    @property
    def prefill_shapes(self) -> list[StepShape]:
        """Of small prefill steps, without and with decode rows."""
        return [
            self._small_shape(num_decode, num_tokens)
            for num_decode in (0, *self._small_decodes)
            for num_tokens in self._small_chunks
        ]

    @property
    def largest_shape(self) -> StepShape:
        """At least as large as any step's in each respect."""
        most = self.decode_buckets[-1]
        padding = max(after - before for before, after in pairwise([0, *self.decode_buckets])) - 1
        num_tokens = max(self._max_batch_tokens + padding, *(shape.num_tokens for shape in self.prefill_shapes), 0)
        num_chunks = max(most, MAX_SMALL_CHUNKS)
        num_sampled = most + max(padding, MAX_SMALL_CHUNKS)
        fewest = min(self._tokens_per_block(size) for size in (1, num_tokens))
        return StepShape(most, num_tokens, max_blocks(num_tokens, num_chunks, fewest), num_sampled)

    def plan(self, rows: Sequence[BatchRow]) -> StepPlan:
        """The step that computes `rows`."""
        decoding = [index for index, row in enumerate(rows) if is_decode(row)]
        if len(decoding) == len(rows):
            return self._plan_decode(rows)
        chunks = [index for index, row in enumerate(rows) if not is_decode(row)]
        return self._plan_mixed(rows, decoding, chunks)

    def _plan_decode(self, rows: Sequence[BatchRow]) -> StepPlan:
        shape = self._decode_shape(_least(self.decode_buckets, len(rows)))
        seats = np.full(shape.num_decode, self._nobody, dtype=np.int32)
        seats[: len(rows)] = [row.seat for row in rows]
        return StepPlan(shape, seats, draw_of(rows), [(index, index) for index in range(len(rows))])

    def _plan_mixed(self, rows: Sequence[BatchRow], decoding: Sequence[int], chunks: Sequence[int]) -> StepPlan:
        lengths = np.array([rows[index].end - rows[index].start for index in chunks], dtype=np.int32)
        starts = np.array([rows[index].start for index in chunks], dtype=np.int32)
        seats = np.array([rows[index].seat for index in chunks], dtype=np.int32)
        num_chunked = int(lengths.sum())
        small = self._fitting_shape(len(decoding), num_chunked, len(chunks))
        num_decode = small.num_decode if small else _least(self.decode_buckets, len(decoding))
        lasts = num_decode + np.cumsum(lengths, dtype=np.int32)
        ending = [place for place, index in enumerate(chunks) if rows[index].sample]
        num_tokens = small.num_tokens if small else num_decode + num_chunked
        tokens_per_block = self._tokens_per_block(num_tokens)
        blocks = plan_blocks(lasts - lengths, lengths, starts, seats, tokens_per_block)
        shape = small or StepShape(num_decode, num_tokens, len(blocks), num_decode + len(ending))
        words = padding_words(shape, self._nobody)
        inputs = StepInputs[Words].of(words, shape)
        decode_seats = [rows[index].seat for index in decoding]
        inputs.seats[: len(decoding)] = decode_seats
        inputs.sampled_seats[: len(decoding)] = decode_seats
        inputs.sampled_rows[:num_decode] = np.arange(num_decode)
        for index, last in zip(chunks, lasts.tolist(), strict=True):
            row = rows[index]
            own = slice(last - (row.end - row.start), last)
            inputs.seats[own] = row.seat
            inputs.ids[own] = np.frombuffer(row.ids[row.start : row.end], dtype=np.int32)
            inputs.positions[own] = np.arange(row.start, row.end)
        inputs.blocks[: len(blocks)] = blocks
        sampled = slice(num_decode, num_decode + len(ending))
        inputs.sampled_rows[sampled] = lasts[ending] - 1
        inputs.sampled_seats[sampled] = seats[ending]
        inputs.ends[sampled] = starts[ending] + lengths[ending]
        drawn = [(index, place) for place, index in enumerate(decoding)]
        drawn += [(chunks[place], num_decode + rank) for rank, place in enumerate(ending)]
        return StepPlan(shape, words, draw_of([rows[index] for index, _ in drawn]), drawn)

    def _fitting_shape(self, num_decode: int, num_chunked: int, num_chunks: int) -> StepShape | None:
        """The least of the small prefill steps with room for these rows."""
        if (
            num_chunks > MAX_SMALL_CHUNKS
            or num_chunked > max(self._small_chunks, default=0)
            or num_decode > max(self._small_decodes, default=0)
        ):
            return None
        return self._small_shape(_least(self._small_decodes, num_decode), _least(self._small_chunks, num_chunked))

    def _small_shape(self, num_decode: int, num_chunked: int) -> StepShape:
        num_tokens = num_decode + num_chunked
        if num_tokens > 512 and num_tokens % 128 == 64:
            num_tokens += UNCUT_PADDING
        num_blocks = max_blocks(num_chunked, MAX_SMALL_CHUNKS, self._tokens_per_block(num_tokens))
        return StepShape(num_decode, num_tokens, num_blocks, num_decode + MAX_SMALL_CHUNKS)

    def _decode_shape(self, num_rows: int) -> StepShape:
        return StepShape(num_rows, num_rows, 0, num_rows)


def _least(sizes: Sequence[int], number: int) -> int:
    """The least of ascending `sizes` that is enough for `number`; 0 is enough for none."""
    return sizes[bisect_left(sizes, number)] if number else 0


def decode_buckets(max_running: int) -> list[int]:
    """1, 2, 4, then steps that keep padding below a quarter, to `max_running`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_running, 32)]
    return [*(size for size in sizes if size < max_running), max_running]


def draw_of(rows: Sequence[BatchRow]) -> Draw:
    """The simplest draw that serves all of `rows`."""
    if any(row.forbid_end or wants_extras(row.sampling) for row in rows):
        return Draw.EXTRAS
    return Draw.SAMPLED if any(row.sampling.temperature > 0 for row in rows) else Draw.GREEDY


def wants_extras(sampling: SamplingParams) -> bool:
    return sampling.logprobs is not None or sampling.has_penalty


def begin_step(seat_words: Tensor, inputs: StepInputs[Tensor], num_decode: int) -> None:
    """Fill in what decode rows take from their seats: ids, positions and ends."""
    if num_decode:
        _begin_kernel[(triton.cdiv(num_decode, SEATS_A_PROGRAM),)](
            seat_words,
            inputs.seats,
            inputs.ids,
            inputs.positions,
            inputs.ends,
            num_decode,
            record_words=seat_words.stride(0),
            block=SEATS_A_PROGRAM,
        )


_POSITION = tl.constexpr(Word.POSITION.value)
_TOKEN = tl.constexpr(Word.TOKEN.value)


@triton.jit(do_not_specialize=["num_decode"])
def _begin_kernel(seat_words, seats, ids, positions, ends, num_decode, record_words: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * block + tl.arange(0, block)
    mask = row < num_decode
    record = seat_words + tl.load(seats + row, mask=mask, other=0) * record_words
    position = tl.load(record + _POSITION, mask=mask)
    tl.store(ids + row, tl.load(record + _TOKEN, mask=mask), mask=mask)
    tl.store(positions + row, position, mask=mask)
    tl.store(ends + row, position + 1, mask=mask)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT_WORDS) * ALIGNMENT_WORDS
