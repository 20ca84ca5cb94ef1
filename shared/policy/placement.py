"""Where a choice runs: filter → score → pick, the decode worker first, then a prefill worker for it."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.holders import Holders
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import WorkerRef
from shared.wire.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator wants of placements.

    Attributes:
        ttft_goal_s: time to the first token within which a request counts as served well.
        tpot_goal_s: mean time of each later token, likewise.
        num_decode_candidates: the best so many decode workers are tried with all prefill workers.
        local_prefill: a decode worker may compute a prompt itself.
        fetch: a worker may get a prompt's beginning from another that holds it.
    """

    ttft_goal_s: float
    tpot_goal_s: float
    num_decode_candidates: int = 4
    local_prefill: bool = True
    fetch: bool = True


@dataclass(frozen=True, slots=True)
class Fetch:
    """Whoever computes the prompt gets those of its first `num_pages` pages that it lacks from `source`."""

    source: WorkerRef
    num_pages: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """A decision, with the credits it takes.

    Attributes:
        prefill: computes the prompt; the same as `decode` if that does it itself.
        num_prefill_pages: credit on `prefill`; 0 if that is `decode`.
        prefill_s: predicted work on `prefill`.
    """

    prefill: WorkerRef
    decode: WorkerRef
    num_prefill_pages: int
    num_decode_pages: int
    prefill_s: float
    fetch: Fetch | None
    explanation: Explanation


@dataclass(frozen=True, slots=True)
class NoRoomNow:
    """It would fit, but not beside what is placed already (or no worker of a role is there): try again."""


@dataclass(frozen=True, slots=True)
class NeverFits:
    """No worker there is could run it even alone.

    Attributes:
        limit_tokens: prompt and answer together that the roomiest workers could take.
    """

    limit_tokens: int


Decision = Chosen | NoRoomNow | NeverFits


def place(request: RequestView, cluster: ClusterView, holders: Holders, rules: Rules, *, tie_break: int) -> Decision:
    """Choose workers for `request`; equal scores are settled by `tie_break`, any integer."""
    num_prefill_pages = pages_for(request.num_tokens)
    num_decode_pages = pages_for(request.num_tokens + request.reserve_new_tokens)
    limit_tokens = capacity_tokens(request.model, cluster)
    if limit_tokens is not None and request.num_tokens + request.max_new_tokens > limit_tokens:
        return NeverFits(limit_tokens)

    def uncached_pages(worker: WorkerView) -> int:
        return num_prefill_pages - holders.overlap(worker.ref.incarnation, request.blocks)[0]

    decoders = _with_room(cluster.decode, request.model, num_decode_pages)
    for decode in _best_first(decoders, lambda worker: _decode_score(worker, uncached_pages(worker)), tie_break):
        fitting = [
            worker
            for worker in _with_room(cluster.prefill, request.model, num_prefill_pages)
            if worker.layout_fingerprint == decode.layout_fingerprint
        ]
        for prefill in _best_first(fitting, lambda worker: worker.num_credit_pages + uncached_pages(worker), tie_break):
            return Chosen(
                prefill.ref, decode.ref, num_prefill_pages, num_decode_pages, 0.0, None, Explanation("", 0, ())
            )
    return NoRoomNow()


def capacity_tokens(model: str, cluster: ClusterView) -> int | None:
    """Prompt and answer together that the roomiest workers of the model can take; None while a role has no worker."""
    capacities = [
        max((min(w.max_context, w.num_pages * PAGE_TOKENS) for w in pool if w.model == model), default=None)
        for pool in (cluster.prefill, cluster.decode)
    ]
    known = [capacity for capacity in capacities if capacity is not None]
    return min(known) if len(known) == len(capacities) else None


def _with_room(pool: tuple[WorkerView, ...], model: str, num_pages: int) -> list[WorkerView]:
    return [
        worker
        for worker in pool
        if worker.model == model
        and worker.takes_work
        and worker.num_credits < worker.max_running
        and worker.num_credit_pages + num_pages <= worker.num_pages
    ]


def _decode_score(worker: WorkerView, uncached_pages: int) -> float:
    """Load first, in requests (a step's time grows with the batch); what must be moved settles near ties."""
    return worker.num_credits + (worker.num_credit_pages + uncached_pages) / worker.num_pages


def _best_first(workers: list[WorkerView], score: Callable[[WorkerView], float], tie_break: int) -> list[WorkerView]:
    count = max(len(workers), 1)
    return sorted(workers, key=lambda worker: (score(worker), (worker.ref.slot + tie_break) % count, worker.ref.slot))
