"""Which requests come when. Rates follow from what the bare engine does, so both sides get the same loads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from loadgen.arrivals import poisson_times
from loadgen.jobs import COMPLETIONS, Job, JobMaker, RequestShape
from loadgen.prompts import IdPrompts, load_tokenizer, vocabulary_of
from loadgen.schedule import ScheduledRow
from shared.blocks import pages_for
from shared.errors import StartupError

HALF = "half"
"""Names the load at half the rate at which the bare engine saturates."""

FULL = "full"
"""Names the load that keeps as many requests in flight as the engine runs at once."""

RAMP_SHARE = 1.2
MIN_RAMP_S = 1.0
"""A load runs for this many mean durations of a request, or so long, before and after the part that is measured."""

PAUSE_S = 0.05
"""Pause of a lone stream between two requests, so that a first token does not wait for its predecessor's last work."""

REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What both sides have in common.

    Attributes:
        device: "cpu" or "cuda".
        max_running, max_batch_tokens: limits of every engine, see `EngineLimits`.
        input_tokens, output_tokens: of every request, exactly.
        seconds: measured part of each load.
        fake_step_ms: instead of the model, an engine whose step sleeps so long; None runs the model.
    """

    model: str
    model_name: str
    device: str
    dtype: str
    num_pages: int
    max_running: int
    max_batch_tokens: int
    input_tokens: int
    output_tokens: int
    seconds: float
    seed: int
    fake_step_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load; its measured part is [lead_s, lead_s + seconds) after its start.

    Attributes:
        name: the streams asked for, or HALF or FULL.
        streams: requests in flight: kept so (closed), or the mean that the rate gives on the bare engine.
        rate_per_s: of Poisson arrivals; None: closed, each stream sends its next request after the last one's end.
        pause_s: a closed stream's pause between two requests.
        first_index: names its first prompt; no two requests of a run share a prompt.
    """

    name: str
    streams: int
    rate_per_s: float | None
    lead_s: float
    seconds: float
    trail_s: float
    pause_s: float
    first_index: int

    @property
    def total_s(self) -> float:
        return self.lead_s + self.seconds + self.trail_s

    def measures(self, at_s: float) -> bool:
        """Whether a request that came at `at_s` is measured."""
        return self.lead_s <= at_s < self.lead_s + self.seconds


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the bare engine does with `streams` requests in flight at all times."""

    streams: int
    tokens_per_s: float

    def rate_per_s(self, output_tokens: int) -> float:
        """Requests that end, and so may come, in a second."""
        return self.tokens_per_s / output_tokens

    def duration_s(self, output_tokens: int) -> float:
        """Mean time of a request in the engine, by Little's law."""
        return self.streams / self.rate_per_s(output_tokens)


def parse_names(text: str) -> tuple[str, ...]:
    """`1,16,64,half` as names of loads. Raises StartupError."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in (HALF, FULL) and not (name.isdecimal() and int(name) > 0):
            raise StartupError(f"--streams {name}: a load is a number of streams above 0, {HALF} or {FULL}")
    return names


def calibrated_streams(names: Sequence[str], max_running: int) -> list[int]:
    """Numbers of streams that the bare engine is calibrated at; the last is the most that it runs at once."""
    counts = {int(name) for name in names if name.isdecimal()} | {max_running}
    too_many = [count for count in counts if count > max_running]
    if too_many:
        raise StartupError(f"--streams {too_many[0]}: the engine runs at most --max-running {max_running} at once")
    return sorted(counts)


def check_pages(setup: Setup) -> None:
    """Raises StartupError if an engine could not hold its most requests: it would preempt, on both sides unequally."""
    # One page more each: where pure decode steps are timed, contexts differ around their mean.
    needed = setup.max_running * (pages_for(setup.input_tokens + setup.output_tokens) + 1)
    if setup.num_pages < needed:
        raise StartupError(
            f"--num-pages {setup.num_pages}: {setup.max_running} requests of {setup.input_tokens} and "
            f"{setup.output_tokens} tokens need {needed}; fewer do with a lower --max-running"
        )


def load_of(name: str, place: int, setup: Setup, calibrations: Sequence[Calibration]) -> Load:
    """The load `name`, the `place`-th of its run; `calibrations` ascend and end at max_running."""
    output_tokens = setup.output_tokens
    full = calibrations[-1]
    if name == HALF:
        rate_per_s: float | None = full.rate_per_s(output_tokens) / 2
        duration_s = full.duration_s(output_tokens)
        streams = math.ceil(full.streams / 2)  # an upper bound: fewer requests in flight have shorter steps
    else:
        wanted = full.streams if name == FULL else int(name)
        calibration = next(found for found in calibrations if found.streams == wanted)
        streams, duration_s = wanted, calibration.duration_s(output_tokens)
        is_closed = name == FULL or wanted == 1
        rate_per_s = None if is_closed else calibration.rate_per_s(output_tokens)
    ramp_s = max(MIN_RAMP_S, RAMP_SHARE * duration_s)
    return Load(
        name=name,
        streams=streams,
        rate_per_s=rate_per_s,
        lead_s=ramp_s,
        seconds=setup.seconds,
        trail_s=ramp_s,
        pause_s=PAUSE_S if streams == 1 else 0.0,
        first_index=(place + 1) * 1_000_000,
    )


def row_of(index: int, place: int, at_s: float, setup: Setup) -> ScheduledRow:
    """The request whose prompt `index` names, the `place`-th of its schedule."""
    return ScheduledRow(place, index, round(at_s * 1e6), setup.input_tokens, setup.output_tokens, ())


def open_rows(load: Load, setup: Setup) -> list[ScheduledRow]:
    """All requests of an open load in the order of their times, the same for one seed."""
    assert load.rate_per_s is not None
    rng = Random(f"{setup.seed}/{load.name}/arrivals")
    expected = load.rate_per_s * load.total_s
    times = poisson_times(math.ceil(expected + 8 * math.sqrt(expected) + 8), load.rate_per_s, rng)
    return [
        row_of(load.first_index + place, place, at_s, setup)
        for place, at_s in enumerate(at_s for at_s in times if at_s < load.total_s)
    ]


def job_maker(setup: Setup, run_id: str) -> JobMaker:
    """Makes the requests: completions of distinct token ids, greedy, of exact length."""
    vocabulary = vocabulary_of(load_tokenizer(Path(setup.model)))
    shape = RequestShape(COMPLETIONS, setup.model_name, ignore_eos=True, temperature=0.0, stream=True)
    return JobMaker(shape, IdPrompts(setup.seed, vocabulary), run_id, REQUEST_TIMEOUT_S)


def closed_job(maker: JobMaker, load: Load, place: int, setup: Setup) -> Job:
    """The `place`-th request of a closed load. The first ones are shorter, so that the streams do not go in step."""
    row = row_of(load.first_index + place, place, 0.0, setup)
    if place < load.streams:
        row = replace(row, output_tokens=max(2, round(setup.output_tokens * (place + 1) / load.streams)))
    return maker.make(row)
