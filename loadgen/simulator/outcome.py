"""What a run comes to: latencies, how many requests kept the goals, what the caches saved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from loadgen.measure import percentile
from loadgen.simulator.job import Job
from loadgen.simulator.pages import PagePool, Watcher
from loadgen.simulator.policies import Goals
from loadgen.simulator.simulation import Finished
from loadgen.simulator.workload import Workload
from shared.blocks import PAGE_TOKENS, pages_for

PERCENTILES = (50, 90, 99)

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for a two-sided 95% interval, by degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run in numbers.

    Attributes:
        rate_per_s: at which requests came.
        attainment: share of all requests that kept both goals; one without an answer kept none.
        ttft_s, tpot_s: percentiles by PERCENTILES, over those that were answered.
        hit_rate: prompt tokens that were not computed, of all prompt tokens.
        num_local: prompts computed by decode workers.
        num_fetched_tokens: prompt tokens that came from peers or host memory.
        busy_prefill, busy_decode: share of the time that the workers computed.
    """

    num_requests: int
    rate_per_s: float
    attainment: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    hit_rate: float
    num_local: int
    num_fetched_tokens: int
    num_held_back: int
    num_preemptions: int
    num_refused: int
    busy_prefill: float
    busy_decode: float


def keeps(job: Job, goals: Goals) -> bool:
    """Whether a request was answered within both goals."""
    if job.ttft_s is None or job.last_token_s is None:
        return False
    return job.ttft_s <= goals.ttft_s and (job.tpot_s is None or job.tpot_s <= goals.tpot_s)


def outcome_of(finished: Finished, goals: Goals) -> Outcome:
    """The numbers of a run."""
    jobs = finished.jobs
    return Outcome(
        num_requests=len(jobs),
        rate_per_s=_rate([job.arrived_s for job in jobs]),
        attainment=sum(keeps(job, goals) for job in jobs) / len(jobs),
        ttft_s=_percentiles(job.ttft_s for job in jobs),
        tpot_s=_percentiles(job.tpot_s for job in jobs),
        hit_rate=sum(job.num_cached for job in jobs) / sum(job.row.num_input for job in jobs),
        num_local=sum(job.is_local for job in jobs),
        num_fetched_tokens=sum(job.num_fetched for job in jobs),
        num_held_back=finished.num_held_back,
        num_preemptions=sum(counts.num_preemptions for counts in finished.decode),
        num_refused=sum(job.refusal is not None for job in jobs),
        busy_prefill=fmean(counts.busy_s for counts in finished.prefill) / finished.duration_s,
        busy_decode=fmean(counts.busy_s for counts in finished.decode) / finished.duration_s,
    )


def lru_hit_rate(workload: Workload, num_pages: int, seed: int = 0) -> float:
    """What one LRU of so many pages would save if it had every prompt (and no answer) as soon as that came."""
    pool = PagePool(num_pages, workload.segment_pages, Watcher())
    times = workload.times(seed, speed=1.0)
    saved = 0
    for row in sorted(workload.rows, key=lambda row: times[row.index]):
        segments = row.prompt.segments
        found = pool.find(segments)
        saved += min(found.num_pages, (row.num_input - 1) // PAGE_TOKENS)
        num_new = pages_for(row.num_input) - found.num_pages
        if pool.fits(found, num_new):
            pinned = pool.acquire(segments, found, num_new)
            for segment in segments:
                pool.publish(pinned, segment)
            pool.release(pinned)
    return saved * PAGE_TOKENS / sum(row.num_input for row in workload.rows)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and half the width of its 95% interval (0 for one seed)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3g}±{self.half:.2g}" if self.half else f"{self.mean:.3g}"


def interval(values: Sequence[float]) -> Interval:
    """Of independent draws, by Student's t."""
    if len(values) < 2:
        return Interval(values[0], 0.0)
    t = T_95.get(len(values) - 1, 1.96)
    return Interval(fmean(values), t * stdev(values) / len(values) ** 0.5)


def _percentiles(values: Iterable[float | None]) -> tuple[float, ...]:
    ascending = sorted(value for value in values if value is not None)
    return tuple(percentile(ascending, percent) for percent in PERCENTILES) if ascending else ()


def _rate(times_s: Sequence[float]) -> float:
    span_s = max(times_s) - min(times_s)
    return (len(times_s) - 1) / span_s if span_s else 0.0
