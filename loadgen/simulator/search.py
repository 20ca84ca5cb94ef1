"""How much load a system bears: the fastest clock of a trace at which enough requests keep the goals."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

MAX_PROBES = 14
WIDTH = 1.02
"""The bracket is narrow enough when its ends are so far apart, as a factor."""

STEP = 1.4
"""From one speed to the next, until the share is crossed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one speed."""

    speed: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Found:
    """Where attainment falls through the wanted share.

    Attributes:
        speed: between the two nearest probes, by a straight line.
        probes: in the order in which they were made.
        is_bracketed: False: the share was never crossed, so `speed` is only the end of what was tried.
    """

    speed: float
    probes: tuple[Probe, ...]
    is_bracketed: bool


def find_speed(attainment_at: Callable[[float], float], wanted: float, first: float, step: float = STEP) -> Found:
    """The speed at which attainment is `wanted`: steps until it is crossed, then the crossing is closed in on.

    Attainment is taken to fall with speed; where noise makes it rise, one of its crossings is found.

    Args:
        first: the first speed to try.
        step: from one to the next, until the share is crossed.
    """
    probes: list[Probe] = []

    def probe(speed: float) -> Probe:
        made = Probe(speed, attainment_at(speed))
        probes.append(made)
        return made

    good: Probe | None = None
    bad: Probe | None = None
    speed = first
    while len(probes) < MAX_PROBES and (good is None or bad is None):
        made = probe(speed)
        if made.attainment >= wanted:
            good = made
            speed *= step
        else:
            bad = made
            speed /= step
    if good is None or bad is None:
        return Found(probes[-1].speed, tuple(probes), is_bracketed=False)
    while len(probes) < MAX_PROBES and bad.speed / good.speed > WIDTH:
        made = probe(_between(good, bad, wanted))
        if made.attainment >= wanted:
            good = made
        else:
            bad = made
    return Found(_crossing(good, bad, wanted), tuple(probes), is_bracketed=True)


def _crossing(good: Probe, bad: Probe, wanted: float) -> float:
    part = (good.attainment - wanted) / (good.attainment - bad.attainment)
    return exp(log(good.speed) + part * (log(bad.speed) - log(good.speed)))


def _between(good: Probe, bad: Probe, wanted: float) -> float:
    """Where the line crosses, a little towards the middle, so that both ends come nearer."""
    part = (good.attainment - wanted) / (good.attainment - bad.attainment)
    part = 0.5 + 0.8 * (part - 0.5)
    return exp(log(good.speed) + part * (log(bad.speed) - log(good.speed)))
