"""Draws the next tokens on the device, without a sort and without a wait: the rules of `torch_sampler` as kernels.

    logits ─> penalise ─> (top log probabilities) ─> forbid ends ─> peaks ─> begin ─┬─> draw ─> check ─┬─> settle
                                                                                    └─── rejected ─────┘

The token with the largest `score / temperature + noise` of all is also that of the tokens that top-p keeps, if top-p
keeps it: if the mass above it is below p. So the nucleus is never computed: a token is drawn, the mass above it summed
up, and only a rejected one, with all that are not likelier, is left out and the draw repeated. Top-k, whose set may be
a small part of the mass, is a threshold found before by bisection over the counts.

A kernel of grid (rows, splits) leaves partial results of its chunk of the vocabulary, which the next one merges.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN202, ARG001, N803, PLR0124
# Triton has no types, its constants are written in capitals, the kernels of a draw share one list of arguments, and
# only a NaN differs from itself.

from dataclasses import dataclass, field
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.engine.batch import MAX_ENDS, MAX_LOGPROBS
from shared.engine.sampling import torch_sampler
from shared.engine.seats import FIRST_END, Word

NOT_FINITE_TOKEN = -1
"""In place of a token: the logits hold NaN or infinity."""

NOTHING_LEFT_TOKEN = -2
"""In place of a token: no token is left to pick from."""

_NOT_FINITE_TOKEN = tl.constexpr(NOT_FINITE_TOKEN)
_NOTHING_LEFT_TOKEN = tl.constexpr(NOTHING_LEFT_TOKEN)
_GOLDEN_GAMMA = tl.constexpr(torch_sampler.GOLDEN_GAMMA)
_MIX_1 = tl.constexpr(torch_sampler.MIX_1)
_MIX_2 = tl.constexpr(torch_sampler.MIX_2)
_LARGEST_NOISE = tl.constexpr(36.75)  # -log(-log(1 - 2^-53)), rounded up
_LARGEST_ID = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))
_IN_PROMPT = tl.constexpr(2**30)  # of a word of `seen`; the bits below count the answer's
_MAX_ENDS = tl.constexpr(triton.next_power_of_2(MAX_ENDS))
_FIRST_END = tl.constexpr(FIRST_END)
_POSITION = tl.constexpr(Word.POSITION.value)
_TOKEN = tl.constexpr(Word.TOKEN.value)
_PROMPT_LEN = tl.constexpr(Word.PROMPT_LEN.value)
_MIN_TOKENS = tl.constexpr(Word.MIN_TOKENS.value)
_TEMPERATURE = tl.constexpr(Word.TEMPERATURE.value)
_TOP_K = tl.constexpr(Word.TOP_K.value)
_TOP_P = tl.constexpr(Word.TOP_P.value)
_MIN_P = tl.constexpr(Word.MIN_P.value)
_REPETITION = tl.constexpr(Word.REPETITION_PENALTY.value)
_PRESENCE = tl.constexpr(Word.PRESENCE_PENALTY.value)
_FREQUENCY = tl.constexpr(Word.FREQUENCY_PENALTY.value)
_KEY_LOW = tl.constexpr(Word.KEY_LOW.value)
_KEY_HIGH = tl.constexpr(Word.KEY_HIGH.value)
_NUM_LOGPROBS = tl.constexpr(Word.NUM_LOGPROBS.value)
_NUM_ENDS = tl.constexpr(Word.NUM_ENDS.value)


@dataclass(frozen=True, slots=True)
class DrawResults:
    """Where draws leave their results, one row of each for a row of logits; rows of nobody are not written.

    Attributes:
        tokens: int32 `[max_rows]`; NOT_FINITE_TOKEN or NOTHING_LEFT_TOKEN where a row failed.
        logprobs: float32 `[max_rows]`, of the drawn token; written where the seat asks for log probabilities.
        top_ids, top_logprobs: int32 and float32 `[max_rows, MAX_LOGPROBS]`, the likeliest first; as many are written
            as the seat asks for.
    """

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device) -> Self:
        return cls(
            torch.zeros(max_rows, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.float32, device=device),
            torch.zeros(max_rows, MAX_LOGPROBS, dtype=torch.int32, device=device),
            torch.zeros(max_rows, MAX_LOGPROBS, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels cut their work: tokens a program (`chunk`), tokens a pass of its loop (`block`), warps.

    Attributes:
        few_rows: up to so many rows take `few_rows_chunk` instead, so that they fill the device too.
        row_block, row_warps: of the kernels with one program a row.
        top_chunk: of the search for the top log probabilities, whose chunk is one block.
        rounds: draws over the whole device before a row that top-p keeps rejecting goes on in a program of its own.
    """

    chunk: int = 4096
    few_rows: int = 16
    few_rows_chunk: int = 1024
    block: int = 1024
    warps: int = 4
    row_block: int = 8192
    row_warps: int = 16
    top_chunk: int = 2048
    rounds: int = 3

    def chunk_for(self, num_rows: int) -> int:
        return self.few_rows_chunk if num_rows <= self.few_rows else self.chunk


@dataclass(slots=True)
class TritonSampler:
    """Sampling for one vocabulary and one set of seats. Allocates and compiles nothing after its first draws.

    Attributes:
        seen: int32 `[num_seats + 1, vocab]`: how often a token is in the answer of the seat, with bit 30 set if it is
            in the prompt; kept up to date for seats with penalties only.
    """

    vocab_size: int
    num_seats: int
    max_rows: int
    device: torch.device
    tuning: Tuning = field(default_factory=Tuning)
    seen: Tensor = field(init=False)
    _scores: Tensor = field(init=False)
    _scratch: "_Scratch" = field(init=False)

    def __post_init__(self) -> None:
        self.seen = torch.zeros(self.num_seats + 1, self.vocab_size, dtype=torch.int32, device=self.device)
        self._scores = torch.empty(self.max_rows, self.vocab_size, dtype=torch.float32, device=self.device)
        smallest_chunk = min(self.tuning.chunk, self.tuning.few_rows_chunk)
        num_splits = _num_splits(self.vocab_size, smallest_chunk)
        num_top_splits = _num_splits(self.vocab_size, self.tuning.top_chunk)
        self._scratch = _Scratch.allocate(self.max_rows, num_splits, num_top_splits, self.device)

    def draw_greedy(
        self, logits: Tensor, seats: Tensor, ends: Tensor, seat_words: Tensor, results: DrawResults
    ) -> None:
        """`draw` where every seat has temperature 0."""
        num_rows, scratch = logits.shape[0], self._scratch
        self._find_peaks(logits, ends)
        num_splits = _num_splits(self.vocab_size, self.tuning.chunk_for(num_rows))
        _take_peaks[(num_rows,)](
            seats, ends, seat_words, scratch.peaks, results.tokens,
            seat_words.stride(0), scratch.peaks.stride(0), num_splits,
            SPLITS=triton.next_power_of_2(num_splits), num_warps=1,
        )  # fmt: skip

    def draw(self, logits: Tensor, seats: Tensor, ends: Tensor, seat_words: Tensor, results: DrawResults) -> None:
        """One token for each row, without penalties, forbidden ends and log probabilities.

        Args:
            logits: `[N, vocab]`, float32 or bfloat16, rows of any stride.
            seats: int32 `[N]`, no seat twice but nobody's.
            ends: int32 `[N]`, the position that the drawn token gets; 0 in a row of nobody, which draws nothing.
            seat_words: int32 `[num_seats + 1, words]`, see `shared.engine.seats`; gets POSITION and TOKEN (0 where
                the row failed).
            results: row n gets what row n drew.
        """
        self._find_peaks(logits, ends)
        self._draw_and_settle(logits, seats, ends, seat_words, results, has_extras=False)

    def draw_with_extras(
        self, logits: Tensor, seats: Tensor, ends: Tensor, seat_words: Tensor, results: DrawResults
    ) -> None:
        """`draw` with penalties, forbidden ends and log probabilities, for the seats that have them."""
        num_rows, scratch = logits.shape[0], self._scratch
        scores = self._scores[:num_rows]
        num_splits = _num_splits(self.vocab_size, self.tuning.top_chunk)
        _penalise[(num_rows, num_splits)](
            logits, scores, self.seen, seats, ends, seat_words, scratch.top_peaks, scratch.top_masses, scratch.tops,
            self.vocab_size, logits.stride(0), scores.stride(0), seat_words.stride(0), num_splits,
            MAX_TOP=MAX_LOGPROBS, BLOCK=self.tuning.top_chunk, num_warps=self.tuning.warps,
        )  # fmt: skip
        _finish_scores[(num_rows,)](
            scores, seats, ends, seat_words, scratch.top_peaks, scratch.top_masses, scratch.tops,
            scratch.raw_peaks, scratch.log_sums, results.top_ids, results.top_logprobs,
            self.vocab_size, scores.stride(0), seat_words.stride(0), num_splits,
            MAX_TOP=MAX_LOGPROBS, SPLITS=triton.next_power_of_2(num_splits), num_warps=self.tuning.warps,
        )  # fmt: skip
        self._find_peaks(scores, ends)
        self._draw_and_settle(scores, seats, ends, seat_words, results, has_extras=True)

    def load_seen(self, seat: int, prompt_ids: Tensor, answer_ids: Tensor) -> None:
        """Begin `seen` of a seat anew from int32 or int64 ids on the device or in pinned memory."""
        row = self.seen[seat]
        row.zero_()
        prompt_ids = prompt_ids.to(self.device, torch.int64, non_blocking=True)
        answer_ids = answer_ids.to(self.device, torch.int64, non_blocking=True)
        row.index_fill_(0, prompt_ids, _IN_PROMPT.value)
        row.index_add_(0, answer_ids, torch.ones_like(answer_ids, dtype=torch.int32))

    def _find_peaks(self, scores: Tensor, ends: Tensor) -> None:
        num_rows, peaks = scores.shape[0], self._scratch.peaks
        chunk = self.tuning.chunk_for(num_rows)
        _find_peaks[(num_rows, _num_splits(self.vocab_size, chunk))](
            scores, ends, peaks, self.vocab_size, scores.stride(0), peaks.stride(0),
            CHUNK=chunk, BLOCK=min(self.tuning.block, chunk), num_warps=self.tuning.warps,
        )  # fmt: skip

    def _draw_and_settle(
        self,
        scores: Tensor,
        seats: Tensor,
        ends: Tensor,
        seat_words: Tensor,
        results: DrawResults,
        *,
        has_extras: bool,
    ) -> None:
        num_rows, tuning, scratch = scores.shape[0], self.tuning, self._scratch
        chunk = tuning.chunk_for(num_rows)
        num_splits = _num_splits(self.vocab_size, chunk)
        width = triton.next_power_of_2(num_splits)
        vocab_and_strides = (
            self.vocab_size,
            scores.stride(0),
            seat_words.stride(0),
            scratch.peaks.stride(0),
            num_splits,
        )
        rows = (scores, seats, ends, seat_words)
        state = (scratch.row_peaks, scratch.least, scratch.above, scratch.settled, scratch.choices)
        partials = (scratch.noisy, scratch.noisy_ids, scratch.kept_masses, scratch.higher_masses)
        _begin[(num_rows,)](
            *rows, scratch.peaks, scratch.raw_peaks, *state, *vocab_and_strides,
            HAS_EXTRAS=has_extras, SPLITS=width, BLOCK=tuning.row_block, num_warps=tuning.row_warps,
        )  # fmt: skip
        for number in range(tuning.rounds):
            _draw[(num_rows, num_splits)](
                *rows, *state, *partials, *vocab_and_strides,
                IS_FIRST=number == 0, SPLITS=width, CHUNK=chunk, BLOCK=min(tuning.block, chunk),
                num_warps=tuning.warps,
            )  # fmt: skip
            _check[(num_rows, num_splits)](
                *rows, *state, *partials, *vocab_and_strides,
                SPLITS=width, CHUNK=chunk, BLOCK=min(tuning.block, chunk), num_warps=tuning.warps,
            )  # fmt: skip
        _settle[(num_rows,)](
            *rows, *state, *partials, self.seen, scratch.log_sums,
            results.tokens, results.logprobs, *vocab_and_strides,
            HAS_EXTRAS=has_extras, SPLITS=width, BLOCK=tuning.row_block // 2, num_warps=tuning.row_warps,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What kernels hand to the next one; `[max_rows]`, or `[max_rows, splits]` for partial results.

    Attributes:
        peaks: int64, largest score of a split and its first token, packed.
        noisy, noisy_ids: float64 and int32, largest noisy score of a split and its token.
        kept_masses, higher_masses: float32, mass of a split that top-k keeps, and its part above the drawn token.
        top_peaks, top_masses, tops: int64, float32, int64 `[..., MAX_LOGPROBS]`: of the splits for log probabilities.
        raw_peaks: int64, largest score of a row before ends are forbidden; log_sums: float32, its log-sum-exp.
        row_peaks, least, above: float32; a draw is among the scores >= least and > above, relative to the peak.
        settled, choices: int32, whether the row has its token, and the token.
    """

    peaks: Tensor
    noisy: Tensor
    noisy_ids: Tensor
    kept_masses: Tensor
    higher_masses: Tensor
    top_peaks: Tensor
    top_masses: Tensor
    tops: Tensor
    raw_peaks: Tensor
    log_sums: Tensor
    row_peaks: Tensor
    least: Tensor
    above: Tensor
    settled: Tensor
    choices: Tensor

    @classmethod
    def allocate(cls, max_rows: int, num_splits: int, num_top_splits: int, device: torch.device) -> Self:
        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=dtype, device=device)

        return cls(
            peaks=empty(torch.int64, num_splits),
            noisy=empty(torch.float64, num_splits),
            noisy_ids=empty(torch.int32, num_splits),
            kept_masses=empty(torch.float32, num_splits),
            higher_masses=empty(torch.float32, num_splits),
            top_peaks=empty(torch.int64, num_top_splits),
            top_masses=empty(torch.float32, num_top_splits),
            tops=empty(torch.int64, num_top_splits, MAX_LOGPROBS),
            raw_peaks=empty(torch.int64),
            log_sums=empty(torch.float32),
            row_peaks=empty(torch.float32),
            least=empty(torch.float32),
            above=empty(torch.float32),
            settled=empty(torch.int32),
            choices=empty(torch.int32),
        )


def _num_splits(vocab_size: int, chunk: int) -> int:
    return (vocab_size + chunk - 1) // chunk


@triton.jit
def _ordered(scores):
    """Float32 as int32 of the same order; zeros are equal and a NaN is as large as infinity."""
    scores = tl.where(scores == scores, tl.where(scores == 0, 0.0, scores), float("inf"))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(scores, ids):
    """Int64 whose largest is the largest score with, among ties, the lowest id."""
    return (_ordered(scores).to(tl.int64) << 32) | (-ids + _LARGEST_ID).to(tl.int64)


@triton.jit
def _packed_score(packed):
    return _from_ordered((packed >> 32).to(tl.int32))


@triton.jit
def _packed_id(packed):
    return -(packed & 0xFFFFFFFF).to(tl.int32) + _LARGEST_ID


@triton.jit
def _float_word(words, place):
    return tl.load(words + place).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(state):
    """The output of SplitMix64 for a state that was already advanced."""
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)


@triton.jit
def _stream_key(words, end):
    """`torch_sampler.stream_key`, whose last word is the token's index; the ones before are mixed on the host."""
    low = tl.load(words + _KEY_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + _KEY_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    token_index = (end - tl.load(words + _PROMPT_LEN)).to(tl.uint64)
    return _mixed(((high << 32) | low) + token_index + _GOLDEN_GAMMA)


@triton.jit
def _gumbel_noise(key, ids):
    """`torch_sampler.gumbel_noise`."""
    bits = _mixed(key + (ids + 1).to(tl.uint64) * _GOLDEN_GAMMA) >> 12
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _best_noisy(scores, start, stop, key, peak, temperature, min_p, least, above, BLOCK: tl.constexpr):
    """Largest noisy score and its token among those of [start, stop) that are left; (-inf, 0) if none is."""
    inverse = 1.0 / temperature.to(tl.float64)
    lowest = tl.log(tl.maximum(min_p.to(tl.float64), 1e-300))  # so far below the peak no noise lifts a score above it
    wide_peak = peak.to(tl.float64)
    best = tl.full((), float("-inf"), tl.float64)
    best_id = tl.full((), 0, tl.int32)
    for first in range(start, stop, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        score = tl.load(scores + ids, mask=ids < stop, other=float("-inf")).to(tl.float32)
        scaled = (score.to(tl.float64) - wide_peak) * inverse
        is_left = (score > above) & (score >= least) & (scaled >= lowest)
        scaled = tl.where(is_left, scaled, float("-inf"))
        if tl.max(scaled, 0) + _LARGEST_NOISE > best:
            value, place = tl.max(scaled + _gumbel_noise(key, ids), 0, return_indices=True)
            if value > best:
                best = value
                best_id = first + place
    return best, best_id


@triton.jit
def _mass(scores, start, stop, peak, temperature, least, above, BLOCK: tl.constexpr):
    """Sum of exp((score - peak) / temperature) over the scores of [start, stop) that are >= least and > above."""
    inverse = tl.minimum(1.0 / temperature, 1e30)  # infinity times 0 would be NaN
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        score = tl.load(scores + ids, mask=ids < stop, other=float("-inf")).to(tl.float32)
        is_counted = (score > above) & (score >= least)
        sums += tl.where(is_counted, tl.exp((score - peak) * inverse), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _merged_sum(partials, num_splits, SPLITS: tl.constexpr):
    place = tl.arange(0, SPLITS)
    return tl.sum(tl.load(partials + place, mask=place < num_splits, other=0.0), 0)


@triton.jit
def _merged_draw(noisy, noisy_ids, num_splits, SPLITS: tl.constexpr):
    """The token with the largest noisy score of all splits."""
    place = tl.arange(0, SPLITS)
    values = tl.load(noisy + place, mask=place < num_splits, other=float("-inf"))
    best = tl.argmax(values, 0)
    return tl.load(noisy_ids + best)


@triton.jit
def _top_k_threshold(scores, k, peak, vocab_size, BLOCK: tl.constexpr):
    """A number that at least k scores reach, and no more than the k-th largest and its ties.

    A search over ordered integers in four parts a pass; those of bfloat16 scores have 16 bits.
    """
    bits: tl.constexpr = 16 if scores.dtype.element_ty == tl.bfloat16 else 0  # pyright: ignore[reportAssignmentType]
    lowest = (_ordered(tl.full((), float("-inf"), tl.float32)) >> bits).to(tl.int64)
    low = lowest
    high = (_ordered(peak) >> bits).to(tl.int64) + 1
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        pivot_1 = low + step
        pivot_2 = tl.minimum(pivot_1 + step, high)
        pivot_3 = tl.minimum(pivot_2 + step, high)
        counts_1 = tl.zeros((BLOCK,), tl.int32)
        counts_2 = tl.zeros((BLOCK,), tl.int32)
        counts_3 = tl.zeros((BLOCK,), tl.int32)
        low_1 = pivot_1.to(tl.int32)
        low_2 = pivot_2.to(tl.int32)
        low_3 = pivot_3.to(tl.int32)
        for first in range(0, vocab_size, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            score = tl.load(scores + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
            ordered = _ordered(score) >> bits
            counts_1 += (ordered >= low_1).to(tl.int32)
            counts_2 += (ordered >= low_2).to(tl.int32)
            counts_3 += (ordered >= low_3).to(tl.int32)
        count_1 = tl.sum(counts_1, 0)
        count_2 = tl.sum(counts_2, 0)
        count_3 = tl.sum(counts_3, 0)
        if count_3 >= k:
            low = pivot_3
            if count_3 == k:
                high = low
        elif count_2 >= k:
            low = pivot_2
            high = pivot_3
            if count_2 == k:
                high = low
        elif count_1 >= k:
            low = pivot_1
            high = pivot_2
            if count_1 == k:
                high = low
        else:
            high = pivot_1
    threshold = _from_ordered((low << bits).to(tl.int32))
    return tl.where(low == lowest, float("-inf"), threshold)


@triton.jit
def _record(token, end, words, row, tokens):
    tl.store(tokens + row, token)
    tl.store(words + _POSITION, end)
    tl.store(words + _TOKEN, tl.maximum(token, 0))


@triton.jit
def _find_peaks(scores, ends, peaks, vocab_size, row_stride, split_stride, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(ends + row) == 0:
        return
    scores += row.to(tl.int64) * row_stride
    stop = tl.minimum((split + 1) * CHUNK, vocab_size)
    best = tl.full((BLOCK,), _NO_KEY, tl.int64)
    for first in range(split * CHUNK, stop, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        score = tl.load(scores + ids, mask=ids < stop, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, _packed(score, ids))
    tl.store(peaks + row * split_stride + split, tl.max(best, 0))


@triton.jit
def _merged_peak(peaks, num_splits, SPLITS: tl.constexpr):
    place = tl.arange(0, SPLITS)
    return tl.max(tl.load(peaks + place, mask=place < num_splits, other=_NO_KEY), 0)


@triton.jit
def _checked(peak, raw_peak):
    """The peak's token, or why there is none; `raw_peak` is from before ends were forbidden."""
    raw = _packed_score(raw_peak)
    token = tl.where(_packed_score(peak) == float("-inf"), _NOTHING_LEFT_TOKEN, _packed_id(peak))
    return tl.where(tl.abs(raw) == float("inf"), _NOT_FINITE_TOKEN, token)


@triton.jit
def _take_peaks(
    seats, ends, seat_words, peaks, tokens, words_stride, split_stride, num_splits, SPLITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    end = tl.load(ends + row)
    if end == 0:
        return
    words = seat_words + tl.load(seats + row).to(tl.int64) * words_stride
    peak = _merged_peak(peaks + row * split_stride, num_splits, SPLITS)
    _record(_checked(peak, peak), end, words, row, tokens)


@triton.jit
def _begin(
    scores, seats, ends, seat_words, peaks, raw_peaks, row_peaks, least, above, settled, choices,
    vocab_size, row_stride, words_stride, split_stride, num_splits,
    HAS_EXTRAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the peaks, settles rows of nobody, of temperature 0 and without a token, and finds top-k's threshold."""
    row = tl.program_id(0)
    end = tl.load(ends + row)
    if end == 0:
        tl.store(settled + row, 1)
        return
    words = seat_words + tl.load(seats + row).to(tl.int64) * words_stride
    peak = _merged_peak(peaks + row * split_stride, num_splits, SPLITS)
    raw_peak = peak
    if HAS_EXTRAS:
        raw_peak = tl.load(raw_peaks + row)
    token = _checked(peak, raw_peak)
    is_settled = (token < 0) | (_float_word(words, _TEMPERATURE) == 0)
    tl.store(choices + row, token)
    tl.store(settled + row, is_settled.to(tl.int32))
    if is_settled:
        return
    score = _packed_score(peak)
    tl.store(row_peaks + row, score)
    tl.store(above + row, float("-inf"))
    k = tl.load(words + _TOP_K)
    threshold = tl.full((), float("-inf"), tl.float32)
    if (k > 0) & (k < vocab_size):
        threshold = _top_k_threshold(scores + row.to(tl.int64) * row_stride, k, score, vocab_size, BLOCK)
    tl.store(least + row, threshold)


@triton.jit
def _draw(
    scores, seats, ends, seat_words, row_peaks, least, above, settled, choices,
    noisy, noisy_ids, kept_masses, higher_masses,
    vocab_size, row_stride, words_stride, split_stride, num_splits,
    IS_FIRST: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Best noisy score of each split, for the rows whose last draw, if any, was rejected."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(settled + row) != 0:
        return
    words = seat_words + tl.load(seats + row).to(tl.int64) * words_stride
    top_p = _float_word(words, _TOP_P)
    partials = row * split_stride
    if not IS_FIRST:
        kept = _merged_sum(kept_masses + partials, num_splits, SPLITS)
        if _merged_sum(higher_masses + partials, num_splits, SPLITS) < top_p * kept:
            if split == 0:
                tl.store(settled + row, 1)
            return
    temperature = _float_word(words, _TEMPERATURE)
    peak = tl.load(row_peaks + row)
    floor = tl.load(least + row)
    start = split * CHUNK
    stop = tl.minimum(start + CHUNK, vocab_size)
    scores += row.to(tl.int64) * row_stride
    if IS_FIRST and top_p < 1:
        mass = _mass(scores, start, stop, peak, temperature, floor, float("-inf"), BLOCK)
        tl.store(kept_masses + partials + split, mass)
    best, token = _best_noisy(
        scores, start, stop, _stream_key(words, tl.load(ends + row)), peak, temperature, _float_word(words, _MIN_P),
        floor, tl.load(above + row), BLOCK,
    )  # fmt: skip
    tl.store(noisy + partials + split, best)
    tl.store(noisy_ids + partials + split, token)


@triton.jit
def _check(
    scores, seats, ends, seat_words, row_peaks, least, above, settled, choices,
    noisy, noisy_ids, kept_masses, higher_masses,
    vocab_size, row_stride, words_stride, split_stride, num_splits,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each split's mass above the drawn token; without top-p the draw stands."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(settled + row) != 0:
        return
    words = seat_words + tl.load(seats + row).to(tl.int64) * words_stride
    partials = row * split_stride
    scores += row.to(tl.int64) * row_stride
    token = _merged_draw(noisy + partials, noisy_ids + partials, num_splits, SPLITS)
    score = tl.load(scores + token).to(tl.float32)
    is_filtered = _float_word(words, _TOP_P) < 1
    if split == 0:
        tl.store(choices + row, token)
        tl.store(above + row, score)
        if not is_filtered:
            tl.store(settled + row, 1)
    if is_filtered:
        start = split * CHUNK
        mass = _mass(
            scores, start, tl.minimum(start + CHUNK, vocab_size), tl.load(row_peaks + row),
            _float_word(words, _TEMPERATURE), tl.load(least + row), score, BLOCK,
        )  # fmt: skip
        tl.store(higher_masses + partials + split, mass)


@triton.jit
def _settle(
    scores, seats, ends, seat_words, row_peaks, least, above, settled, choices,
    noisy, noisy_ids, kept_masses, higher_masses, seen, log_sums, tokens, logprobs,
    vocab_size, row_stride, words_stride, split_stride, num_splits,
    HAS_EXTRAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws on where the last draw was rejected, and records the token."""
    row = tl.program_id(0)
    end = tl.load(ends + row)
    if end == 0:
        return
    seat = tl.load(seats + row).to(tl.int64)
    words = seat_words + seat * words_stride
    scores += row.to(tl.int64) * row_stride
    token = tl.load(choices + row)
    if tl.load(settled + row) == 0:
        peak = tl.load(row_peaks + row)
        floor = tl.load(least + row)
        temperature = _float_word(words, _TEMPERATURE)
        limit = _float_word(words, _TOP_P) * _merged_sum(kept_masses + row * split_stride, num_splits, SPLITS)
        higher = _merged_sum(higher_masses + row * split_stride, num_splits, SPLITS)
        key = _stream_key(words, end)
        score = tl.load(above + row)
        while higher >= limit:
            _, token = _best_noisy(
                scores, 0, vocab_size, key, peak, temperature, _float_word(words, _MIN_P), floor, score, BLOCK
            )
            score = tl.load(scores + token).to(tl.float32)
            higher = _mass(scores, 0, vocab_size, peak, temperature, floor, score, BLOCK)
    _record(token, end, words, row, tokens)
    if HAS_EXTRAS and token >= 0:
        if tl.load(words + _NUM_LOGPROBS) >= 0:
            tl.store(logprobs + row, tl.load(scores + token).to(tl.float32) - tl.load(log_sums + row))
        if _has_penalty(words):
            counter = seen + seat * vocab_size + token
            tl.store(counter, tl.load(counter) + 1)


@triton.jit
def _has_penalty(words):
    additive = (_float_word(words, _PRESENCE) != 0) | (_float_word(words, _FREQUENCY) != 0)
    return additive | (_float_word(words, _REPETITION) != 1)


@triton.jit
def _penalise(
    logits, scores, seen, seats, ends, seat_words, top_peaks, top_masses, tops,
    vocab_size, logits_stride, scores_stride, words_stride, num_splits,
    MAX_TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Penalised scores, and of each block the peak, the sum of exp(score - peak) and the largest scores, packed."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(ends + row) == 0:
        return
    seat = tl.load(seats + row).to(tl.int64)
    words = seat_words + seat * words_stride
    ids = split * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    score = tl.load(logits + row.to(tl.int64) * logits_stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    if _has_penalty(words):
        word = tl.load(seen + seat * vocab_size + ids, mask=mask, other=0)
        repetition = _float_word(words, _REPETITION)
        penalised = tl.where(score > 0, score / repetition, score * repetition)
        score = tl.where(word != 0, penalised, score)
        answered = (word & (_IN_PROMPT - 1)).to(tl.float32)
        presence = tl.where(answered > 0, _float_word(words, _PRESENCE), 0.0)
        score -= presence + _float_word(words, _FREQUENCY) * answered
    tl.store(scores + row.to(tl.int64) * scores_stride + ids, score, mask=mask)
    packed = _packed(score, ids)
    top = tl.max(packed, 0)
    partial = row * num_splits + split
    tl.store(top_peaks + partial, top)
    num_top = tl.load(words + _NUM_LOGPROBS)
    if num_top >= 0:
        peak = tl.maximum(_packed_score(top), -3e38)  # where all are -inf, the differences stay numbers
        tl.store(top_masses + partial, tl.sum(tl.exp(score - peak), 0))
        for place in range(num_top):
            tl.store(tops + partial.to(tl.int64) * MAX_TOP + place, top)
            packed = tl.where(packed == top, _NO_KEY, packed)
            top = tl.max(packed, 0)


@triton.jit
def _finish_scores(
    scores, seats, ends, seat_words, top_peaks, top_masses, tops, raw_peaks, log_sums, top_ids, top_logprobs,
    vocab_size, row_stride, words_stride, num_splits,
    MAX_TOP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the blocks' parts of the log probabilities, then forbids the row's ends."""
    row = tl.program_id(0)
    end = tl.load(ends + row)
    if end == 0:
        return
    words = seat_words + tl.load(seats + row).to(tl.int64) * words_stride
    raw_peak = _merged_peak(top_peaks + row * num_splits, num_splits, SPLITS)
    tl.store(raw_peaks + row, raw_peak)
    num_top = tl.minimum(tl.load(words + _NUM_LOGPROBS), vocab_size)
    if num_top >= 0:
        split = tl.arange(0, SPLITS)
        peak = _packed_score(raw_peak)
        block_peaks = tl.load(top_peaks + row * num_splits + split, mask=split < num_splits, other=_NO_KEY)
        shares = tl.load(top_masses + row * num_splits + split, mask=split < num_splits, other=0.0)
        has_any = (split < num_splits) & (_packed_score(block_peaks) > float("-inf"))
        weights = tl.exp(tl.where(has_any, _packed_score(block_peaks), float("-inf")) - peak)
        log_sum = peak + tl.log(tl.sum(tl.where(has_any, shares * weights, 0.0), 0))
        tl.store(log_sums + row, log_sum)
        candidate = tl.arange(0, SPLITS * 32)
        place = (candidate // 32) * MAX_TOP + candidate % 32
        is_real = (candidate // 32 < num_splits) & (candidate % 32 < num_top)
        packed = tl.load(tops + row.to(tl.int64) * num_splits * MAX_TOP + place, mask=is_real, other=_NO_KEY)
        for number in range(num_top):
            top = tl.max(packed, 0)
            tl.store(top_ids + row * MAX_TOP + number, _packed_id(top))
            tl.store(top_logprobs + row * MAX_TOP + number, _packed_score(top) - log_sum)
            packed = tl.where(packed == top, _NO_KEY, packed)
    if end - tl.load(words + _PROMPT_LEN) < tl.load(words + _MIN_TOKENS):
        number = tl.arange(0, _MAX_ENDS)
        ids = tl.load(words + _FIRST_END + number, mask=number < tl.load(words + _NUM_ENDS), other=-1)
        is_token = (ids >= 0) & (ids < vocab_size)
        tl.store(scores + row.to(tl.int64) * row_stride + ids, float("-inf"), mask=is_token)
