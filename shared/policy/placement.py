"""Where a choice runs: filter → score → pick, the decode worker first, then a prefill worker for it."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.holders import Holders
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import WorkerRef

EXPECTED_OUTPUT_TOKENS = 256
"""Credits are taken for this many new tokens at most: few answers use their whole max_tokens, and a worker that runs
out of pages preempts. Prediction takes this constant's place."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A decision, with the credits it takes."""

    prefill: WorkerRef
    decode: WorkerRef
    num_prefill_pages: int
    num_decode_pages: int


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


def place(request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision:
    """Choose workers for `request`; equal scores are settled by `tie_break`, any integer."""
    num_prefill_pages = pages_for(request.num_tokens)
    num_decode_pages = pages_for(request.num_tokens + min(request.max_new_tokens, EXPECTED_OUTPUT_TOKENS))
    limit_tokens = capacity_tokens(request.model, cluster)
    if limit_tokens is not None and request.num_tokens + request.max_new_tokens > limit_tokens:
        return NeverFits(limit_tokens)

    def uncached_pages(worker: WorkerView) -> int:
        return num_prefill_pages - holders.overlap(worker.ref.incarnation, request.blocks)

    decoders = _with_room(cluster.decode, request.model, num_decode_pages)
    for decode in _best_first(decoders, lambda worker: _decode_score(worker, uncached_pages(worker)), tie_break):
        fitting = [
            worker
            for worker in _with_room(cluster.prefill, request.model, num_prefill_pages)
            if worker.layout_fingerprint == decode.layout_fingerprint
        ]
        for prefill in _best_first(fitting, lambda worker: worker.num_credit_pages + uncached_pages(worker), tie_break):
            return Chosen(prefill.ref, decode.ref, num_prefill_pages, num_decode_pages)
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
