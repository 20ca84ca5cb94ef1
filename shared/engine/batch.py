"""What one step computes: the only thing that scheduler and runner share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.blocks import TokenIds
from shared.engine.layer_marks import LayerMarks
from shared.kv.paged_cache import PagedCache
from shared.policy.profile import StepWork, num_pairs
from shared.request import SamplingParams, TokenLogprob

MAX_ENDS = 80
"""EOS and stop ids that may be forbidden to a row, at most; the engine refuses requests with more."""

MAX_LOGPROBS = 20
"""Rivals whose log probabilities a row may want, at most."""


@dataclass(slots=True)
class BatchRow:
    """A run of positions of one sequence: a prefill chunk or (one position) a decode row.

    Nobody changes a row; it is not frozen because one is made for every token, and frozen ones take thrice as long.

    Attributes:
        key: of the request, for error messages.
        sequence: number of the sequence, never used again; a preempted one gets another with its next seat, so that a
            runner takes it for new there.
        seat: where a runner may keep what it knows of the sequence, 0 to max_running - 1. The sequence has it from its
            first row until it ends, is held or is preempted; nobody else gets it while a batch in flight has its rows.
        ids: the token ids that the host knows of the sequence (prompt and answer). The array is the sequence's own and
            grows after the step: a runner keeps neither it nor a buffer view of it.
        start, end: positions computed now; KV of [0, start) is in the pages, or written by batches launched before.
            `end` may be `len(ids) + 1`: the last id is then the token that the batch launched before draws for the
            seat, and `start` is `end - 1`.
        pages: page numbers of all the sequence's pages, in order; position p lies in pages[p // PAGE_TOKENS]. The same
            tuple until the sequence gets another page.
        prompt_len: ids[prompt_len:] are the answer so far (penalties, token index).
        sample: whether the token after position end - 1 is wanted (false for all but the last chunk of a prompt).
        choice: keys the generator with sampling.seed and the token's index `end - prompt_len`.
        forbid_end: EOS and stop ids must not be picked (min_tokens is not reached).
    """

    key: str
    sequence: int
    seat: int
    ids: TokenIds
    start: int
    end: int
    pages: tuple[int, ...]
    prompt_len: int
    sample: bool
    sampling: SamplingParams
    choice: int
    forbid_end: bool


def work_of(rows: Sequence[BatchRow], num_decode: int) -> StepWork:
    """What a batch computes of which the first `num_decode` rows are decode rows and the others chunks."""
    num_prompt_tokens = pairs = 0
    for chunk in rows[num_decode:]:
        num_new = chunk.end - chunk.start
        num_prompt_tokens += num_new
        pairs += num_pairs(num_new, chunk.start)
    return StepWork(num_decode, sum([row.end for row in rows[:num_decode]]), num_prompt_tokens, pairs)


def forbidden_ends(sampling: SamplingParams, eos_token_ids: frozenset[int], vocab_size: int) -> list[int]:
    """The ids of the vocabulary that a row may not draw where `forbid_end` holds, ascending."""
    return sorted(token for token in sampling.ends(eos_token_ids) if 0 <= token < vocab_size)


@dataclass(slots=True)
class Sampled:
    """The token after a row. (Not frozen, as BatchRow.)

    Attributes:
        token_id: -1 if the logits held a NaN or nothing was left to pick from; `error` says which.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


class Launched(Protocol):
    """A batch in flight."""

    def wait(self) -> list[Sampled | None]:
        """What was drawn: one entry a row, None where nothing was wanted. Called once, in the order of launching.

        All of the batch is done on return, on the device too: a page that is freed next may be written by a transfer
        at once.
        """
        ...


class Runner(Protocol):
    """A model over paged KV; one thread owns it."""

    @property
    def cache(self) -> PagedCache: ...

    @property
    def num_ahead(self) -> int:
        """How many batches may be launched before the tokens of the one before them are known: 0 or 1."""
        ...

    def launch(self, rows: tuple[BatchRow, ...], layers: LayerMarks | None = None) -> Launched:
        """Begin to compute the rows, write their KV, and sample where wanted, behind all that was launched before.

        Args:
            layers: where to record how far the batch is, by a runner that can; None: nobody asks.
        """
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that was computed within `launch`."""

    results: list[Sampled | None]

    def wait(self) -> list[Sampled | None]:
        return self.results
