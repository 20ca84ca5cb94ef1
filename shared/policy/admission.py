"""Whether an edge takes a request on: how long it would wait for a placement, and what its tenant may.

each ingest, at its beat:  WaitingLine ──> BacklogReport ──> (Redis) ──> edges
each edge, at a request:   BacklogReports + accepted since ──> predicted_wait_s > max_wait_s: refused at once
"""

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

RATE_WINDOW_S = 10.0
"""Placements are counted over about so long."""

MIN_BEAT_S = 0.05
"""A shorter time says nothing of a rate."""

BYTES_PER_TOKEN = 4
"""Of a body: what a prompt costs is guessed before it is tokenised."""

UNNAMED_MAX_TOKENS = 256
"""An answer that names no length is guessed to have so many tokens."""


@dataclass(frozen=True, slots=True)
class BacklogReport:
    """What one ingest says of its line at each beat.

    Attributes:
        num_waiting: choices that wait for a placement, and jobs that are not admitted or not read yet.
        oldest_wait_s: for which the first in line has waited.
        placed_per_s: placements while somebody always waited; None where nobody had to wait lately, so that nothing is
            known of how fast it can go.
    """

    num_waiting: int
    oldest_wait_s: float
    placed_per_s: float | None


class WaitingLine:
    """Counts who waits, and how fast they are placed while somebody always does."""

    def __init__(self, now_s: float) -> None:
        self.num_waiting = 0
        self._began_s = now_s
        self._num_placed = 0
        self._was_empty = True
        self._beats: deque[tuple[float, float, int]] = deque()
        """End, length and placements of each time between beats in which the line was never empty."""

    def join(self, num: int = 1) -> None:
        self.num_waiting += num

    def leave(self, num: int = 1) -> None:
        self.num_waiting -= num
        self._was_empty |= self.num_waiting == 0

    def place(self) -> None:
        """One leaves because there was room for it. If it was the last one, the limit that was measured is none any
        more: after an outage, for whose length nothing was placed, an empty line would look like a long wait."""
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
        return sum(num_placed for _, _, num_placed in self._beats) / total_s if total_s else None


def predicted_wait_s(backlogs: Collection[BacklogReport], num_accepted_since: float) -> float:
    """How long one more would wait for a placement.

    Where nobody waited lately, 0: nothing is known of the limit, and a report will tell as soon as it is reached. Where
    nothing is placed, at least as long as the first in line has waited already.

    Args:
        num_accepted_since: choices accepted, by all edges, that the reports do not count yet.
    """
    rates = [backlog.placed_per_s for backlog in backlogs if backlog.placed_per_s is not None]
    if not rates:
        return 0.0
    num_ahead = sum(backlog.num_waiting for backlog in backlogs) + num_accepted_since
    wait_s = num_ahead / max(sum(rates), 1 / RATE_WINDOW_S)
    return wait_s if sum(rates) else max(wait_s, *(backlog.oldest_wait_s for backlog in backlogs))


def max_wait_s(timeout_s: float, max_queue_s: float) -> float:
    """How long a request may wait for its placement: half of its time is for running."""
    return min(max_queue_s, timeout_s / 2)


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may; None: as much as it wants.

    Attributes:
        max_concurrent: requests that have not ended.
        requests_per_minute, tokens_per_minute: also how much may come at once after a quiet minute.
    """

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left of one limit.

    Attributes:
        limit: per minute.
        remaining: now, at least 0.
        reset_s: until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the limits say to a request.

    Attributes:
        refused_by: the limit that is reached ("concurrent", "requests", "tokens"), or None: a place is taken.
        retry_after_s: 0 for a place.
        budgets: by "requests" and "tokens", those that are limited.
    """

    refused_by: str | None
    retry_after_s: float
    budgets: Mapping[str, Budget]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that tell the client where it stands."""
        told: dict[str, str] = {}
        for name, budget in self.budgets.items():
            told[f"x-ratelimit-limit-{name}"] = str(budget.limit)
            told[f"x-ratelimit-remaining-{name}"] = str(budget.remaining)
            told[f"x-ratelimit-reset-{name}"] = f"{math.ceil(budget.reset_s * 1000)}ms"
        return told


def estimated_tokens(num_body_bytes: int, max_tokens: int | None, num_choices: int) -> int:
    """What a request will cost, as far as its body tells; corrected when it has ended."""
    answer = UNNAMED_MAX_TOKENS if max_tokens is None else max_tokens
    return -(-num_body_bytes // BYTES_PER_TOKEN) + answer * num_choices
