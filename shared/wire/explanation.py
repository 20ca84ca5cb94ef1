"""Why a choice was placed where it was: small enough to stand in its `open` and in a log line."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shared.request import Count, Finite, Slot

MAX_CANDIDATES = 5

NUM_DIGITS = 3
"""Of the times that are written: nobody predicts them better."""


class Candidate(NamedTuple):
    """One pair of workers that was considered, as predicted then. On the wire its names are left out: every edge reads
    five of these for each request.

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
        candidates: the best of them, best first; the first was chosen.
    """

    reason: str
    num_considered: Count
    candidates: tuple[Candidate, ...] = ()

    def brief(self) -> "Explanation":
        """As it is written: the best candidates only, times with NUM_DIGITS digits."""
        return replace(self, candidates=tuple(_rounded(each) for each in self.candidates[:MAX_CANDIDATES]))

    def members(self) -> dict[str, Any]:
        """For people: in a log line, in an answer."""
        return {
            "reason": self.reason,
            "num_considered": self.num_considered,
            "candidates": [each._asdict() for each in self.candidates],
        }


def _rounded(candidate: Candidate) -> Candidate:
    return candidate._replace(
        ttft_s=_significant(candidate.ttft_s),
        tpot_s=_significant(candidate.tpot_s),
        cost_s=_significant(candidate.cost_s),
        queue_s=_significant(candidate.queue_s),
        transfer_s=_significant(candidate.transfer_s),
    )


def _significant(value: float) -> float:
    return float(f"{value:.{NUM_DIGITS}g}")
