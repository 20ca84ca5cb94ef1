"""What each way to run a choice is predicted to cost: one worker computes its prompt, one decodes it, maybe the same.

All decode workers are scored alone; the best few are tried with all prefill workers, and every one with itself. What a
way costs is `costs`' matter.

A decision is made for each request and looks at all workers, so a way is not worked out before a bound that is found at
less expense says that it may be among the best: at least a worker's queue goes by, and the time for the tokens that
nobody holds; then, that what anybody holds is there at once, and that the transfer takes no time. What depends on one
worker is computed once for it, and what few decisions need when it is needed.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy import costs
from shared.policy.holders import Holders
from shared.policy.profile import SpeedProfile
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import NUM_SLOTS, Incarnation
from shared.wire.explanation import MAX_CANDIDATES, Candidate, Explanation

Matches = Mapping[Incarnation, tuple[int, int]]
NOTHING_HELD = (0, 0)

NUM_DECODE_CANDIDATES = 4
"""Decode workers that are best by themselves, to be tried with all prefill workers. One would do where all links are
alike; more are there for links that differ, where the pair decides how long KV takes."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator wants of placements.

    Attributes:
        ttft_goal_s: time to the first token within which a request counts as served well.
        tpot_goal_s: mean time of each later token, likewise.
        local_prefill: a decode worker may compute a prompt itself.
        fetch: a worker may get a prompt's beginning from another that holds it.
    """

    ttft_goal_s: float
    tpot_goal_s: float
    local_prefill: bool = True
    fetch: bool = True


class _Beginning(NamedTuple):
    """What of the prompt one worker need not compute.

    Attributes:
        num_held: pages that it has.
        num_found: these, and those that it fetches from `source`.
        found_s: until all of them are on its GPU.
        copied_s: to compute those that another worker has and this one will have, too.
    """

    num_held: int
    num_found: int
    found_s: float
    copied_s: float
    source: WorkerView | None


class _Way(NamedTuple):
    """How one worker would compute the prompt. No two have the same `tie`, which settles equal losses.

    Attributes:
        loss: of the time to the first token, and of pages kept twice; if the worker decodes, too, also what its rows
            lose by the work.
        copies_loss: of `loss`, that of pages kept twice.
        compute_s: its work.
        before_last_s: of that, before the last chunk.
        ttft_s: from now until the first token.
    """

    loss: float
    tie: int
    worker: WorkerView
    beginning: _Beginning
    copies_loss: float
    queue_s: float
    compute_s: float
    before_last_s: float
    ttft_s: float

    @property
    def fetch_s(self) -> float:
        """Until pages are there, beyond the queue."""
        return max(0.0, self.beginning.found_s - self.queue_s)


class _Seat(NamedTuple):
    """What it means for one decode worker to run the request, whoever computes the prompt. `tie` as for a way.

    Attributes:
        loss: of the request's time per token, and what its row adds to the others'.
        step_s: of a step as it is now.
        tpot_s: of each token of a row there, with this request's row and with what stalls them already.
        rows_loss: of `loss`, the others' part.
    """

    loss: float
    tie: int
    worker: WorkerView
    profile: SpeedProfile
    step_s: float
    tpot_s: float
    rows_loss: float


class Ranked(NamedTuple):
    """A way and a seat, with the loss that they mean together; equal ones by `tie`."""

    loss: float
    tie: int
    way: _Way
    seat: _Seat

    @property
    def is_local(self) -> bool:
        return self.way.worker is self.seat.worker


class _Best:
    """The best ways so far, best first, as many as are told of."""

    def __init__(self) -> None:
        self.ways: list[Ranked] = []
        self.bar = inf
        """What costs more is none of them."""

    def keep(self, loss: float, tie: int, way: _Way, seat: _Seat) -> None:
        """If it is one of them."""
        if loss > self.bar:
            return
        insort(self.ways, Ranked(loss, tie, way, seat))
        del self.ways[MAX_CANDIDATES:]
        if len(self.ways) == MAX_CANDIDATES:
            self.bar = self.ways[-1].loss


class Scoring:
    """One decision's constants, and what follows from them for a worker and for a pair."""

    def __init__(
        self, request: RequestView, cluster: ClusterView, holders: Holders, rules: Rules, tie_break: int
    ) -> None:
        self._request = request
        self._rules = rules
        self._tie_break = tie_break
        self._num_tokens = request.num_tokens
        self._num_pages = pages_for(request.num_tokens)
        self._num_later = max(request.expected_new_tokens, 1.0)
        self._num_later_of_others = max(request.usual_new_tokens, 1.0)
        self._num_context = request.num_tokens + round(request.expected_new_tokens / 2)
        # The last token of a prompt is always computed.
        self._matches = holders.matches(request.blocks[: max(request.num_tokens - 1, 0) // PAGE_TOKENS])
        self._most_held = max((num_held for _, num_held in self._matches.values()), default=0)
        # The best that may be: all that anybody holds is there at once.
        self._all_found = _Beginning(self._most_held, self._most_held, 0.0, 0.0, None)
        self._num_lacking = request.num_tokens - self._most_held * PAGE_TOKENS
        self._prefill = [worker for worker in cluster.prefill if worker.model == request.model]
        self._decode = [worker for worker in cluster.decode if worker.model == request.model]
        self._num_ways = 0

    def rank(self, prefill: Sequence[WorkerView], decode: Sequence[WorkerView]) -> list[Ranked]:
        """The best ways, best first."""
        seats = sorted(self._seat(worker, tie) for tie, worker in self._in_turn(decode))
        best = _Best()
        self._try_remote(prefill, self._best_seats(seats), best)
        if self._rules.local_prefill:
            self._try_local(seats, best)
        return best.ways

    def _in_turn(self, pool: Sequence[WorkerView]) -> Iterable[tuple[int, WorkerView]]:
        """Numbered; each time another one is the first."""
        first = -self._tie_break % max(len(pool), 1)
        return enumerate((*pool[first:], *pool[:first]))

    def _try_remote(self, prefill: Sequence[WorkerView], seats: Sequence[_Seat], best: _Best) -> None:
        for layout in {seat.worker.layout_fingerprint for seat in seats}:
            line = sorted(
                (self._soonest_s(worker, worker.profile or self._assumed[worker.ref.slot]), tie, worker)
                for tie, worker in self._in_turn(prefill)
                if worker.layout_fingerprint == layout
            )
            first, *others = (seat for seat in seats if seat.worker.layout_fingerprint == layout)
            self._num_ways += len(line) * (1 + len(others))
            ways = sorted(self._try_line(line, first, best))
            for seat in others:
                for way in ways:
                    if way.loss + seat.loss > best.bar:
                        break
                    self._try_pair(way, seat, best)

    def _try_line(self, line: Iterable[tuple[float, int, WorkerView]], seat: _Seat, best: _Best) -> Iterator[_Way]:
        """With the best seat. Those ways that may be good enough with another one, too."""
        for soonest_s, tie, worker in line:
            if costs.loss(soonest_s / self._rules.ttft_goal_s) + seat.loss > best.bar:
                break
            way = self._remote_way(worker, tie)
            if way.loss + seat.loss <= best.bar:
                self._try_pair(way, seat, best)
                yield way

    def _try_pair(self, way: _Way, seat: _Seat, best: _Best) -> None:
        # Local ways come before all others that are as good, and one seat's before the next one's.
        tie = (seat.tie + 1) * NUM_SLOTS + way.tie
        best.keep(self._remote_loss(way, seat), tie, way, seat)

    def _soonest_s(self, worker: WorkerView, profile: SpeedProfile) -> float:
        """At least so long it takes to the first token."""
        return worker.queued_prefill_s + profile.token_s * self._num_lacking

    def _try_local(self, seats: Sequence[_Seat], best: _Best) -> None:
        self._num_ways += len(seats)
        for seat in seats:
            if seat.loss > best.bar:
                break
            # A step with a chunk takes longer than the tokens by as much as the rows beside them take.
            soonest_s = self._soonest_s(seat.worker, seat.profile) + seat.step_s - seat.profile.base_s
            if costs.loss(soonest_s / self._rules.ttft_goal_s) + seat.loss > best.bar:
                continue
            way = self._local_way(seat, self._all_found)
            if self._matches and way.loss + seat.loss <= best.bar:
                way = self._local_way(seat, self._beginning(seat.worker, seat.profile))
            best.keep(way.loss + seat.loss, seat.tie, way, seat)

    def _best_seats(self, seats: Sequence[_Seat]) -> Sequence[_Seat]:
        """Those that cost least by themselves; and the one that holds most of the prompt, to which least is moved."""
        num_best = NUM_DECODE_CANDIDATES
        best = list(seats[:num_best])
        if self._matches and num_best < len(seats):
            nearest = max(seats[num_best:], key=self._num_held)
            if self._num_held(nearest) > max(map(self._num_held, best)):
                best.append(nearest)
        return best

    def _num_held(self, seat: _Seat) -> int:
        """Pages of the prompt that the worker has."""
        return self._matches.get(seat.worker.ref.incarnation, NOTHING_HELD)[1]

    def _seat(self, worker: WorkerView, tie: int) -> _Seat:
        profile = worker.profile or self._assumed[worker.ref.slot]
        goal_s, num_rows = self._rules.tpot_goal_s, worker.num_credits
        stalled_s = worker.queued_prefill_s / self._num_later
        step_s = profile.decode_step_s(num_rows, worker.num_context_tokens)
        now_s = step_s + stalled_s
        tpot_s = now_s + profile.row_s + profile.context_s * self._num_context
        own_loss = costs.loss(tpot_s / goal_s)
        rows_loss = costs.added_loss(num_rows, now_s / goal_s, tpot_s / goal_s)
        return _Seat(own_loss + rows_loss, tie, worker, profile, step_s, tpot_s, rows_loss)

    def _remote_way(self, worker: WorkerView, tie: int) -> _Way:
        profile = worker.profile or self._assumed[worker.ref.slot]
        beginning = self._beginning(worker, profile)
        queue_s, compute_s = worker.queued_prefill_s, self._rest_s(worker, profile, beginning.num_found)
        ttft_s = max(queue_s, beginning.found_s) + compute_s
        copies_loss = self._copies_loss(beginning)
        loss = costs.loss(ttft_s / self._rules.ttft_goal_s) + copies_loss
        num_before, chunk = beginning.num_found * PAGE_TOKENS, worker.max_batch_tokens
        before_last_s = costs.prefill_s(profile, self._num_tokens - num_before - chunk, num_before, chunk)
        return _Way(loss, tie, worker, beginning, copies_loss, queue_s, compute_s, before_last_s, ttft_s)

    def _local_way(self, seat: _Seat, beginning: _Beginning) -> _Way:
        worker, profile = seat.worker, seat.profile
        num_before, num_rows = beginning.num_found * PAGE_TOKENS, worker.num_credits
        num_new = self._num_tokens - num_before
        chunk = costs.local_chunk(worker.max_batch_tokens, num_rows)
        stall_s = costs.local_stall_s(profile, num_new, num_before, chunk)
        queue_s = worker.queued_prefill_s
        compute_s = stall_s + -(-num_new // chunk) * seat.step_s
        ttft_s = max(queue_s, beginning.found_s) + compute_s
        copies_loss = self._copies_loss(beginning)
        loss = costs.loss(ttft_s / self._rules.ttft_goal_s) + copies_loss + self._stall_loss(seat, stall_s)
        return _Way(loss, 0, worker, beginning, copies_loss, queue_s, compute_s, 0.0, ttft_s)

    def _copies_loss(self, beginning: _Beginning) -> float:
        return costs.USES_OF_A_PAGE * beginning.copied_s / self._rules.ttft_goal_s

    def _stall_loss(self, seat: _Seat, stall_s: float) -> float:
        """What a prompt's chunks take from the rows beside them, and from those who wait for one of them to leave."""
        goal_s = self._rules.tpot_goal_s
        after = (seat.tpot_s + stall_s / self._num_later_of_others) / goal_s
        rows_loss = costs.added_loss(seat.worker.num_credits, seat.tpot_s / goal_s, after)
        return rows_loss + self._stall_price * stall_s

    def _beginning(self, worker: WorkerView, profile: SpeedProfile) -> _Beginning:
        """With a fetch, if that is worth it."""
        if not self._matches:
            return self._all_found
        num_on_gpu, num_held = self._matches.get(worker.ref.incarnation, NOTHING_HELD)
        load_s = costs.HOST_LINK.pull_s((num_held - num_on_gpu) * worker.page_bytes) if num_held > num_on_gpu else 0.0
        if num_held >= self._most_held:
            return _Beginning(num_held, num_held, load_s, 0.0, None)
        rest_s = self._rest_s(worker, profile, num_held)
        copied_s = rest_s - self._rest_s(worker, profile, self._most_held)
        for source, num_on_its_gpu, num_there in self._sources:
            link = worker.links.get(source.ref.incarnation)
            if link is None or source.layout_fingerprint != worker.layout_fingerprint:
                continue
            num_on_its_host = max(0, num_there - max(num_on_its_gpu, num_held))
            found_s = load_s + link.pull_s((num_there - num_held) * worker.page_bytes)
            found_s += costs.HOST_LINK.pull_s(num_on_its_host * worker.page_bytes)
            if found_s + self._rest_s(worker, profile, num_there) < load_s + rest_s:
                return _Beginning(num_held, num_there, found_s, copied_s, source)
            break
        return _Beginning(num_held, num_held, load_s, copied_s, None)

    def _rest_s(self, worker: WorkerView, profile: SpeedProfile, num_found: int) -> float:
        num_before = num_found * PAGE_TOKENS
        return costs.prefill_s(profile, self._num_tokens - num_before, num_before, worker.max_batch_tokens)

    @cached_property
    def _sources(self) -> list[tuple[WorkerView, int, int]]:
        """Who may lend of the prompt, with the pages on its GPU and in all; most first, on the GPU before elsewhere."""
        if not self._rules.fetch:
            return []
        matches, turn = self._matches, self._tie_break
        sources = [
            (worker, *matches[worker.ref.incarnation])
            for worker in (*self._prefill, *self._decode)
            if worker.ref.incarnation in matches and worker.takes_work
        ]
        sources.sort(key=lambda source: (-source[2], -source[1], (source[0].ref.slot + turn) % NUM_SLOTS))
        return sources

    @cached_property
    def _stall_price(self) -> float:
        num_pages = pages_for(self._num_tokens + self._request.reserve_new_tokens)
        return costs.price_of_stall(self._decode, num_pages, self._rules.ttft_goal_s)

    @cached_property
    def _assumed(self) -> dict[int, SpeedProfile]:
        """Speeds of those that have measured none, by slot."""
        return _assumed_profiles(self._prefill, self._decode) | _assumed_profiles(self._decode, self._prefill)

    def _remote_loss(self, way: _Way, seat: _Seat) -> float:
        """Decode's wait for KV counts as one for the first token: behind it stands the second."""
        waited_share = (way.ttft_s + self._transfer_s(way, seat)) / self._rules.ttft_goal_s
        return costs.loss(waited_share) + way.copies_loss + seat.loss

    def _transfer_s(self, way: _Way, seat: _Seat) -> float:
        """How long decode waits for KV: of a prompt of one chunk, for all of it."""
        worker = seat.worker
        link = worker.links.get(way.worker.ref.incarnation, costs.UNMEASURED_LINK)
        num_bytes = (self._num_pages - self._num_held(seat)) * worker.page_bytes
        if not way.before_last_s:
            return link.pull_s(num_bytes)
        num_last_bytes = pages_for(way.worker.max_batch_tokens) * worker.page_bytes
        return costs.transfer_s(link, num_bytes, num_last_bytes, way.before_last_s)

    def explain(self, ranked: Sequence[Ranked]) -> Explanation:
        """Why the first of `ranked` was chosen."""
        shown = [(each, self.cost_of(each)) for each in ranked]
        reason = _reason([cost for _, cost in shown])
        source = ranked[0].way.beginning.source
        if source is not None:
            reason += f"; fetches from slot {source.ref.slot}"
        if self._assumed:
            reason += f"; speeds not measured yet, but guessed: slots {', '.join(map(str, sorted(self._assumed)))}"
        return Explanation(reason, self._num_ways, tuple(_candidate(each, cost) for each, cost in shown))

    def cost_of(self, ranked: Ranked) -> costs.Cost:
        """The parts of a pair's loss, in seconds."""
        way, seat, goal_s = ranked.way, ranked.seat, self._rules.ttft_goal_s
        wait_s = 0.0 if ranked.is_local else self._transfer_s(way, seat)
        first_loss = costs.loss((way.ttft_s + wait_s) / goal_s)
        return costs.Cost(
            queue_s=way.queue_s,
            fetch_s=way.fetch_s,
            compute_s=way.compute_s,
            transfer_s=wait_s,
            tpot_s=seat.tpot_s,
            own_s=goal_s * (first_loss + seat.loss - seat.rows_loss),
            rows_s=goal_s * seat.rows_loss,
            stall_s=goal_s * (way.loss - first_loss - way.copies_loss) if ranked.is_local else 0.0,
            copies_s=goal_s * way.copies_loss,
        )


def _assumed_profiles(pool: Sequence[WorkerView], others: Sequence[WorkerView]) -> dict[int, SpeedProfile]:
    """By slot, of those of a pool that have measured none."""
    if all(worker.profile is not None for worker in pool):
        return {}
    mean = costs.mean_profile(pool, others)
    return {worker.ref.slot: mean for worker in pool if worker.profile is None}


def _reason(ranked: Sequence[costs.Cost]) -> str:
    if len(ranked) == 1:
        return "the only way there is room for"
    best, other = ranked[:2]
    saved = {
        "by its own times": other.own_s - best.own_s,
        "by slowing the rows beside it less": other.rows_s - best.rows_s,
        "by holding them up less with its prompt": other.stall_s - best.stall_s,
        "by keeping no pages twice": other.copies_s - best.copies_s,
    }
    if best.cost_s == other.cost_s:
        return "costs as much as the next best"
    cheaper_s = other.cost_s - best.cost_s
    return f"costs {cheaper_s:.3g} s less than the next best, mostly {max(saved, key=lambda part: saved[part])}"


def _candidate(ranked: Ranked, cost: costs.Cost) -> Candidate:
    way, seat = ranked.way, ranked.seat
    return Candidate(
        prefill=way.worker.ref.slot,
        decode=seat.worker.ref.slot,
        ttft_s=cost.ttft_s,
        tpot_s=cost.tpot_s,
        cost_s=cost.cost_s,
        cached_pages=way.beginning.num_held,
        fetched_pages=way.beginning.num_found - way.beginning.num_held,
        queue_s=cost.queue_s,
        transfer_s=cost.transfer_s,
        is_local=ranked.is_local,
    )
