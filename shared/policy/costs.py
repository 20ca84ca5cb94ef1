"""What a placement is predicted to cost: its own times, and what it does to everybody else.

Times follow from measured speeds (`profile`). They become one number through the operator's two goals: a time is
counted in shares of its goal, and a goal that is likely missed as one share more, so

    loss(time) = time / goal + miss(time / goal)

and the cost of a placement is the loss of the request plus what it adds to the losses of others:

- the rows of the decode worker, each of whose steps reads its context too;
- the same rows once more, if the decode worker computes the prompt itself: steps with a chunk of it take longer;
- those who will wait for room in decode, for rows that are held up leave later;
- those who would have found the pages that go where pages are kept which another worker has already.

The sum times the goal for the first token is the cost in seconds. What a prefill costs those who come behind it is no
part: they go where the line is short by then, and a price on it was worth nothing on any trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, fsum, sqrt

from shared.policy.profile import LinkRate, SpeedProfile, num_pairs
from shared.policy.views import WorkerView

SPREAD_EXPONENT = 6.0
"""How sure a prediction is, as the shape of a log-logistic distribution of actual over predicted time (median 1):
pi / sqrt(3) / 6 = 0.3 is the standard deviation of its logarithm. In the simulator it was 0.21 to 0.39 (times to the
first token and between tokens, computed here or there; Mooncake and Azure conv near what eight workers bear)."""

USES_OF_A_PAGE = 1.0
"""How often a page that was found is found again before it goes; those of Mooncake's conversations are wanted twice
more, sooner or later. A second copy serves nobody whom the first would not, and takes the place of such a page."""

ROWS_SPREAD = 2.0
"""Standard deviation of the number of rows in square roots of it, counted in places of average size. Purely random
arrivals of requests of one size make it 1; of sizes as unequal as in Mooncake's trace 1.6, in a mix of traces 2.3."""

UNMEASURED = SpeedProfile(base_s=4.3e-3, row_s=1.0e-5, context_s=3.0e-8, token_s=2.16e-5, pair_s=1.0e-9)
"""Stands for a worker's speeds while no worker has measured any: an 8B model on an H200."""

UNMEASURED_LINK = LinkRate(latency_s=1e-3, bytes_per_s=25e9)
"""Stands for a link that has not been measured: a network of 200 Gbit/s."""

HOST_LINK = LinkRate(latency_s=2e-4, bytes_per_s=40e9)
"""From a worker's host memory to its GPU: what a PCIe 5 slot of 16 lanes gives."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way to place a request is predicted to take and to cost.

    Attributes:
        queue_s: until its prefill begins.
        fetch_s: until pages from elsewhere are there.
        compute_s: its uncached tokens.
        transfer_s: of its KV to the decode worker, as far as decode waits for it.
        tpot_s: each later token.
        own_s: cost of its own times.
        rows_s: cost to the decode worker's rows, of its row among them.
        stall_s: cost to these rows, and to those who wait for room there, of its prompt's chunks among them.
        copies_s: cost of keeping pages twice.
    """

    queue_s: float
    fetch_s: float
    compute_s: float
    transfer_s: float
    tpot_s: float
    own_s: float
    rows_s: float
    stall_s: float
    copies_s: float

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.queue_s + self.fetch_s + self.compute_s

    @property
    def cost_s(self) -> float:
        """What the decision makes smallest."""
        return self.own_s + self.rows_s + self.stall_s + self.copies_s


def loss(share: float) -> float:
    """Of a time predicted as `share` of its goal."""
    if share <= 0:
        return share
    odds_of_miss = share**SPREAD_EXPONENT
    return share + odds_of_miss / (1 + odds_of_miss)


def strain(share: float) -> float:
    """`loss` as it counts for others, on whom a placement puts more: from where it rises steepest it goes on as steep.

    Who is far beyond the goal now may come back as requests leave; a worker is never given up to those it has.
    """
    return loss(share) if share < STEEPEST else STEEPEST_LOSS + (share - STEEPEST) * STEEPEST_SLOPE


STEEPEST = ((SPREAD_EXPONENT - 1) / (SPREAD_EXPONENT + 1)) ** (1 / SPREAD_EXPONENT)
"""Share of the goal at which a miss grows likelier fastest, 0.95."""

STEEPEST_LOSS = loss(STEEPEST)
STEEPEST_SLOPE = 1 + (SPREAD_EXPONENT**2 - 1) / (4 * SPREAD_EXPONENT * STEEPEST)
"""Of `loss` there: the odds of a miss are (e - 1) / (e + 1) for the exponent e, so p (1 - p) is (e^2 - 1) / (4 e^2)."""


def prefill_s(profile: SpeedProfile, num_new: int, num_before: int, max_batch_tokens: int) -> float:
    """Time to compute `num_new` prompt tokens behind `num_before`, in chunks, alone.

    The sum of `SpeedProfile.prefill_s` over the chunks; pairs add up to those of one chunk.
    """
    if num_new <= max_batch_tokens:
        return profile.prefill_s(num_new, num_before)
    num_full, rest = divmod(num_new, max_batch_tokens)
    full_s = profile.tokens_s(max_batch_tokens)
    rest_s = profile.tokens_s(rest) if rest else 0.0
    return num_full * full_s + rest_s + profile.pair_s * num_pairs(num_new, num_before)


def local_chunk(max_batch_tokens: int, num_rows: int) -> int:
    """Prompt tokens that a decode worker computes in a step, beside its rows, which go first."""
    return max(max_batch_tokens - num_rows, 1)


def local_stall_s(profile: SpeedProfile, num_new: int, num_before: int, chunk: int) -> float:
    """By how much longer the steps with chunks of a prompt take than as many of the rows alone.

    Prompt tokens are free as long as they take no longer than the step reads weights anyway.
    """
    return prefill_s(profile, num_new, num_before, chunk) - -(-num_new // chunk) * profile.base_s


def transfer_s(link: LinkRate, num_bytes: int, num_last_bytes: int, before_last_s: float) -> float:
    """How long decode waits for KV after the prompt is computed.

    The pull runs beside the computation: left are the bytes of the last chunk, or more if the link is slower than
    the chunks before it, which took `before_last_s`.
    """
    return max(link.pull_s(min(num_last_bytes, num_bytes)), link.pull_s(num_bytes) - before_last_s)


def added_loss(num_rows: int, before: float, after: float) -> float:
    """Of so many rows whose time for a token was one share of its goal and becomes another."""
    return num_rows * (strain(after) - strain(before)) if num_rows and after > before else 0.0


def price_of_stall(decode: Sequence[WorkerView], num_pages: int, goal_s: float) -> float:
    """Loss that a second in which a decode worker's rows stand still causes to those who will wait for room.

    Its rows keep their places for a second longer. If all places are taken by then, for each of them somebody waits a
    second longer. How many will be taken in the time of an answer is now many give or take what random arrivals and
    ends change: without a limit their number would be Poisson distributed (the queue M/G/oo), so near to normal with
    a variance equal to its mean, and larger where requests differ in size and come in bursts. A place has as many
    pages as a row has on average, with the `num_pages` of the request that is placed as one.
    """
    if not decode:
        return 0.0
    num_rows = sum(worker.num_credits for worker in decode)
    place_pages = (sum(worker.num_credit_pages for worker in decode) + num_pages) / (num_rows + 1)
    num_free = 0.0
    for worker in decode:
        by_pages = (worker.num_pages - worker.num_credit_pages) / place_pages
        free = min(by_pages, worker.max_running - worker.num_credits)
        if free > 0:
            num_free += free
    spare = num_free / (ROWS_SPREAD * sqrt(max(num_rows, 1)))
    return num_rows / len(decode) * erfc(spare / sqrt(2)) / 2 / goal_s


def mean_profile(workers: Sequence[WorkerView], others: Sequence[WorkerView]) -> SpeedProfile:
    """What one is taken for that has not measured its speeds: the mean of those `workers` that have, in whatever order,
    or else of such `others`, of another role."""
    known = [worker.profile for worker in workers if worker.profile is not None]
    if not known:
        return mean_profile(others, ()) if others else UNMEASURED
    count = len(known)
    return SpeedProfile(
        base_s=fsum(profile.base_s for profile in known) / count,
        row_s=fsum(profile.row_s for profile in known) / count,
        context_s=fsum(profile.context_s for profile in known) / count,
        token_s=fsum(profile.token_s for profile in known) / count,
        pair_s=fsum(profile.pair_s for profile in known) / count,
        overlap=fsum(profile.overlap for profile in known) / count,
    )
