"""Why a choice was placed where it was: small enough to stand in its `open` and in a log line."""

from dataclasses import dataclass

from shared.request import Count, Finite, Slot

MAX_CANDIDATES = 5


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair of workers that was considered, as predicted then.

    Attributes:
        prefill, decode: slots.
        ttft_s: until the first token.
        tpot_s: each later one.
        cost_s: what the decision made smallest.
        cached_pages: of the prompt, on the prefill worker already.
        fetched_pages: of the prompt, brought there from another worker.
        queue_s: part of `ttft_s`: until its prefill begins.
        transfer_s: of its KV to the decode worker, as far as it is waited for.
        is_local: the decode worker computes the prompt itself.
    """

    prefill: Slot
    decode: Slot
    ttft_s: Finite
    tpot_s: Finite
    cost_s: Finite
    cached_pages: Count
    fetched_pages: Count
    queue_s: Finite
    transfer_s: Finite
    is_local: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision's reasons.

    Attributes:
        reason: in words.
        num_considered: pairs of workers.
        candidates: the best of them, best first; the first was chosen. At most MAX_CANDIDATES.
    """

    reason: str
    num_considered: Count
    candidates: tuple[Candidate, ...]
