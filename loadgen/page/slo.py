"""How many requests were good, at the limits that were given and at others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10

from loadgen.measure import Record, Slo, percentile

STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
MAX_LIMITS = 7


@dataclass(frozen=True, slots=True)
class SloGrid:
    """Share of all rows that meet a TTFT and a TPOT limit together; a given E2E limit holds everywhere.

    Attributes:
        ttft_limits_ms, tpot_limits_ms: ascending; the last, None, is no limit.
        shares: one tuple for each TPOT limit, one share for each TTFT limit in it.
        given: the pair of limits that was given (either may be None), or None if neither was.
    """

    ttft_limits_ms: tuple[float | None, ...]
    tpot_limits_ms: tuple[float | None, ...]
    shares: tuple[tuple[float, ...], ...]
    given: tuple[float | None, float | None] | None


def slo_grid_of(records: Sequence[Record], slo: Slo) -> SloGrid | None:
    """None if no request completed: there is no attainment to speak of."""
    others = replace(slo, ttft_ms=None, tpot_ms=None)
    done = [record for record in records if record.completed and not others.missed(record)]
    if not any(record.completed for record in records):
        return None
    ttft_limits = limits_ms([record.ttft_s for record in done], slo.ttft_ms)
    tpot_limits = limits_ms([record.tpot_s for record in done], slo.tpot_ms)
    shares = tuple(
        tuple(_share(records, done, Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms)) for ttft_ms in ttft_limits)
        for tpot_ms in tpot_limits
    )
    given = None if slo.ttft_ms is None and slo.tpot_ms is None else (slo.ttft_ms, slo.tpot_ms)
    return SloGrid(ttft_limits, tpot_limits, shares, given)


def limits_ms(values_s: Sequence[float | None], given_ms: float | None) -> tuple[float | None, ...]:
    """Round limits from below most of the values to above the largest, the given one among them, and None."""
    ascending = sorted(value * 1e3 for value in values_s if value is not None and value > 0)
    limits = set[float]()
    if ascending:
        lowest, highest = percentile(ascending, 10), ascending[-1]
        powers = range(floor(log10(lowest)) - 1, ceil(log10(highest)) + 2)
        round_limits = [float(f"{step}e{power}") for power in powers for step in STEPS]
        below = max(limit for limit in round_limits if limit <= lowest)
        above = min(limit for limit in round_limits if limit >= highest)
        between = [limit for limit in round_limits if below <= limit <= above]
        stride = max(1, ceil((len(between) - 1) / (MAX_LIMITS - 1)))
        limits.update(between[::-1][::stride])
    if given_ms is not None:
        limits.add(given_ms)
    return (*sorted(limits), None)


def _share(records: Sequence[Record], done: Sequence[Record], slo: Slo) -> float:
    return sum(not slo.missed(record) for record in done) / len(records)
