"""Seats: what the device knows of each running sequence, one record of 32-bit words a seat.

    record:  position, token, prompt length, sampling, random key | ids that may end the answer | page numbers

A decode step reads position and token from its seats and leaves the next ones there, so the host writes only what it
alone knows: who sits down, which page is new, where a sequence goes on that the device has not brought there.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportArgumentType=false
# ruff: noqa: ANN001, ANN202
# triton is untyped, and so are the arguments of kernels.

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.engine.batch import MAX_ENDS, BatchRow, forbidden_ends
from shared.engine.host_copies import Uploads
from shared.engine.sampling.torch_sampler import choice_key


class Word(IntEnum):
    """Places of the words in a seat's record; temperature, min-p, top-p and penalties are float32 bits.

    Attributes:
        POSITION: of the next token to compute; -1 in a seat that nobody holds.
        TOKEN: the id at that position.
        TOP_K: 0 keeps all.
        KEY_LOW, KEY_HIGH: halves of the 64-bit random stream after seed and choice; the token index comes last.
        NUM_LOGPROBS: likeliest tokens to report beside the drawn one; -1 where no log probability is wanted.
        NUM_ENDS: ids from FIRST_END on that may not be drawn as one of the first MIN_TOKENS tokens of the answer.
    """

    POSITION = 0
    TOKEN = 1
    PROMPT_LEN = 2
    MIN_TOKENS = 3
    TEMPERATURE = 4
    TOP_K = 5
    TOP_P = 6
    MIN_P = 7
    REPETITION_PENALTY = 8
    PRESENCE_PENALTY = 9
    FREQUENCY_PENALTY = 10
    KEY_LOW = 11
    KEY_HIGH = 12
    NUM_LOGPROBS = 13
    NUM_ENDS = 14


FIRST_END = 16
FIRST_PAGE = FIRST_END + MAX_ENDS

CHANGES_A_PROGRAM = 1024

SMALLEST_TOP_P = float(np.finfo(np.float32).tiny)
"""Of a top-p that float32 takes for 0 no token would be kept, not even the likeliest."""


@dataclass(slots=True)
class _Occupant:
    """What the device knows of a seat once all that was launched is done.

    Attributes:
        sequence: number of the sequence; -1 nobody's yet.
        position: of the next token to compute, which the seat has too.
    """

    sequence: int = -1
    pages: tuple[int, ...] = ()
    position: int = -1


class Seats:
    """The seats of one runner.

    Attributes:
        words: int32 `[num_seats + 1, FIRST_PAGE + max_pages]` on the device; the last seat is nobody's for ever.
        nobody: number of that seat, to which padding rows point.
    """

    def __init__(
        self, num_seats: int, max_pages: int, eos_token_ids: tuple[int, ...], vocab_size: int, device: torch.device
    ) -> None:
        self.words = torch.zeros((num_seats + 1, FIRST_PAGE + max_pages), dtype=torch.int32, device=device)
        self.words[:, Word.POSITION] = -1
        self.nobody = num_seats
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._occupants = [_Occupant() for _ in range(num_seats)]
        self._uploads = Uploads(2 * num_seats * self.words.shape[1], device)

    @property
    def page_table(self) -> Tensor:
        """Page numbers, int32 `[num_seats + 1, max_pages]`, rows at the distance of records."""
        return self.words[:, FIRST_PAGE:]

    @property
    def num_uploads(self) -> int:
        """How often the device had to be told something."""
        return self._uploads.num_sent

    def warm_up(self) -> None:
        """Tell the device something that it knows, so that all it takes to do so is there."""
        self._write([self.nobody * self.words.shape[1] + Word.POSITION], [-1])

    def prepare(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Tell the device what it lacks for `rows`, which are launched next; returns the rows of those who sat down."""
        places: list[int] = []
        words: list[int] = []
        entered: list[BatchRow] = []
        width = self.words.shape[1]
        for row in rows:
            occupant = self._occupants[row.seat]
            start = row.start
            record = row.seat * width
            if occupant.sequence != row.sequence:
                head = self._head_of(row)
                places += range(record, record + len(head))
                words += head
                places += range(record + FIRST_PAGE, record + FIRST_PAGE + len(row.pages))
                words += row.pages
                occupant.sequence, occupant.pages, occupant.position = row.sequence, row.pages, start
                entered.append(row)
            else:
                if occupant.pages is not row.pages:
                    same = _common_length(occupant.pages, row.pages)
                    places += range(record + FIRST_PAGE + same, record + FIRST_PAGE + len(row.pages))
                    words += row.pages[same:]
                    occupant.pages = row.pages
                if is_decode(row) and occupant.position != start:
                    places += (record + Word.POSITION, record + Word.TOKEN)
                    words += (start, row.ids[start])
            if row.sample:
                occupant.position = row.end
        if places:
            self._write(places, words)
        return entered

    def _head_of(self, row: BatchRow) -> list[int]:
        """The words of a record before its pages, as many as are used."""
        sampling = row.sampling
        key = choice_key(sampling.seed, row.choice)
        ends = forbidden_ends(sampling, self._eos_token_ids, self._vocab_size) if sampling.min_tokens else []
        words = [0] * FIRST_END
        words[Word.POSITION] = row.start
        words[Word.TOKEN] = row.ids[row.start]
        words[Word.PROMPT_LEN] = row.prompt_len
        words[Word.MIN_TOKENS] = sampling.min_tokens
        words[Word.TEMPERATURE] = _float_bits(sampling.temperature)
        words[Word.TOP_K] = sampling.top_k
        words[Word.TOP_P] = _float_bits(max(sampling.top_p, SMALLEST_TOP_P))
        words[Word.MIN_P] = _float_bits(sampling.min_p)
        words[Word.REPETITION_PENALTY] = _float_bits(sampling.repetition_penalty)
        words[Word.PRESENCE_PENALTY] = _float_bits(sampling.presence_penalty)
        words[Word.FREQUENCY_PENALTY] = _float_bits(sampling.frequency_penalty)
        words[Word.KEY_LOW] = key & 0xFFFFFFFF
        words[Word.KEY_HIGH] = key >> 32
        words[Word.NUM_LOGPROBS] = -1 if sampling.logprobs is None else sampling.logprobs
        words[Word.NUM_ENDS] = len(ends)
        return words + ends

    def _write(self, places: list[int], words: list[int]) -> None:
        """Put each of `words`, cut to 32 bits, at its place in the flat records; no place is named twice."""
        self._uploads.send(np.array((places, words), dtype=np.int64).astype(np.int32).ravel())
        grid = (triton.cdiv(len(places), CHANGES_A_PROGRAM),)
        _scatter_kernel[grid](self.words, self._uploads.words, len(places), block=CHANGES_A_PROGRAM)


def is_decode(row: BatchRow) -> bool:
    """Whether the row takes its token and position from its seat; all others are chunks, whose tokens are sent."""
    return row.sample and row.end - row.start == 1


def _common_length(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """How many pages at the beginning are the same ones."""
    if new[: len(old)] == old:
        return len(old)
    return next((index for index, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))


def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@triton.jit(do_not_specialize=["num_changes"])
def _scatter_kernel(words, changes, num_changes, block: tl.constexpr):
    """`changes` are the places of `num_changes` words, then the words."""
    change = tl.program_id(0) * block + tl.arange(0, block)
    mask = change < num_changes
    place = tl.load(changes + change, mask=mask)
    word = tl.load(changes + num_changes + change, mask=mask)
    tl.store(words + place, word, mask=mask)
