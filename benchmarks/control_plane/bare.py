"""The engine alone, as a worker builds it, in a process without Kafka, Redis, HTTP or asyncio.

`python -m benchmarks.control_plane.bare JOB OUT` reads a job (JSON: setup, names) and writes what it measured (JSON).
The driver adds each request at its time and steps the engine while it has work: nothing can serve it with less.
"""

import json
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, count, islice, pairwise
from pathlib import Path
from statistics import fmean

import psutil
import torch

from benchmarks.control_plane.loads import (
    HALF,
    Calibration,
    Load,
    Setup,
    calibrated_streams,
    closed_job,
    job_maker,
    load_of,
    open_rows,
    row_of,
)
from benchmarks.control_plane.paced import paced_engine
from benchmarks.control_plane.samples import Sample, distribution_ms, mean_in_flight, summary
from loadgen.jobs import Job, JobMaker
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest
from shared.wire.openai import parse_body
from shared.worker.process import build_engine
from shared.worker.settings import WorkerSettings

CALIBRATION_S = 4.0
"""Each calibration measures for so long."""

WARM_UP_S = 1.0
"""Before all else the engine runs for so long: kernels are loaded and the allocator's pools grow."""

MADE_AHEAD = 1.5
"""Requests of a closed load that are made before it, as a multiple of those that the calibration lets expect."""

NUM_DECODE_STEPS = 64
NUM_WARM_STEPS = 8


@dataclass(slots=True)
class Seen:
    """One request while it runs; seconds of the monotonic clock."""

    at_s: float
    sent_s: float
    token_times_s: list[float] = field(default_factory=list[float])
    cached_tokens: int = 0

    def sample(self, started_s: float) -> Sample:
        times = self.token_times_s
        return Sample(
            at_s=self.at_s - started_s,
            sent_s=self.sent_s - started_s,
            first_token_s=times[0] - started_s,
            gaps_s=[later - earlier for earlier, later in pairwise(times)],
            output_tokens=len(times),
            cached_tokens=self.cached_tokens,
        )


class Driver:
    """Steps the engine and notes when each token came."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.running: dict[str, Seen] = {}
        self.ended: list[Seen] = []

    def add(self, request: EngineRequest, at_s: float) -> None:
        self.engine.add(request)
        self.running[request.key] = Seen(at_s, time.monotonic())

    def step(self) -> int:
        """One step; the number of requests that it ended."""
        output = self.engine.step()
        now_s = time.monotonic()
        num_ended = 0
        for token in output.tokens:
            seen = self.running[token.key]
            if token.error is not None:
                raise RuntimeError(f"the engine failed request {token.key}: {token.error}")
            seen.token_times_s.append(now_s)
            seen.cached_tokens += token.num_cached_tokens or 0
            if token.finish is not None:
                self.ended.append(self.running.pop(token.key))
                num_ended += 1
        return num_ended

    def abort_all(self) -> None:
        """Forget all requests and what was seen of them."""
        for key in self.running:
            self.engine.abort(key)
        self.running.clear()
        self.ended.clear()

    def take_samples(self, started_s: float) -> list[Sample]:
        """All requests that ended since the last time asked."""
        ended, self.ended = self.ended, []
        return [seen.sample(started_s) for seen in ended]


def request_of(job: Job) -> EngineRequest:
    """The job as a worker's engine would get it."""
    spec = parse_body(job.body, chat=False).spec
    assert isinstance(spec.prompt, array), "the jobs of this benchmark are token ids"
    sampling = spec.sampling(room=job.row.output_tokens, default_seed=0)
    return EngineRequest(str(job.request_id), spec.prompt, len(spec.prompt), sampling)


def run_open(driver: Driver, requests: deque[tuple[float, EngineRequest]]) -> list[Sample]:
    """Adds each request at its time, (seconds after now, request), and runs all to their end."""
    started_s = time.monotonic()
    while requests or driver.running:
        while requests and started_s + requests[0][0] <= time.monotonic():
            at_s, request = requests.popleft()
            driver.add(request, started_s + at_s)
        if driver.engine.has_work():
            driver.step()
        else:
            time.sleep(max(0.0, started_s + requests[0][0] - time.monotonic()))
    return driver.take_samples(started_s)


def run_closed(driver: Driver, load: Load, requests: Iterator[EngineRequest]) -> list[Sample]:
    """Keeps `load.streams` requests in flight for the load's time."""
    started_s = time.monotonic()
    num_free = load.streams
    while True:
        within = time.monotonic() - started_s < load.total_s
        if within and num_free:
            time.sleep(load.pause_s)
        while within and num_free:
            driver.add(next(requests), time.monotonic())
            num_free -= 1
        if not driver.running:
            return driver.take_samples(started_s)
        num_free += driver.step()


def calibrate(
    driver: Driver, streams: int, next_job: Callable[[int], Job], setup: Setup, seconds: float
) -> Calibration:
    """Tokens a second with `streams` requests in flight. `next_job` makes one of so many answer tokens."""
    for place in range(streams):
        # Of different lengths, so that they end, and the next ones begin, one by one.
        job = next_job(max(2, round(setup.output_tokens * (place + 1) / streams)))
        driver.add(request_of(job), time.monotonic())

    def step() -> None:
        for _ in range(driver.step()):
            driver.add(request_of(next_job(setup.output_tokens)), time.monotonic())

    while driver.engine.stats().num_waiting:
        step()
    started_s, first = time.monotonic(), driver.engine.stats().num_generated_tokens
    while (elapsed_s := time.monotonic() - started_s) < seconds:
        step()
    num_tokens = driver.engine.stats().num_generated_tokens - first
    driver.abort_all()
    return Calibration(streams, num_tokens / elapsed_s)


def decode_steps(driver: Driver, rows: int, next_job: Callable[[int, int], Job], setup: Setup) -> dict[str, object]:
    """Times steps of exactly `rows` decode rows whose mean context is that of the loads, without any prefill.

    `next_job` makes one of so many prompt and answer tokens.
    """
    wanted_context = setup.input_tokens + setup.output_tokens // 2
    num_fill_steps = rows + rows * wanted_context // (setup.max_batch_tokens - rows + 1)
    num_steps = NUM_WARM_STEPS + NUM_DECODE_STEPS
    prompt_tokens = max(1, wanted_context - num_fill_steps // 2 - num_steps // 2)
    for _ in range(rows):
        job = next_job(prompt_tokens, num_fill_steps + num_steps + 1)
        driver.add(request_of(job), time.monotonic())
    while any(not seen.token_times_s for seen in driver.running.values()):
        driver.step()
    for _ in range(NUM_WARM_STEPS):
        driver.step()
    times_s: list[float] = []
    contexts: list[float] = []
    for _ in range(NUM_DECODE_STEPS):
        contexts.append(prompt_tokens + fmean(len(seen.token_times_s) for seen in driver.running.values()))
        started_s = time.monotonic()
        driver.step()
        times_s.append(time.monotonic() - started_s)
    assert len(driver.running) == rows, "no request ended while its steps were timed"
    driver.abort_all()
    return {"rows": rows, "mean_context": round(fmean(contexts), 1), "step_ms": distribution_ms(times_s)}


def main() -> None:
    job_path, out_path = map(Path, sys.argv[1:3])
    job = json.loads(job_path.read_text())
    setup = Setup(**job["setup"])
    out_path.write_text(json.dumps(measure(setup, job["names"])))


def measure(setup: Setup, names: list[str]) -> dict[str, object]:
    """Calibrates and runs all loads."""
    driver = Driver(engine_of(setup))
    maker = job_maker(setup, "bare")
    places = iter(range(1_000_000))

    def next_job(input_tokens: int, output_tokens: int) -> Job:
        place = next(places)
        return maker.make(
            replace(row_of(place, place, 0.0, setup), input_tokens=input_tokens, output_tokens=output_tokens)
        )

    stream_counts = calibrated_streams(names, setup.max_running)
    of_length = partial(next_job, setup.input_tokens)
    calibrate(driver, stream_counts[-1], of_length, setup, WARM_UP_S)
    calibrations = [calibrate(driver, streams, of_length, setup, CALIBRATION_S) for streams in stream_counts]
    loads = [load_of(name, place, setup, calibrations) for place, name in enumerate(names)]
    rates_per_s = {found.streams: found.rate_per_s(setup.output_tokens) for found in calibrations}
    results: dict[str, object] = {}
    for load in loads:
        cpu_s, began_s = _cpu_s(), time.monotonic()
        samples = _run(driver, load, setup, maker, rates_per_s.get(load.streams, 0.0))
        cpu_share = (_cpu_s() - cpu_s) / (time.monotonic() - began_s)
        rows = round(mean_in_flight(samples, load)) if load.name == HALF else load.streams
        results[load.name] = {
            **summary(samples, load),
            "cpu_percent": round(100 * cpu_share, 1),
            "decode_step": decode_steps(driver, max(1, rows), next_job, setup),
        }
    driver.engine.check()
    stats = driver.engine.stats()
    return {
        "num_preemptions": stats.num_preemptions,
        "num_prefix_hits": stats.num_prefix_hits,
        "calibrations": [
            {
                "streams": found.streams,
                "tokens_per_s": round(found.tokens_per_s, 1),
                "requests_per_s": round(found.rate_per_s(setup.output_tokens), 3),
                "duration_s": round(found.duration_s(setup.output_tokens), 4),
            }
            for found in calibrations
        ],
        "loads": [asdict(load) for load in loads],
        "results": results,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if setup.device.startswith("cuda") else None,
    }


def engine_of(setup: Setup) -> PagedEngine:
    """The engine as the workers of the path build theirs."""
    settings = WorkerSettings(
        model=Path(setup.model),
        model_name=setup.model_name,
        device=setup.device,
        dtype=setup.dtype,  # type: ignore[arg-type] - pydantic checks it
        num_pages=setup.num_pages,
        max_running=setup.max_running,
        max_batch_tokens=setup.max_batch_tokens,
    )
    return build_engine(settings) if setup.fake_step_ms is None else paced_engine(settings, setup.fake_step_ms)


def _run(driver: Driver, load: Load, setup: Setup, maker: JobMaker, per_s: float) -> list[Sample]:
    if load.rate_per_s is not None:
        rows = open_rows(load, setup)
        return run_open(driver, deque((row.at_s, request_of(maker.make(row))) for row in rows))
    requests = (request_of(closed_job(maker, load, place, setup)) for place in count())
    # The first are made ahead: making one takes as long as a few of a step's rows.
    ahead = list(islice(requests, round(MADE_AHEAD * per_s * load.total_s) + 2 * load.streams))
    return run_closed(driver, load, chain(ahead, requests))


def _cpu_s() -> float:
    return sum(psutil.Process().cpu_times()[:2])


if __name__ == "__main__":
    main()
