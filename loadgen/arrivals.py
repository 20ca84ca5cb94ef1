"""When requests are sent. Every function is pure: its random numbers come from the generator it is given."""

from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate, pairwise
from math import log
from random import Random
from statistics import median


class Arrivals(StrEnum):
    """Where the times come from: the trace's own clock, or a rate."""

    TRACE = "trace"
    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"


def constant_times(num_requests: int, rate_per_s: float) -> list[float]:
    """Seconds of `num_requests` arrivals at equal distances, the first at 0."""
    return [i / rate_per_s for i in range(num_requests)]


def poisson_times(num_requests: int, rate_per_s: float, rng: Random) -> list[float]:
    """Seconds of arrivals with exponential gaps of mean 1 / rate."""
    return list(accumulate(-log(1 - rng.random()) / rate_per_s for _ in range(num_requests)))


def gamma_times(num_requests: int, rate_per_s: float, burstiness: float, rng: Random) -> list[float]:
    """Seconds of arrivals with gamma gaps of mean 1 / rate.

    `burstiness` is the shape: 1 is Poisson, below 1 comes in bursts, above 1 is more even.
    """
    scale_s = 1 / (rate_per_s * burstiness)
    return list(accumulate(rng.gammavariate(burstiness, scale_s) for _ in range(num_requests)))


def spread_ticks(times_s: Sequence[float], rng: Random) -> list[float]:
    """Spreads requests that a quantised trace clock put on one instant, keeping their order.

    Each tick's requests are drawn uniformly over the time to the next tick, but over no more than the usual (median)
    distance of two ticks, so that a pause after a tick stays a pause.
    """
    ticks = sorted(set(times_s))
    gaps = [later - earlier for earlier, later in pairwise(ticks)]
    if not gaps:
        return list(times_s)
    usual_s = median(gaps)
    width_s = {tick: min(gap, usual_s) for tick, gap in zip(ticks, [*gaps, usual_s], strict=True)}
    return sorted(at_s + rng.random() * width_s[at_s] for at_s in times_s)
