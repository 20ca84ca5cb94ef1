"""Whether an edge takes a request on: how long it would wait, and run.

each ingest, at its beat:  WaitingLine, Outlook ──> BacklogReport ──> (Redis) ──> edges
each edge, at a request:   BacklogReports + accepted since ──> Forecast ──> refused at once, or accepted

While somebody waits, the line's own pace tells how long it takes. Before, nobody knows that pace; but a rush fills the
room that decode has left, and what follows then waits for answers to end. So the load is predicted for the time at
which a request would arrive in decode (as Qin et al. do in "Mooncake", FAST 2025, since admission by the load of now
lets in what decode cannot take): from the room that is free, the workers' speeds and the lengths that answers are
expected to have. The same prediction says how long the answer takes there, and so how much of a deadline is left for
waiting.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from shared.blocks import PAGE_TOKENS
from shared.policy.line import Blocked
from shared.policy.views import ClusterView, WorkerView
from shared.request import Priority

RATE_WINDOW_S = 10.0
"""Placements are counted over about so long."""

MIN_BEAT_S = 0.05
"""A shorter time says nothing of a rate."""

USUAL_SHARE = 0.005
"""What one placement changes of what is usual: of prompts a hundred times as long as most there are some."""

NUM_USUAL = 100
"""Of fewer placements it is not known what is usual: nobody is refused because the first one was large."""


@dataclass(frozen=True, slots=True)
class Usual:
    """What choices were like lately, on average.

    Attributes:
        num_pages: that they took in decode.
        num_new_tokens: expected of their answers.
        prefill_s: predicted work for prefill.
        num_seen: of how many.
    """

    num_pages: float
    num_new_tokens: float
    prefill_s: float
    num_seen: int = 1

    def with_one_more(self, one: "Usual") -> "Usual":
        """After a placement of `one`."""
        share = max(USUAL_SHARE, 1 / (self.num_seen + 1))
        return Usual(
            self.num_pages + share * (one.num_pages - self.num_pages),
            self.num_new_tokens + share * (one.num_new_tokens - self.num_new_tokens),
            self.prefill_s + share * (one.prefill_s - self.prefill_s),
            self.num_seen + 1,
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What awaits who comes now, as the workers' speeds and the usual choice predict it.

    Attributes:
        num_free: usual choices for which decode has room.
        ends_per_s: usual choices that the workers serve to their ends, once that room is taken.
        prefill_queue_s: work before whoever comes next, on the worker with the least that may compute its prompt.
        token_s: of each token of an answer that begins now, and `idle_token_s` where nobody else is.
        num_new_tokens: of a usual answer.
    """

    num_free: float
    ends_per_s: float
    prefill_queue_s: float
    token_s: float
    idle_token_s: float
    num_new_tokens: float

    @classmethod
    def of(cls, cluster: ClusterView, usual: Usual, *, local_prefill: bool) -> Self | None:
        """None while there is no decode worker, or one whose speeds are not measured, or too little was placed.

        Args:
            local_prefill: decode workers may compute prompts.
        """
        if usual.num_seen < NUM_USUAL:
            return None
        decode = [worker for worker in cluster.decode if worker.takes_work]
        prefill = [worker for worker in cluster.prefill if worker.takes_work]
        computing = [*prefill, *decode] if local_prefill else prefill
        seats = [seat for worker in decode if (seat := _seats(worker, usual)) is not None]
        if not seats or len(seats) < len(decode):
            return None
        ends_per_s = sum(seat.ends_per_s for seat in seats)
        if prefill and usual.prefill_s > 0:
            ends_per_s = min(ends_per_s, len(prefill) / usual.prefill_s)
        return cls(
            num_free=sum(seat.num_free for seat in seats),
            ends_per_s=ends_per_s,
            prefill_queue_s=min((each.queued_prefill_s for each in computing), default=0.0),
            token_s=min(seat.token_s for seat in seats),
            idle_token_s=min(seat.idle_token_s for seat in seats),
            num_new_tokens=usual.num_new_tokens,
        )


@dataclass(frozen=True, slots=True)
class _Seats:
    """One decode worker's part of an outlook."""

    num_free: float
    ends_per_s: float
    token_s: float
    idle_token_s: float


def _seats(worker: WorkerView, usual: Usual) -> _Seats | None:
    """None where the speeds tell nothing of answers: not measured, or so that one takes no time."""
    if worker.profile is None:
        return None
    num_pages, step_s = max(usual.num_pages, 1.0), worker.profile.decode_step_s
    free_pages = (worker.num_pages - worker.num_credit_pages) / num_pages
    num_free = max(0.0, min(worker.max_running - worker.num_credits, free_pages))
    num_context_tokens = int(num_pages * PAGE_TOKENS)
    idle_token_s = step_s(1, num_context_tokens)
    if idle_token_s <= 0:
        return None

    def token_s(num_more: float) -> float:
        return step_s(
            int(worker.num_credits + num_more), int(worker.num_context_tokens + num_more * num_context_tokens)
        )

    num_full = worker.num_credits + num_free
    return _Seats(
        num_free,
        num_full / ((token_s(num_free) or idle_token_s) * max(usual.num_new_tokens, 1.0)),
        token_s(min(1.0, num_free)),
        idle_token_s,
    )


@dataclass(frozen=True, slots=True)
class BacklogReport:
    """What one ingest says of its line at each beat.

    Attributes:
        num_waiting: choices that wait for a placement, and jobs that are not admitted or not read yet; not those that
            are known to be batch.
        oldest_wait_s: for which the first of them has waited, as far as it is known.
        placed_per_s: placements of such while one always waited; None where nobody had to wait lately, so that nothing
            is known of how fast it can go.
        num_standard: of `num_waiting`, those that let interactive ones go first.
        oldest_batch_wait_s: for which the first batch job in line has waited, with the time in which it was parked.
        blocked: who is first and has no room; not batch.
        quiet_s: for which nobody but batch has come; None: for ever.
    """

    num_waiting: int
    oldest_wait_s: float
    placed_per_s: float | None
    num_standard: int = 0
    oldest_batch_wait_s: float = 0.0
    outlook: Outlook | None = None
    blocked: Blocked | None = None
    quiet_s: float | None = None

    def num_ahead(self, priority: Priority) -> int:
        """Of somebody who comes now."""
        return self.num_waiting - (self.num_standard if priority is Priority.INTERACTIVE else 0)


class WaitingLine:
    """Counts who waits, and how fast they are placed while somebody always does.

    Attributes:
        in_vain_s: for so long of the last RATE_WINDOW_S somebody waited, and nobody was placed; as of the last beat.
    """

    def __init__(self, now_s: float) -> None:
        self.num_waiting = 0
        self.in_vain_s = 0.0
        self._began_s = now_s
        self._num_placed = 0
        self._was_empty = True
        self._beats: deque[tuple[float, float, int]] = deque()
        """End, length and placements of each time between beats in which the line was never empty."""

    def join(self, num: int = 1) -> None:
        self.num_waiting += num

    def leave(self, num: int = 1) -> None:
        """If nobody is left, the times in which nothing was placed tell of no limit any more: after an outage an empty
        line would look like a long wait."""
        self.num_waiting -= num
        if not self.num_waiting:
            self._was_empty = True
            self._beats = deque(beat for beat in self._beats if beat[2])

    def place(self) -> None:
        """One leaves because there was room for it. If it was the last one, no limit is known any more."""
        self._num_placed += 1
        self.leave()
        if not self.num_waiting:
            self._beats.clear()

    def beat(self, now_s: float) -> float | None:
        """Placements per second, by the beats of the last RATE_WINDOW_S in which somebody always waited."""
        length_s = now_s - self._began_s
        if length_s >= MIN_BEAT_S:
            if not self._was_empty:
                self._beats.append((now_s, length_s, self._num_placed))
            self._began_s, self._num_placed, self._was_empty = now_s, 0, self.num_waiting == 0
        while self._beats and self._beats[0][0] < now_s - RATE_WINDOW_S:
            self._beats.popleft()
        total_s = sum(length_s for _, length_s, _ in self._beats)
        num_placed = sum(num_placed for _, _, num_placed in self._beats)
        self.in_vain_s = 0.0 if num_placed else total_s
        return num_placed / total_s if total_s else None


def predicted_wait_s(
    backlogs: Collection[BacklogReport], num_accepted_since: float, priority: Priority = Priority.STANDARD
) -> float:
    """How long one more would wait for a placement.

    By the pace of the lines; where nobody waited lately, by the outlooks, and 0 where there are none: a report will
    tell as soon as the limit is reached. Where nothing is placed, each is guessed to wait behind the one before it as
    long as the first has waited in vain, up to RATE_WINDOW_S; who comes now, at least as long as that one.

    Batch waits for idle workers, of which the pace of now says nothing: as long as the first of it has waited.

    Args:
        num_accepted_since: choices accepted, by all edges, that the reports do not count yet.
    """
    if priority is Priority.BATCH:
        return max((backlog.oldest_batch_wait_s for backlog in backlogs), default=0.0)
    num_ahead = sum(backlog.num_ahead(priority) for backlog in backlogs) + num_accepted_since
    rates = [backlog.placed_per_s for backlog in backlogs if backlog.placed_per_s is not None]
    if not rates:
        return _wait_for_ends_s(_worst(backlogs), num_ahead)
    if sum(rates) > 0:
        return num_ahead / sum(rates)
    vain_s = max(backlog.oldest_wait_s for backlog in backlogs)
    return max(num_ahead * min(vain_s, RATE_WINDOW_S), vain_s)


def _wait_for_ends_s(outlook: Outlook | None, num_ahead: float) -> float:
    """Until there is room in decode for who comes behind so many, none of whom waits yet."""
    if outlook is None or outlook.ends_per_s <= 0:
        return 0.0
    return max(0.0, num_ahead - outlook.num_free) / outlook.ends_per_s


def _worst(backlogs: Collection[BacklogReport]) -> Outlook | None:
    """Each ingest looks at the same workers: of several outlooks the one with the least room."""
    outlooks = [backlog.outlook for backlog in backlogs if backlog.outlook is not None]
    return min(outlooks, key=lambda outlook: outlook.num_free, default=None)


def max_wait_s(
    timeout_s: float, max_queue_s: float, run_s: float = 0.0, priority: Priority = Priority.STANDARD
) -> float:
    """How long a request may wait for its placement: half of its time, or more, is for running. Batch may wait as long
    as its deadline lets it."""
    left_s = max(0.0, timeout_s - max(run_s, timeout_s / 2))
    return left_s if priority is Priority.BATCH else min(max_queue_s, left_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one more request.

    Attributes:
        wait_s: for its placement and for the prefill worker.
        run_s: of a usual answer, at most as long as this one may be, with the load that it will meet in decode.
        idle_run_s: the same if nobody else were there.
    """

    wait_s: float
    run_s: float = 0.0
    idle_run_s: float = 0.0

    @classmethod
    def of(
        cls,
        backlogs: Collection[BacklogReport],
        num_accepted_since: float,
        priority: Priority,
        max_new_tokens: int | None,
    ) -> Self:
        """See `predicted_wait_s`.

        Args:
            max_new_tokens: if the request names it.
        """
        wait_s = predicted_wait_s(backlogs, num_accepted_since, priority)
        outlook = _worst(backlogs)
        if outlook is None:
            return cls(wait_s)
        num_new_tokens = outlook.num_new_tokens
        if max_new_tokens is not None:
            num_new_tokens = min(num_new_tokens, max_new_tokens)
        queue_s = 0.0 if priority is Priority.BATCH else outlook.prefill_queue_s
        return cls(wait_s + queue_s, outlook.token_s * num_new_tokens, outlook.idle_token_s * num_new_tokens)

    def check(self, timeout_s: float, max_queue_s: float, priority: Priority) -> "Refusal | None":
        """None: it is taken."""
        # An answer that takes most of its time on idle workers too may be late, but not for the load; and it may be
        # shorter than usual.
        run_s = self.run_s if self.idle_run_s <= timeout_s / 2 else 0.0
        if run_s > timeout_s:
            told = (
                f"a usual answer would take {run_s:.3g} s beside those that run now; the request has {timeout_s:.3g} s"
            )
            return Refusal(TooLate.RUN, run_s - timeout_s, told)
        limit_s = max_wait_s(timeout_s, max_queue_s, run_s, priority)
        if self.wait_s <= limit_s:
            return None
        return Refusal(
            TooLate.WAIT,
            self.wait_s - limit_s,
            f"a request would wait {self.wait_s:.3g} s before it runs; this one may wait {limit_s:.3g} s, "
            f"with {timeout_s:.3g} s for all of it",
        )


class TooLate(StrEnum):
    """What would make a request late."""

    WAIT = "wait"
    """It would wait for too long before it runs."""
    RUN = "run"
    """Beside those that run, a usual answer takes longer than the request has."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Of a request that would only wait to be late.

    Attributes:
        excess_s: by how much.
        told: prediction and limit, in words.
    """

    cause: TooLate
    excess_s: float
    told: str
