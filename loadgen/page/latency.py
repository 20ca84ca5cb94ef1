"""How latencies are distributed, and what the hand-off from prefill to decode costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log10
from statistics import median

from loadgen.measure import QUANTITIES, Record, Slo, Summary, summarise
from shared.request import Event

CURVE_POINTS = 200
"""A curve through more values than this shows so many of them, most of them in the tail."""

MAX_POSITIONS = 32
"""Gaps are told apart by their place in the answer up to this one."""

DEFINITIONS = {
    "ttft": "from the intended time to the first token",
    "tpot": "mean gap of one answer",
    "itl": "every gap between two pieces, all answers together",
    "e2el": "from the intended time to the last token",
    "handoff": "from token 1, made by prefill, to token 2, made by decode",
}
"""What has a curve of its own, in words."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The values of one quantity.

    Attributes:
        summary: in seconds; None if nothing was measured.
        max_s: the largest, 0 if nothing was measured.
        points: (seconds, share of values below), ascending.
        limit_s: what was asked for, if anything was.
    """

    name: str
    summary: Summary | None
    max_s: float
    points: tuple[tuple[float, float], ...]
    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class GapAt:
    """The gaps between token `place` and the next, over all answers, in seconds."""

    place: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class HandOff:
    """The gap between token 1 and 2 beside the later ones.

    Attributes:
        first, later: the gap behind token 1; all later gaps.
        places: gaps by their place.
        extra: by request, the first gap less the median of its later ones: what disaggregation costs it.
        handing_on, rest: until token 1 has reached the decode worker, and from there to token 2 (what is left of the
            KV arrives, a batch runs), by the server's stamps.
    """

    first: Distribution
    later: Distribution
    places: tuple[GapAt, ...]
    extra: Summary | None
    handing_on: Summary | None
    rest: Summary | None


def distributions_of(records: Iterable[Record], slo: Slo) -> dict[str, Distribution]:
    """All of `QUANTITIES` over the completed requests, and `lateness` over all sends."""
    everything = list(records)
    done = [record for record in everything if record.completed]
    limits_ms = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2el": slo.e2el_ms}
    found = {
        name: distribution(name, (value for record in done for value in values(record)), limits_ms.get(name))
        for name, values in QUANTITIES.items()
    }
    return found | {"lateness": distribution("lateness", (record.lateness_s for record in everything))}


def distribution(name: str, values_s: Iterable[float | None], limit_ms: float | None = None) -> Distribution:
    """Of all values that are not None."""
    known = sorted(value for value in values_s if value is not None)
    return Distribution(
        name=name,
        summary=summarise(known),
        max_s=known[-1] if known else 0.0,
        points=curve(known),
        limit_s=None if limit_ms is None else limit_ms / 1e3,
    )


def curve(ascending: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(value, share of values below it); value i of n stands at (i + 1/2) / n, so that the largest is on a log tail.

    Above `CURVE_POINTS` values those are kept that lie evenly on a scale where each step takes a tenth of the rest.
    """
    count = len(ascending)
    if count <= CURVE_POINTS:
        places = list(range(count))
    else:
        deepest = log10(2 * count)
        shares = [1 - 10 ** (-deepest * step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS)]
        places = sorted({min(count - 1, int(share * count)) for share in shares})
    return tuple((ascending[place], (place + 0.5) / count) for place in places)


def hand_off_of(records: Iterable[Record]) -> HandOff:
    """Of the completed requests with two tokens or more whose pieces were seen."""
    done = [record for record in records if record.completed]
    streamed = [record for record in done if record.gaps_s]
    by_place = [
        summarise(record.gaps_s[place] for record in streamed if len(record.gaps_s) > place)
        for place in range(MAX_POSITIONS)
    ]
    return HandOff(
        first=distribution("handoff", (record.handoff_s for record in streamed)),
        later=distribution("later", (gap for record in streamed for gap in record.gaps_s[1:])),
        places=tuple(GapAt(place, summary) for place, summary in enumerate(by_place, start=1) if summary is not None),
        extra=summarise(r.gaps_s[0] - median(r.gaps_s[1:]) for r in streamed if len(r.gaps_s) > 1),
        handing_on=summarise(_between(record, Event.FIRST_TOKEN, Event.TRANSFERRING) for record in done),
        rest=summarise(_between(record, Event.TRANSFERRING, Event.DECODING) for record in done),
    )


def _between(record: Record, earlier: Event, later: Event) -> float | None:
    stamps = record.stamps
    return stamps[later] - stamps[earlier] if earlier in stamps and later in stamps else None
