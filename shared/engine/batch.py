"""What one step computes: the only thing that scheduler and runner share."""

from dataclasses import dataclass
from typing import Protocol

from shared.blocks import TokenIds
from shared.kv.paged_cache import PagedCache
from shared.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A run of positions of one sequence: a prefill chunk or (one position) a decode row.

    Attributes:
        key: of the request, for error messages.
        ids: all token ids known of the sequence (prompt and answer); the row computes ids[start:end]. The array is
            the sequence's own and grows after the step: a runner keeps neither it nor a buffer view of it.
        start, end: positions computed now; KV of [0, start) is in the pages.
        pages: page numbers of positions [0, end), in order; position p lies in pages[p // PAGE_TOKENS].
        prompt_len: ids[prompt_len:] are the answer so far (penalties, token index).
        sample: whether the token after position end - 1 is wanted (false for all but the last chunk of a prompt).
        choice: keys the generator with sampling.seed and the token's index `end - prompt_len`.
        forbid_end: EOS and stop ids must not be picked (min_tokens is not reached).
    """

    key: str
    ids: TokenIds
    start: int
    end: int
    pages: tuple[int, ...]
    prompt_len: int
    sample: bool
    sampling: SamplingParams
    choice: int
    forbid_end: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token after a row.

    Attributes:
        token_id: -1 if the logits held a NaN or nothing was left to pick from; `error` says which.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


class Runner(Protocol):
    """A model over paged KV; one thread owns it."""

    @property
    def cache(self) -> PagedCache: ...

    def run(self, rows: tuple[BatchRow, ...]) -> list[Sampled | None]:
        """Compute the rows, write their KV, and sample where wanted: one entry a row, None where not wanted.

        All is done on return, on the device too: a page that is freed next may be written by a transfer at once.
        """
        ...
