"""Where a choice runs: filter (who has room) → score (`scoring`) → pick (the least cost), and what that takes."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.holders import Holders
from shared.policy.scoring import Rules, Scoring
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import RequestId, WorkerRef
from shared.wire.explanation import Explanation


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
        explain: why; worked out when it is called.
    """

    prefill: WorkerRef
    decode: WorkerRef
    num_prefill_pages: int
    num_decode_pages: int
    prefill_s: float
    fetch: Fetch | None
    explain: Callable[[], Explanation] = field(compare=False, repr=False)


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
    """Choose workers for `request`; equal costs are settled by `tie_break`, any integer."""
    num_prefill_pages = pages_for(request.num_tokens)
    num_decode_pages = pages_for(request.num_tokens + request.reserve_new_tokens)
    most_tokens = request.num_tokens + request.max_new_tokens
    prefill = _with_room(cluster.prefill, request.model, num_prefill_pages, most_tokens)
    decode = _with_room(cluster.decode, request.model, num_decode_pages, most_tokens)
    if not (prefill and decode):
        limit_tokens = capacity_tokens(request.model, cluster)
        if limit_tokens is not None and most_tokens > limit_tokens:
            return NeverFits(limit_tokens)
    if not decode:
        return NoRoomNow()
    scoring = Scoring(request, cluster, holders, rules, tie_break)
    ranked = scoring.rank(prefill, decode)
    if not ranked:
        return NoRoomNow()
    way, seat = ranked[0].way, ranked[0].seat
    source = way.beginning.source
    return Chosen(
        way.worker.ref,
        seat.worker.ref,
        0 if ranked[0].is_local else num_prefill_pages,
        num_decode_pages,
        way.compute_s,
        None if source is None else Fetch(source.ref, way.beginning.num_found),
        partial(scoring.explain, ranked),
    )


def local_threshold_tokens(prefill: WorkerView, decode: WorkerView, rules: Rules, *, expected_new_tokens: float) -> int:
    """Below how many uncached prompt tokens `decode` had better compute a prompt itself than leave it to `prefill`.

    By the loads and speeds of these two as they are; at most what `decode` can hold. No room is asked for. They are of
    one model and one layout.
    """

    def is_local(num_tokens: int) -> bool:
        num_new = round(expected_new_tokens)
        request = RequestView(
            request_id=RequestId(""),
            choice=0,
            model=decode.model,
            num_tokens=num_tokens,
            max_new_tokens=num_new,
            expected_new_tokens=expected_new_tokens,
            usual_new_tokens=expected_new_tokens,
            reserve_new_tokens=num_new,
            blocks=(),
        )
        scoring = Scoring(request, ClusterView((prefill,), (decode,)), Holders(), rules, 0)
        return scoring.rank([prefill], [decode])[0].is_local

    limit = _capacity_tokens(decode)
    above = 1
    while is_local(above):
        if above == limit:
            return limit
        above = min(2 * above, limit)
    return bisect_left(range(above), True, lo=above // 2, key=lambda num_tokens: not is_local(num_tokens))


def capacity_tokens(model: str, cluster: ClusterView) -> int | None:
    """Prompt and answer together that the roomiest workers of the model can take; None while a role has no worker."""
    capacities = [
        max((_capacity_tokens(worker) for worker in pool if worker.model == model), default=None)
        for pool in (cluster.prefill, cluster.decode)
    ]
    known = [capacity for capacity in capacities if capacity is not None]
    return min(known) if len(known) == len(capacities) else None


def _capacity_tokens(worker: WorkerView) -> int:
    return min(worker.max_context, worker.num_pages * PAGE_TOKENS)


def _with_room(pool: Iterable[WorkerView], model: str, num_pages: int, most_tokens: int) -> list[WorkerView]:
    """Those that have so many pages left, and could run a request of so many tokens to its end. By slot."""
    roomy = [
        worker
        for worker in pool
        if worker.model == model
        and worker.takes_work
        and worker.num_credits < worker.max_running
        and worker.num_credit_pages + num_pages <= worker.num_pages
        and worker.max_context >= most_tokens <= worker.num_pages * PAGE_TOKENS
    ]
    roomy.sort(key=_slot)
    return roomy


def _slot(worker: WorkerView) -> int:
    return worker.ref.slot
