"""How long requests that a fault met stood still: from the fault to the next token that the fold accepted (or the end).

Whom a fault met: of a worker, the choices that needed it then; of ingest, those without an open placement; of Redis or
a broker, all that ran; of an edge, the clients that it was answering, whose next event counts.
"""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

from tests.faults.cluster.faults import LEASE_S, Kind

GOAL_SLACK_S = 1.0

ALONE_BEFORE_S = 5.0
"""A recovery is one fault's own if no other that could matter to it was on from so long before it to the recovery."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One choice, or client, that one fault met.

    Attributes:
        took_s: None if nothing came after it.
        prefill_s: of the placement that went on, from its open to the first token.
        is_alone: no other fault had a part in it.
    """

    fault: object
    role: str
    took_s: float | None
    prefill_s: float = 0.0
    is_alone: bool = True

    @property
    def within_goal(self):
        return self.took_s is not None and self.took_s <= LEASE_S + GOAL_SLACK_S + self.prefill_s


def recoveries(faults, stories, captures, cluster):
    """Of every fault; `stories` as `tests.faults.history.read_stories` gives them."""
    found = []
    for fault in faults:
        seat = cluster.seats.get(fault.target)
        role = seat.role if seat else ""
        met = _clients(fault, captures, seat.url) if role == "edge" else _choices(fault, stories, role)
        for took_s, prefill_s, workers in met:
            recovered_s = fault.at_s + (took_s or 0.0)
            alone = not any(
                other is not fault
                and other.at_s < recovered_s
                and (other.until_s or other.at_s) > fault.at_s - ALONE_BEFORE_S
                and _matters(other, workers, cluster)
                for other in faults
            )
            found.append(Recovery(fault, role, took_s, prefill_s, alone))
    return found


def _matters(other, workers, cluster):
    """Whether it could touch a request that ran on these workers: another worker's misfortune could not."""
    seat = cluster.seats.get(other.target)
    return seat is None or seat.role in {"edge", "ingest"} or other.incarnation in workers


def _choices(fault, stories, role):
    at_s = fault.at_s
    for story in stories.values():
        if story.state.view is None or not story.state.first_timestamp_s <= at_s < (story.finished_s or float("inf")):
            continue
        for choice in story.choices.values():
            placed = next((each for each in choice.placed if each.from_s <= at_s < each.until_s), None)
            has_ended = bool(choice.placed) and at_s >= choice.placed[-1].until_s and not choice.placed[-1].was_cut
            if not choice.placed or has_ended:
                continue
            if role == "ingest" and placed is not None:
                continue
            if role in {"prefill", "decode"} and (placed is None or not placed.needed(fault.incarnation, at_s)):
                continue
            # What the lost worker had on its way when it was hit is no recovery.
            after_s = placed.until_s if placed is not None and placed.lost == fault.incarnation else at_s
            yield _went_on(choice, story, at_s, after_s)


def _went_on(choice, story, at_s, after_s):
    """How long until it went on behind `after_s`, how much of that was the prefill of a new placement, and all its
    workers."""
    workers = {worker.incarnation for placed in choice.placed for worker in (placed.open.prefill, placed.open.decode)}
    index = bisect_right(choice.grown, after_s, key=lambda growth: growth.at_s)
    ends = [] if story.finished_s is None else [story.finished_s]
    then_s = min(chain((growth.at_s for growth in choice.grown[index : index + 1]), ends), default=None)
    if then_s is None:
        return None, 0.0, workers
    new = [each for each in choice.placed if at_s < each.from_s <= then_s]
    return then_s - at_s, then_s - new[-1].from_s if new else 0.0, workers


def _clients(fault, captures, url):
    for capture in captures:
        was_there = any(
            attempt.edge == url
            and attempt.what in {"post", "resume"}
            and attempt.at_s <= fault.at_s < (attempt.until_s or float("inf"))
            for attempt in capture.attempts
        )
        if was_there:
            after = (event.at_s for event in capture.events if event.at_s > fault.at_s)
            then_s = min(chain(after, () if capture.ended_s is None else (capture.ended_s,)), default=None)
            yield (None if then_s is None else then_s - fault.at_s), 0.0, frozenset()


def quantile(values, share):
    """By nearest rank; None of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None


def summary(found):
    """By kind and role: how many were met, and p50, p99 and max of their recovery in seconds."""
    groups = defaultdict(list)
    for recovery in found:
        groups[f"{recovery.fault.kind} {recovery.role}".strip()].append(recovery)
    return {name: _row(group) for name, group in sorted(groups.items())}


def _row(group):
    took = [each.took_s for each in group if each.took_s is not None]
    row = {
        "met": len(group),
        "never": len(group) - len(took),
        "p50_s": quantile(took, 0.5),
        "p99_s": quantile(took, 0.99),
        "max_s": max(took, default=None),
    }
    alone = [each for each in group if each.is_alone]
    alone_s = [each.took_s for each in alone if each.took_s is not None]
    row["alone"] = {"met": len(alone), "p50_s": quantile(alone_s, 0.5), "p99_s": quantile(alone_s, 0.99)}
    if group[0].role == "decode" and group[0].fault.kind is Kind.KILL:
        row["within_goal"] = sum(each.within_goal for each in group)
        row["alone"]["within_goal"] = sum(each.within_goal for each in alone)
    return row
