"""Where a choice runs: filter (who has room) → score (what each way is predicted to cost) → pick (the least).

All decode workers are scored alone; the best few are tried with all prefill workers, and every one as its own. What a
way costs is `costs`' matter. Each thing that depends on one worker is computed once for it, so that a pair costs a
few additions: 64 workers are decided on in a fraction of a millisecond (`python -m benchmarks.placement`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import NamedTuple

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy import costs
from shared.policy.holders import Holders
from shared.policy.profile import SpeedProfile
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import Incarnation, WorkerRef
from shared.wire.explanation import MAX_CANDIDATES, Candidate, Explanation

NUM_SOURCES = 3
"""Of the workers that hold most of a prompt, so many are tried as sources of a fetch."""

Matches = Mapping[Incarnation, tuple[int, int]]
NOTHING_HELD = (0, 0)


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
    """Choose workers for `request`; equal costs are settled by `tie_break`, any integer."""
    limit_tokens = capacity_tokens(request.model, cluster)
    if limit_tokens is not None and request.num_tokens + request.max_new_tokens > limit_tokens:
        return NeverFits(limit_tokens)
    num_prefill_pages = pages_for(request.num_tokens)
    num_decode_pages = pages_for(request.num_tokens + request.reserve_new_tokens)
    most_tokens = request.num_tokens + request.max_new_tokens
    prefill = _with_room(cluster.prefill, request.model, num_prefill_pages, most_tokens)
    decode = _with_room(cluster.decode, request.model, num_decode_pages, most_tokens)
    # The last token of a prompt is always computed.
    matches = holders.matches(request.blocks[: max(request.num_tokens - 1, 0) // PAGE_TOKENS])
    scoring = _Scoring(request, cluster, rules, matches)
    ranked = scoring.rank(prefill, decode, tie_break)
    if not ranked:
        return NoRoomNow()
    way, seat = ranked[0].way, ranked[0].seat
    return Chosen(
        way.worker.ref,
        seat.worker.ref,
        0 if way.worker is seat.worker else num_prefill_pages,
        num_decode_pages,
        way.compute_s,
        None if way.source is None else Fetch(way.source.ref, way.num_cached + way.num_fetched),
        scoring.explain(ranked),
    )


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
        and _capacity_tokens(worker) >= most_tokens
    ]
    roomy.sort(key=_slot)
    return roomy


def _slot(worker: WorkerView) -> int:
    return worker.ref.slot


class _Way(NamedTuple):
    """How one worker would compute the prompt.

    Attributes:
        compute_s: its work.
        before_last_s: part of it before the last chunk.
        ttft_s: from now until the first token.
        num_cached: pages of the prompt that it has.
        num_fetched: pages that it gets from `source`.
    """

    worker: WorkerView
    queue_s: float
    fetch_s: float
    compute_s: float
    before_last_s: float
    ttft_s: float
    num_cached: int
    num_fetched: int
    source: WorkerView | None


class _Seat(NamedTuple):
    """What it means for one decode worker to run the request, whoever computes the prompt.

    Attributes:
        joined_s: of each token of a row there, with this request's row and with what stalls them already.
        tpot_s: of each token of this request.
        own_loss: of that time.
        rows_loss: that its row adds to the others'.
        num_held: pages of the prompt that the worker has.
    """

    worker: WorkerView
    profile: SpeedProfile
    joined_s: float
    tpot_s: float
    own_loss: float
    rows_loss: float
    num_held: int


class _Ranked(NamedTuple):
    """A way and a seat, with the loss that they mean together; equal ones by `tie`."""

    loss: float
    tie: int
    way: _Way
    seat: _Seat


class _Scoring:
    """One decision's constants, and what follows from them for a worker and for a pair."""

    def __init__(self, request: RequestView, cluster: ClusterView, rules: Rules, matches: Matches) -> None:
        self._rules = rules
        self._matches = matches
        self._num_tokens = request.num_tokens
        self._num_pages = pages_for(request.num_tokens)
        self._num_later = max(request.expected_new_tokens, 1.0)
        self._num_context = request.num_tokens + round(request.expected_new_tokens / 2)
        prefill = [worker for worker in cluster.prefill if worker.model == request.model]
        decode = [worker for worker in cluster.decode if worker.model == request.model]
        self._price = costs.price_of_work(prefill, rules.ttft_goal_s)
        self._sources = self._find_sources(prefill + decode) if rules.fetch and matches else []
        self._assumed = _assumed_profiles(prefill) | _assumed_profiles(decode)
        self._num_ways = 0

    def rank(self, prefill: Sequence[WorkerView], decode: Sequence[WorkerView], tie_break: int) -> list[_Ranked]:
        """The best ways, best first."""
        num_decode, num_prefill = max(len(decode), 1), max(len(prefill), 1)
        ranked: list[_Ranked] = []
        seats: list[tuple[float, int, _Seat]] = []
        for index, worker in enumerate(decode):
            seat = self._seat(worker)
            tie = (index + tie_break) % num_decode
            seats.append((seat.own_loss + seat.rows_loss, tie, seat))
            if self._rules.local_prefill:
                way = self._local_way(seat)
                ranked.append(_Ranked(self._local_loss(way, seat), tie, way, seat))
        ways = [self._remote_way(worker) for worker in prefill] if seats else []
        for _, tie, seat in self._best_seats(seats):
            layout = seat.worker.layout_fingerprint
            first_tie = num_decode + tie * num_prefill
            for index, way in enumerate(ways):
                if way.worker.layout_fingerprint == layout:
                    pair_tie = first_tie + (index + tie_break) % num_prefill
                    ranked.append(_Ranked(self._remote_loss(way, seat), pair_tie, way, seat))
        self._num_ways = len(ranked)
        return nsmallest(MAX_CANDIDATES, ranked)

    def _best_seats(self, seats: list[tuple[float, int, _Seat]]) -> list[tuple[float, int, _Seat]]:
        """Those that cost least by themselves; and the one that holds most of the prompt, to which least is moved."""
        seats.sort(key=_loss_and_tie)
        best = seats[: self._rules.num_decode_candidates]
        nearest = max(seats, key=_num_held, default=None)
        if nearest is not None and nearest[2].num_held and nearest not in best:
            best[-1] = nearest
        return best

    def _seat(self, worker: WorkerView) -> _Seat:
        profile = worker.profile or self._assumed[worker.ref.slot]
        goal_s, num_rows = self._rules.tpot_goal_s, worker.num_credits
        stalled_s = worker.queued_prefill_s / self._num_later
        now_s = profile.decode_step_s(num_rows, worker.num_context_tokens) + stalled_s
        joined_s = now_s + profile.decode_step_s(1, self._num_context) - profile.base_s
        return _Seat(
            worker=worker,
            profile=profile,
            joined_s=joined_s,
            tpot_s=joined_s,
            own_loss=costs.loss(joined_s / goal_s),
            rows_loss=costs.added_loss(num_rows, now_s, joined_s - now_s, goal_s),
            num_held=self._matches.get(worker.ref.incarnation, NOTHING_HELD)[1],
        )

    def _remote_way(self, worker: WorkerView) -> _Way:
        profile = worker.profile or self._assumed[worker.ref.slot]
        num_cached, num_found, found_s, source = self._find_beginning(worker, profile)
        num_before, chunk = num_found * PAGE_TOKENS, worker.max_batch_tokens
        num_new = self._num_tokens - num_before
        compute_s = costs.prefill_s(profile, num_new, num_before, chunk)
        queue_s = worker.queued_prefill_s
        fetch_s = max(0.0, found_s - queue_s)
        return _Way(
            worker=worker,
            queue_s=queue_s,
            fetch_s=fetch_s,
            compute_s=compute_s,
            before_last_s=costs.prefill_s(profile, num_new - chunk, num_before, chunk),
            ttft_s=queue_s + fetch_s + compute_s,
            num_cached=num_cached,
            num_fetched=num_found - num_cached,
            source=source,
        )

    def _local_way(self, seat: _Seat) -> _Way:
        worker, profile = seat.worker, seat.profile
        num_cached, num_found, found_s, source = self._find_beginning(worker, profile)
        num_before = num_found * PAGE_TOKENS
        num_new = self._num_tokens - num_before
        num_rows, num_context = worker.num_credits, worker.num_context_tokens
        chunk = costs.local_chunk(worker.max_batch_tokens, num_rows)
        rows_s = profile.decode_step_s(num_rows, num_context) - profile.base_s
        compute_s = costs.prefill_s(profile, num_new, num_before, chunk) + -(-num_new // chunk) * rows_s
        queue_s = worker.queued_prefill_s
        fetch_s = max(0.0, found_s - queue_s)
        return _Way(
            worker=worker,
            queue_s=queue_s,
            fetch_s=fetch_s,
            compute_s=compute_s,
            before_last_s=0.0,
            ttft_s=queue_s + fetch_s + compute_s,
            num_cached=num_cached,
            num_fetched=num_found - num_cached,
            source=source,
        )

    def _find_beginning(self, worker: WorkerView, profile: SpeedProfile) -> tuple[int, int, float, WorkerView | None]:
        """Pages of the prompt at the worker, those and the ones it may fetch, the time until they are on its GPU, and
        from where: whichever leaves least to do."""
        on_gpu, held = self._matches.get(worker.ref.incarnation, NOTHING_HELD)
        load_s = costs.HOST_LINK.pull_s((held - on_gpu) * worker.page_bytes)
        best = (held, held, load_s, None)
        if not self._sources:
            return best
        least_s = load_s + self._work_s(worker, profile, held)
        for source, source_on_gpu, source_held in self._sources:
            if source_held <= held or source.layout_fingerprint != worker.layout_fingerprint:
                continue
            link = worker.links.get(source.ref.incarnation)
            if link is None:
                continue
            num_from_host = max(0, source_held - max(source_on_gpu, held))
            fetch_s = link.pull_s((source_held - held) * worker.page_bytes)
            found_s = load_s + fetch_s + costs.HOST_LINK.pull_s(num_from_host * worker.page_bytes)
            work_s = found_s + self._work_s(worker, profile, source_held)
            if work_s < least_s:
                least_s = work_s
                best = (held, source_held, found_s, source)
        return best

    def _work_s(self, worker: WorkerView, profile: SpeedProfile, num_found: int) -> float:
        num_before = num_found * PAGE_TOKENS
        return costs.prefill_s(profile, self._num_tokens - num_before, num_before, worker.max_batch_tokens)

    def _find_sources(self, workers: Iterable[WorkerView]) -> list[tuple[WorkerView, int, int]]:
        """Who holds most of the prompt, on the GPU before elsewhere; with the pages there and at all."""
        matches = self._matches
        holding = [worker for worker in workers if worker.takes_work and worker.ref.incarnation in matches]
        holding.sort(
            key=lambda worker: (*(-count for count in reversed(matches[worker.ref.incarnation])), worker.ref.slot)
        )
        return [(worker, *matches[worker.ref.incarnation]) for worker in holding[:NUM_SOURCES]]

    def _transfer_s(self, way: _Way, seat: _Seat) -> float:
        worker = seat.worker
        link = worker.links.get(way.worker.ref.incarnation, costs.UNMEASURED_LINK)
        num_bytes = (self._num_pages - seat.num_held) * worker.page_bytes
        num_last_bytes = pages_for(way.worker.max_batch_tokens) * worker.page_bytes
        return costs.transfer_s(link, num_bytes, num_last_bytes, way.before_last_s)

    def _remote_loss(self, way: _Way, seat: _Seat) -> float:
        """Decode's wait for KV counts as one for the first token: behind it stands the second."""
        own_loss = costs.loss((way.ttft_s + self._transfer_s(way, seat)) / self._rules.ttft_goal_s)
        return own_loss + self._price * way.compute_s + seat.own_loss + seat.rows_loss

    def _local_loss(self, way: _Way, seat: _Seat) -> float:
        own_loss = costs.loss(way.ttft_s / self._rules.ttft_goal_s)
        return own_loss + self._stall_loss(way, seat) + seat.own_loss + seat.rows_loss

    def _stall_loss(self, way: _Way, seat: _Seat) -> float:
        worker = seat.worker
        num_before = (way.num_cached + way.num_fetched) * PAGE_TOKENS
        stall_s = costs.local_stall_s(
            seat.profile, self._num_tokens - num_before, num_before, worker.max_batch_tokens, worker.num_credits
        )
        goal_s = self._rules.tpot_goal_s
        return costs.added_loss(worker.num_credits, seat.joined_s, stall_s / self._num_later, goal_s)

    def cost_of(self, way: _Way, seat: _Seat) -> costs.Cost:
        """The parts of a ranked pair's loss, in seconds."""
        goal_s = self._rules.ttft_goal_s
        is_local = way.worker is seat.worker
        wait_s = 0.0 if is_local else self._transfer_s(way, seat)
        return costs.Cost(
            queue_s=way.queue_s,
            fetch_s=way.fetch_s,
            compute_s=way.compute_s,
            transfer_s=wait_s,
            tpot_s=seat.tpot_s,
            own_s=goal_s * (costs.loss((way.ttft_s + wait_s) / goal_s) + seat.own_loss),
            behind_s=0.0 if is_local else goal_s * self._price * way.compute_s,
            rows_s=goal_s * seat.rows_loss,
            stall_s=goal_s * self._stall_loss(way, seat) if is_local else 0.0,
        )

    def explain(self, ranked: Sequence[_Ranked]) -> Explanation:
        """Why the first of `ranked` was chosen."""
        shown = [(each, self.cost_of(each.way, each.seat)) for each in ranked]
        reason = _reason([cost for _, cost in shown])
        if self._assumed:
            reason += f"; speeds assumed of slots {', '.join(map(str, sorted(self._assumed)))}"
        return Explanation(reason, self._num_ways, tuple(_candidate(each, cost) for each, cost in shown))


def _assumed_profiles(pool: Sequence[WorkerView]) -> dict[int, SpeedProfile]:
    """By slot, of those that have measured none."""
    if all(worker.profile is not None for worker in pool):
        return {}
    mean = costs.mean_profile(pool)
    return {worker.ref.slot: mean for worker in pool if worker.profile is None}


def _reason(ranked: Sequence[costs.Cost]) -> str:
    if len(ranked) == 1:
        return "the only way"
    best, other = ranked[:2]
    saved = {
        "its own times": other.own_s - best.own_s,
        "those behind it": other.behind_s - best.behind_s,
        "rows it joins": other.rows_s - best.rows_s,
        "rows it stalls": other.stall_s - best.stall_s,
    }
    if best.cost_s == other.cost_s:
        return "as good as the next"
    return (
        f"{other.cost_s - best.cost_s:.3g} s better than the next, most by {max(saved, key=lambda part: saved[part])}"
    )


def _candidate(ranked: _Ranked, cost: costs.Cost) -> Candidate:
    way, seat = ranked.way, ranked.seat
    return Candidate(
        prefill=way.worker.ref.slot,
        decode=seat.worker.ref.slot,
        ttft_s=_rounded(cost.ttft_s),
        tpot_s=_rounded(cost.tpot_s),
        cost_s=_rounded(cost.cost_s),
        cached_pages=way.num_cached,
        fetched_pages=way.num_fetched,
        queue_s=_rounded(cost.queue_s),
        transfer_s=_rounded(cost.transfer_s),
        is_local=way.worker is seat.worker,
    )


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def _loss_and_tie(seat: tuple[float, int, _Seat]) -> tuple[float, int]:
    return seat[:2]


def _num_held(seat: tuple[float, int, _Seat]) -> int:
    return seat[2].num_held
