"""Learns a worker's speeds from the steps that it runs.

Steps of like size share a bin (sizes within a factor of two), which keeps the newest few. A fit weighs bins, not steps:
an hour under one load does not wipe out what is known of others, without which the five speeds could not be told
apart. Against what does not belong to a step's work (a process that stood still, a clock that was set) each bin drops
its fastest and slowest quarter, and bins that the others contradict lose weight (Cauchy's weights, by iteration).

The fit is a least-squares one of relative errors, with no speed below zero (Lawson and Hanson's active set). Where the
device computes while it reads weights, steps with few prompt tokens are bound by the reading, others by computing: from
how many tokens on is tried out. That it does one after the other is believed if the steps are far closer to that. What
no step tells of stays as it was.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median

from shared.policy.profile import SpeedProfile, StepWork

KEPT_STEPS = 12
"""Of each bin; the middle half of them count."""

MAX_BINS = 48
"""With prompt tokens, and as many without. Sizes that no step had for the longest time are forgotten beyond these."""

MIN_STEPS = 8
"""Before as many have run nothing is told: the first ones pay for what happens once."""

MIN_BIN_STEPS = 3
"""Of two steps nobody can tell which one is odd: their bin does not count yet."""

HALF_WEIGHT_STEPS = 4096
"""A bin that got none of so many steps counts half."""

MIN_WEIGHT = 0.02
"""Of a bin however old: it may be the only one of its size."""

MIN_SCATTER = 0.02
"""Relative error that is nothing unusual, however well all bins agree."""

INERTIA = 1e-4
"""How strongly a speed stays as it was, against all bins: only where those say next to nothing of it."""

NUM_ROUNDS = 3
"""Of a fit: each weighs bins by the errors that the one before left."""

NUM_SPEEDS = 5

KNEES = tuple(2.0**power for power in range(3, 14))
"""Numbers of prompt tokens that are tried as the one from which on computing takes longer than reading the weights."""

APART = 0.7
"""Reading and computing are taken for one after the other if that leaves errors so much smaller, as a factor."""

MIN_SIZES_APART = 3
"""Of prompts, to tell that: any two sizes can be explained both ways."""

MIN_REACH = 128
"""Positions that a step's prompt tokens attend to, in the mean: what attention takes of fewer drowns in what else
varies, and would be multiplied by thousands for a long prompt."""

Size = tuple[int, int, int, int]
Vector = list[float]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What a step computed, and how long it took."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True)
class _Mean:
    """What the middle steps of a bin have in common: sizes as in `StepWork`, and seconds."""

    num_rows: float
    num_context_tokens: float
    num_prompt_tokens: float
    num_pairs: float
    seconds: float
    num_steps: int

    @property
    def tells_of_pairs(self) -> bool:
        return self.num_pairs > MIN_REACH * self.num_prompt_tokens

    def speeds_used(self, knee: float | None, *, with_pairs: bool) -> Vector:
        """How often each of the five speeds is in the step, if more prompt tokens than `knee` take longer than reading
        the weights; None: if all are computed behind that."""
        computes = knee is None or self.num_prompt_tokens > knee
        reads = knee is None or not computes
        return [
            1.0 if reads else 0.0,
            self.num_rows,
            self.num_context_tokens,
            self.num_prompt_tokens if computes else 0.0,
            self.num_pairs if with_pairs else 0.0,
        ]


@dataclass(slots=True)
class _Bin:
    steps: deque[tuple[StepWork, float]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    newest: int = 0
    mean: _Mean | None = None

    def add(self, work: StepWork, seconds: float, number: int) -> None:
        self.steps.append((work, seconds))
        self.newest = number
        self.mean = None

    def settle(self, profile: SpeedProfile | None) -> _Mean:
        """The mean of the middle half, by how long each took against what was expected of it."""
        if self.mean is None:
            self.mean = _mean_of(self._middle(profile))
        return self.mean

    def _middle(self, profile: SpeedProfile | None) -> list[tuple[StepWork, float]]:
        ordered = sorted(self.steps, key=lambda step: step[1] / _expected_s(step[0], profile))
        dropped = (len(ordered) + 1) // 4
        return ordered[dropped : len(ordered) - dropped]


class ProfileFit:
    """See the module. Not thread-safe."""

    def __init__(self) -> None:
        self._bins = {with_prompt: OrderedDict[Size, _Bin]() for with_prompt in (False, True)}
        self._num_steps = 0
        self._num_told = 0
        self._profile: SpeedProfile | None = None
        self._scatter = 0.0

    @property
    def scatter(self) -> float:
        """How far, as a share, the middle one of the bins is from the profile last told; 0 before."""
        return self._scatter

    def add(self, work: StepWork, seconds: float) -> None:
        """A step has done `work` in `seconds`. One that did nothing, or took no time, tells nothing."""
        if seconds <= 0 or work == StepWork():
            return
        self._num_steps += 1
        size, bins = _size(work), self._bins[work.num_prompt_tokens > 0]
        steps = bins.setdefault(size, _Bin())
        bins.move_to_end(size)
        if len(bins) > MAX_BINS:
            bins.popitem(last=False)
        steps.add(work, seconds, self._num_steps)

    def profile(self) -> SpeedProfile | None:
        """The speeds by all that was added; None before `MIN_STEPS` steps and some prompts of like size."""
        if self._num_told == self._num_steps or self._num_steps < MIN_STEPS:
            return self._profile
        counting = {
            with_prompt: [each for each in bins.values() if len(each.steps) >= MIN_BIN_STEPS]
            for with_prompt, bins in self._bins.items()
        }
        if not counting[True]:  # without any, prompts would seem to cost nothing
            return self._profile
        bins = counting[False] + counting[True]
        means = [each.settle(self._profile) for each in bins]
        ages = (self._num_steps - each.newest for each in bins)
        weights = [
            max(MIN_WEIGHT, 0.5 ** (age / HALF_WEIGHT_STEPS)) * mean.num_steps / (mean.num_steps + 2)
            for age, mean in zip(ages, means, strict=True)
        ]
        self._num_told = self._num_steps
        self._profile, self._scatter = _fit(means, weights, self._profile)
        prompts = [mean.num_prompt_tokens for mean in means if mean.num_prompt_tokens]
        if not counting[False] and not self._profile.base_s:
            # Long prompts alone do not tell how long reading the weights takes; as nothing, tokens would cost nothing.
            self._profile = replace(self._profile, base_s=self._profile.token_s * min(prompts))
        elif not self._profile.token_s:
            # Nor do short ones what a long one takes: at most, with the longest so far, as long as that reading.
            self._profile = replace(self._profile, token_s=self._profile.base_s / max(prompts))
        return self._profile


def _size(work: StepWork) -> Size:
    """Names the bin: by powers of two, or of four in what matters less beside prompt tokens."""
    rows, context = work.num_rows.bit_length(), work.num_context_tokens.bit_length()
    if not work.num_prompt_tokens:
        return rows, context, 0, 0
    reach = (work.num_pairs // work.num_prompt_tokens).bit_length()
    return rows // 2, 0, work.num_prompt_tokens.bit_length(), reach // 2


def _expected_s(work: StepWork, profile: SpeedProfile | None) -> float:
    return (profile.step_s(work) if profile is not None else 0.0) or 1.0


def _mean_of(steps: Sequence[tuple[StepWork, float]]) -> _Mean:
    count = len(steps)
    return _Mean(
        sum(work.num_rows for work, _ in steps) / count,
        sum(work.num_context_tokens for work, _ in steps) / count,
        sum(work.num_prompt_tokens for work, _ in steps) / count,
        sum(work.num_pairs for work, _ in steps) / count,
        sum(seconds for _, seconds in steps) / count,
        count,
    )


def _fit(means: Sequence[_Mean], weights: Sequence[float], before: SpeedProfile | None) -> tuple[SpeedProfile, float]:
    """The speeds that explain the means best, and the median of what they leave unexplained, as a share."""
    prior = [0.0] * NUM_SPEEDS
    if before is not None:
        prior = [before.base_s, before.row_s, before.context_s, before.token_s, before.pair_s]
    meanwhile, errors = _fit_form(means, weights, prior, _knees(before))
    if sum(mean.num_prompt_tokens > 0 for mean in means) < MIN_SIZES_APART:
        return SpeedProfile(*meanwhile), median(errors)
    apart, errors_apart = _fit_form(means, weights, prior, (None,))
    # Of decode rows alone both say the same.
    with_prompt = [weight if mean.num_prompt_tokens else 0.0 for weight, mean in zip(weights, means, strict=True)]
    if _dot(with_prompt, errors_apart) < APART * _dot(with_prompt, errors):
        return SpeedProfile(*apart, overlap=0.0), median(errors_apart)
    return SpeedProfile(*meanwhile), median(errors)


def _fit_form(
    means: Sequence[_Mean], weights: Sequence[float], prior: Vector, knees: Sequence[float | None]
) -> tuple[Vector, Vector]:
    """The speeds of the best of these knees, and what they leave of each mean."""
    seconds = [mean.seconds for mean in means]
    with_pairs = any(mean.tells_of_pairs for mean in means)
    overlap = 0.0 if knees[0] is None else 1.0
    trust = [1.0] * len(means)
    speeds, errors = prior, [0.0]
    for _ in range(NUM_ROUNDS):
        scaled = [weight * each for weight, each in zip(weights, trust, strict=True)]
        tried = [
            _solve([mean.speeds_used(knee, with_pairs=with_pairs) for mean in means], seconds, scaled, prior)
            for knee in knees
        ]
        left = [_errors(SpeedProfile(*each, overlap=overlap), means) for each in tried]
        losses = [sum(weight * error**2 for weight, error in zip(scaled, each, strict=True)) for each in left]
        best = losses.index(min(losses))
        speeds, errors, knees = tried[best], left[best], knees[max(best - 1, 0) : best + 2]
        width = 3 * max(median(errors), MIN_SCATTER)
        trust = [1 / (1 + (error / width) ** 2) for error in errors]
    return speeds, errors


def _knees(before: SpeedProfile | None) -> Sequence[float]:
    """Numbers of prompt tokens from which on a step may be bound by computing."""
    if before is None or not before.base_s or not before.token_s or not before.overlap:
        return KNEES
    knee = before.base_s / before.token_s
    return (0.7 * knee, knee, 1.4 * knee)


def _errors(profile: SpeedProfile, means: Sequence[_Mean]) -> Vector:
    """How far each mean is from what the speeds say, as a share of it."""
    return [
        abs(
            profile.tokens_s(mean.num_prompt_tokens)
            + profile.pair_s * mean.num_pairs
            + profile.row_s * mean.num_rows
            + profile.context_s * mean.num_context_tokens
            - mean.seconds
        )
        / mean.seconds
        for mean in means
    ]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _solve(rows: Sequence[Vector], seconds: Sequence[float], weights: Sequence[float], prior: Vector) -> Vector:
    """The speeds, none below 0, of the least weighted squares of relative errors; near `prior` where rows tell nothing.

    Speeds are of very different sizes: each is solved for in units in which all rows together use it once.
    """
    gram = [[0.0] * NUM_SPEEDS for _ in range(NUM_SPEEDS)]
    right = [0.0] * NUM_SPEEDS
    for row, took_s, weight in zip(rows, seconds, weights, strict=True):
        relative = weight / took_s**2
        for i in range(NUM_SPEEDS):
            part = relative * row[i]
            if part:
                right[i] += part * took_s
                for j in range(NUM_SPEEDS):
                    gram[i][j] += part * row[j]
    units = [gram[i][i] ** 0.5 or 1.0 for i in range(NUM_SPEEDS)]
    for i in range(NUM_SPEEDS):
        right[i] = right[i] / units[i] + INERTIA * prior[i] * units[i]
        for j in range(NUM_SPEEDS):
            gram[i][j] /= units[i] * units[j]
        gram[i][i] += INERTIA
    return [speed / unit for speed, unit in zip(_solve_above_zero(gram, right), units, strict=True)]


def _solve_above_zero(gram: Sequence[Vector], right: Vector) -> Vector:
    """Lawson and Hanson's active set: the least of x'Gx/2 - r'x with no x below 0, for a G that has an inverse."""
    count = len(right)
    free: list[int] = []
    found = [0.0] * count
    for _ in range(3 * count):
        slopes = [right[i] - _dot(gram[i], found) for i in range(count)]
        held = [i for i in range(count) if i not in free and slopes[i] > 1e-12]
        if not held:
            break
        free.append(max(held, key=lambda i: slopes[i]))
        while True:
            wanted = _solve_free(gram, right, free)
            if all(wanted[i] > 0 for i in free):
                found = wanted
                break
            share = min(found[i] / (found[i] - wanted[i]) for i in free if wanted[i] <= 0)
            found = [old + share * (new - old) for old, new in zip(found, wanted, strict=True)]
            free = [i for i in free if found[i] > 1e-15]
            found = [value if i in free else 0.0 for i, value in enumerate(found)]
    return found


def _solve_free(gram: Sequence[Vector], right: Vector, free: Sequence[int]) -> Vector:
    """Gauss's elimination over the `free` unknowns; the others are 0. The diagonal is the largest: no pivots."""
    rows = [[gram[i][j] for j in free] + [right[i]] for i in free]
    count = len(free)
    for k in range(count):
        for row in islice(rows, k + 1, None):
            factor = row[k] / rows[k][k]
            for j in range(k, count + 1):
                row[j] -= factor * rows[k][j]
    solved = [0.0] * count
    for k in reversed(range(count)):
        known = sum(rows[k][j] * solved[j] for j in range(k + 1, count))
        solved[k] = (rows[k][count] - known) / rows[k][k]
    found = [0.0] * len(right)
    for i, value in zip(free, solved, strict=True):
        found[i] = value
    return found
