"""How long an answer will be: what answers like it were, counted as they end, and how sure that is.

For each (tenant, model, endpoint, prompt length) lengths are counted in bins that grow with the length, the newest
counting most. Few were seen of most of these, so each is drawn to what holds for the tenant at the endpoint, that to
the endpoint, that to all, and all to a guess made before anything was seen:

    geometric guess ─> all ─> model, endpoint ─> and tenant ─> and prompt length

A level that saw `n` answers counts as `n`, what stands before it as SHRINKAGE more. An answer that `max_tokens` cut
tells only that it would have been longer; so it is survival that is estimated, bin by bin, from those that came so far
(Kaplan and Meier 1958), with the level before as the prior (Susarla and Van Ryzin 1976). Where nothing was cut that is
the plain mixture of the counts.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import add
from typing import NamedTuple

GUESSED_MEAN_TOKENS = 256
"""Of all answers, before any was seen; their lengths are guessed to be geometric."""

MIN_SHRINKAGE = 4.0
SHRINKAGE = 12.0
"""What stands before a level counts as so many answers; the guess as MIN_SHRINKAGE."""

WINDOW = 500
"""An answer counts 1/e of a new one when so many have come behind it at its level."""

MAX_LEVELS = 4096
"""Kept at a time, of all kinds; each takes about 5 KiB. Those that saw nothing for longest go."""

RESERVE_QUANTILE = 0.75
"""Room is kept for an answer that three of four do not exceed. Pages are a worker's and not an answer's: the short ones
leave theirs to the long ones. Were lengths geometric, that many pages would hold 16 answers at their ends, all at once,
93 times of 100, and 64 answers 997 times of 1000; and most have not come to their ends yet. For single answers a higher
quantile would be surer, and leave pages empty all day; whoever finds none is computed again, which is counted."""

ALL: tuple[object, ...] = ()
"""The level of all answers."""

BINS_PER_OCTAVE = 8
MAX_LENGTH = 2**17
"""Longer answers count as this long."""


def _starts() -> list[int]:
    num_octaves = MAX_LENGTH.bit_length() - 1
    return sorted({int(2 ** (k / BINS_PER_OCTAVE)) for k in range(num_octaves * BINS_PER_OCTAVE + 1)})


STARTS = _starts()
"""The shortest length of each bin; the last bin has no end."""

NUM_BINS = len(STARTS)

WIDTHS = [after - start for start, after in pairwise(STARTS)]
"""Of all bins but the last."""

_REFRESH = 8
"""A level's survival is computed anew when this fraction of what it saw is new."""

_SETTLED = 16 * SHRINKAGE
"""A level that saw so many is computed anew for news of its own only: those before it count little."""

_RESCALE_AT = 1e9


class LengthKey(NamedTuple):
    """What is known of a request before it is answered.

    Attributes:
        endpoint: kinds of requests that differ in their answers: "chat", "completion".
    """

    tenant: str
    model: str
    endpoint: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """The length of one answer, in tokens, at most `max_new_tokens`.

    Attributes:
        survivals: the negated probability to reach each bin's start, from -1 on up.
        sums: of the probabilities to reach each length below the bin's start.
    """

    max_new_tokens: int
    survivals: "array[float]"
    sums: "array[float]"

    @property
    def mean(self) -> float:
        return self._sum(self.max_new_tokens)

    def survival(self, num_made: int) -> float:
        """Probability that the answer has more than `num_made` tokens."""
        return self._reach(num_made + 1) if num_made < self.max_new_tokens else 0.0

    def quantile(self, q: float) -> int:
        """The shortest length that the answer does not exceed with probability `q`, below 1."""
        return self._shortest(1.0 - q)

    def remaining(self, num_made: int, q: float) -> int:
        """The same for what is still to come of an answer that goes on behind `num_made` tokens."""
        return max(self._shortest((1.0 - q) * self._reach(num_made + 1)) - num_made, self._least(num_made))

    def mean_remaining(self, num_made: int) -> float:
        """Tokens that are still to come, on average, of an answer that goes on behind `num_made` tokens."""
        reach = self._reach(num_made + 1)
        if num_made >= self.max_new_tokens or reach <= 0.0:
            return float(self._least(num_made))
        return max((self._sum(self.max_new_tokens) - self._sum(num_made)) / reach, 1.0)

    def _least(self, num_made: int) -> int:
        return 1 if num_made < self.max_new_tokens else 0

    def _reach(self, length: int) -> float:
        """Probability of at least so many tokens, were there no limit."""
        index = bisect_right(STARTS, length) - 1
        if index < 0:
            return 1.0
        reach = -self.survivals[index]
        if index + 1 < NUM_BINS:
            part = (length - STARTS[index]) / (STARTS[index + 1] - STARTS[index])
            reach += part * (-self.survivals[index + 1] - reach)
        return reach

    def _shortest(self, tail: float) -> int:
        """The shortest length that is exceeded with probability `tail` at most."""
        index = bisect_left(self.survivals, -tail)
        if index >= NUM_BINS:
            return min(MAX_LENGTH, self.max_new_tokens)
        if index == 0:
            return min(1, self.max_new_tokens)
        above, below = -self.survivals[index - 1], -self.survivals[index]
        start, width = STARTS[index - 1], STARTS[index] - STARTS[index - 1]
        reached = start + width * (above - tail) / (above - below)
        return min(max(math.ceil(reached) - 1, 1), self.max_new_tokens)

    def _sum(self, length: int) -> float:
        """Sum of the probabilities to reach 1, 2, ... `length` tokens."""
        index = bisect_right(STARTS, length) - 1
        if index < 0:
            return 0.0
        if index + 1 >= NUM_BINS:
            return self.sums[-1]
        num = length - STARTS[index] + 1
        first = -self.survivals[index]
        slope = (-self.survivals[index + 1] - first) / (STARTS[index + 1] - STARTS[index])
        return self.sums[index] + num * first + slope * num * (num - 1) / 2


@dataclass(frozen=True, slots=True)
class Expected:
    """What is still to come of an answer.

    Attributes:
        new_tokens: on average.
        reserve_tokens: so many get room.
    """

    new_tokens: float
    reserve_tokens: int


def expect(prediction: Prediction, *, num_made: int = 0, at_least: int = 0) -> Expected:
    """What is to come of an answer that goes on behind `num_made` tokens and may not end before it has `at_least`."""
    sure = max(min(at_least, prediction.max_new_tokens) - 1, num_made)
    return Expected(
        sure - num_made + prediction.mean_remaining(sure),
        sure - num_made + prediction.remaining(sure, RESERVE_QUANTILE),
    )


class _Level:
    """Answers of one kind. Weights grow from answer to answer, so that the old ones count less."""

    __slots__ = ("built_of", "cuts", "ends", "exposed", "num_seen", "num_seen_built", "sums", "survivals", "weight")

    def __init__(self) -> None:
        self.ends = array("d", bytes(8 * NUM_BINS))
        self.cuts = array("d", bytes(8 * NUM_BINS))
        self.exposed = array("d", bytes(8 * NUM_BINS))
        """Of each bin, the part that answers cut within it had come through."""
        self.weight = 1.0
        self.num_seen = 0
        self.num_seen_built = -1
        self.built_of: array[float] | None = None
        self.survivals = array("d")
        self.sums = array("d")

    def add(self, num_tokens: int, *, is_cut: bool) -> None:
        index = bisect_right(STARTS, num_tokens) - 1
        self.num_seen += 1
        self.weight *= 1.0 + 1.0 / WINDOW
        if not is_cut:
            self.ends[index] += self.weight
        else:
            self.cuts[index] += self.weight
            if index + 1 < NUM_BINS:
                width = STARTS[index + 1] - STARTS[index]
                self.exposed[index] += self.weight * (num_tokens + 1 - STARTS[index]) / width
        if self.weight > _RESCALE_AT:
            self._rescale()

    def _rescale(self) -> None:
        for counts in (self.ends, self.cuts, self.exposed):
            for index, count in enumerate(counts):
                counts[index] = count / self.weight
        self.weight = 1.0

    def is_stale(self, before: "array[float]") -> bool:
        if self.built_of is not before and self.num_seen < _SETTLED:
            return True
        return self.num_seen - self.num_seen_built > min(self.num_seen_built, WINDOW) / _REFRESH

    def build(self, before: "array[float]", shrinkage: float) -> None:
        """Compute survival, with that of the level before as the prior."""
        survivals, sums = [-1.0], [0.0]
        prior = shrinkage * self.weight
        ends = self.ends.tolist()
        # Those that came to a bin's end, from the last bin on: summed so, nobody is 0 and not a rounding error.
        behind = list(accumulate(map(add, reversed(ends), reversed(self.cuts)), initial=0.0))
        survival, below, reached = 1.0, 0.0, prior
        steps = zip(ends, self.exposed, reversed(behind[1:-1]), before[1:], WIDTHS, strict=False)
        for ends_here, exposed, behind_here, before_next, width in steps:
            goes_on = -prior * before_next
            at_risk = behind_here + ends_here + exposed + reached
            after = survival * (1.0 - (ends_here + reached - goes_on) / at_risk) if at_risk > 0.0 else 0.0
            below += width * survival + (after - survival) * (width - 1) / 2
            survivals.append(-after)
            sums.append(below)
            survival, reached = after, goes_on
        self.survivals, self.sums = array("d", survivals), array("d", sums)
        self.num_seen_built, self.built_of = self.num_seen, before


def _geometric() -> "array[float]":
    ends = 1.0 / GUESSED_MEAN_TOKENS
    return array("d", (-((1.0 - ends) ** (start - 1)) for start in STARTS))


class LengthPredictor:
    """Learns from answers that ended. One process's; not thread-safe."""

    def __init__(self) -> None:
        self._guess = _Level()
        self._guess.build(_geometric(), 1.0)
        self._levels: dict[tuple[object, ...], _Level] = {}

    @property
    def num_levels(self) -> int:
        return len(self._levels)

    def observe(self, key: LengthKey, num_tokens: int, *, is_cut: bool) -> None:
        """An answer had so many tokens; `is_cut`: it would have had more without `max_tokens`."""
        num_tokens = min(max(num_tokens, 1), MAX_LENGTH)
        for name in _names(key):
            self._level(name).add(num_tokens, is_cut=is_cut)

    def predict(self, key: LengthKey, max_new_tokens: int) -> Prediction:
        """The length of an answer of at most `max_new_tokens`, by all that was seen so far, or nearly all."""
        return self._predict(_names(key), max_new_tokens)

    def usual_tokens(self) -> float:
        """Of answers on average, whoever's."""
        return self._predict((ALL,), MAX_LENGTH).mean_remaining(0)

    def _predict(self, names: tuple[tuple[object, ...], ...], max_new_tokens: int) -> Prediction:
        found, shrinkage = self._guess, MIN_SHRINKAGE
        for name in reversed(names):
            level = self._levels.get(name)
            if level is None:
                break
            if level.is_stale(found.survivals):
                level.build(found.survivals, shrinkage)
            found, shrinkage = level, SHRINKAGE
        return Prediction(max_new_tokens, found.survivals, found.sums)

    def _level(self, name: tuple[object, ...]) -> _Level:
        """As the one used last; the one not used for longest goes if there are too many."""
        level = self._levels.pop(name, None)
        if level is None:
            level = _Level()
            if len(self._levels) >= MAX_LEVELS:
                del self._levels[next(iter(self._levels))]
        self._levels[name] = level
        return level


def _names(key: LengthKey) -> tuple[tuple[object, ...], ...]:
    """The levels of a key, the narrowest first: so a wider one is always used later, and goes later.

    Prompts are told apart by half an octave of their length.
    """
    tenant, model, endpoint, num_prompt_tokens = key
    return (
        (model, endpoint, tenant, (num_prompt_tokens**2).bit_length()),
        (model, endpoint, tenant),
        (model, endpoint),
        ALL,
    )
