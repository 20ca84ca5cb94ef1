"""`python -m benchmarks.colocated`: one engine that prefills and decodes under open-loop load, beside vLLM.

Requests of a trace come in its order at Poisson times, whether or not those before them are done. Prompts are random
tokens of the trace's lengths, so that only their lengths matter; answers have exactly the trace's lengths. All times
count from the moment at which a request was meant to come.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import typer

from benchmarks.engine.build import RUNNERS, SHAPES, SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.drive import Work, greedy
from benchmarks.engine.machine import commit, machine, process_age_s
from benchmarks.engine.report import markdown
from loadgen.arrivals import poisson_times
from loadgen.traces import TraceRow, read_trace
from shared.engine.port import Engine, EngineRequest
from shared.errors import StartupError
from shared.request import FinishReason

MAX_CONTEXT = 16_000
"""Rows with as many tokens or more, prompt and answer together, are left out."""

DRAIN_S = 60.0
"""How long after the last arrival answers are waited for; what is not done then has missed its limits."""

SLOS = ((2.0, 0.1), (0.5, 0.03))
"""Time to first token and time per output token, in seconds."""

NUM_WARM_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One load: a trace (by a word of its file's name) and requests a second."""

    trace: str
    rate_per_s: float

    @property
    def name(self) -> str:
        return f"{self.trace} {self.rate_per_s:g}/s"


@dataclass(frozen=True, slots=True)
class PeerPoint:
    """vLLM 0.26.0 under the same load: percentiles 50, 90 and 99 in ms, percent of requests within each of SLOS."""

    ttft_ms: tuple[float, float, float]
    tpot_ms: tuple[float, float, float]
    attained: tuple[float, float]


VLLM: Mapping[str, Mapping[Point, PeerPoint]] = {
    "llama-3.1-8b": {
        Point("conv", 8): PeerPoint((40, 94, 203), (6.5, 7.8, 10.8), (100, 100)),
        Point("conv", 13): PeerPoint((60, 127, 164), (10.9, 13.0, 16.5), (100, 100)),
        Point("conv", 17): PeerPoint((78, 228, 312), (14.8, 18.6, 24.2), (100, 99.8)),
        Point("conv", 21): PeerPoint((158, 369, 867), (32.9, 43.9, 56.9), (100, 37.6)),
        Point("code", 6): PeerPoint((78, 211, 397), (5.4, 14.7, 51.2), (100, 97.8)),
        Point("code", 10): PeerPoint((120, 340, 575), (10.9, 43.4, 53.9), (100, 78.0)),
        Point("code", 14): PeerPoint((207, 543, 754), (24.6, 53.0, 55.9), (100, 50.2)),
        Point("code", 18): PeerPoint((421, 1095, 1249), (51.0, 54.1, 55.5), (100, 28.0)),
    }
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and the second of the point at which it is meant to come."""

    at_s: float
    request: EngineRequest


@dataclass(slots=True)
class Answer:
    """What came back of a request, in seconds of the point; `last_s` of the token seen last."""

    at_s: float
    wanted: int
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == self.wanted

    @property
    def ttft_s(self) -> float:
        """Infinite without a first token."""
        return float("inf") if self.first_s is None else self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        """Infinite for an answer that is not complete."""
        if self.first_s is None or not self.is_complete:
            return float("inf")
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class PointResult:
    """A measured point; times in ms by percentile 50, 90 and 99 over complete answers.

    Attributes:
        attained: percent of all requests within each of SLOS.
        max_lateness_ms: longest time from a request's moment to its `add`: a step was in progress.
    """

    name: str
    num_requests: int
    num_complete: int
    ttft_ms: Sequence[float]
    tpot_ms: Sequence[float]
    attained: Sequence[float]
    answer_tokens_per_s: float
    max_running: int
    max_lateness_ms: float
    num_preemptions: int
    took_s: float


@dataclass(slots=True)
class Run:
    """State of one point while it runs."""

    answers: dict[str, Answer] = field(default_factory=dict)
    max_running: int = 0
    max_lateness_s: float = 0.0


def parse_points(text: str) -> list[Point]:
    """`conv:8,13;code:6` as points."""
    points: list[Point] = []
    for part in text.split(";"):
        trace, _, rates = part.partition(":")
        points += [Point(trace, float(rate)) for rate in rates.split(",")]
    return points


def trace_file(folder: Path, word: str) -> Path:
    """The one csv file of `folder` whose name has `word` in it. Raises StartupError for none or several."""
    found = sorted(folder.glob(f"*{word}*.csv"))
    if len(found) != 1:
        raise StartupError(f"{folder} has {len(found)} csv files with {word!r} in their name, not one")
    return found[0]


def arrivals_of(
    rows: Sequence[TraceRow], rate_per_s: float, seconds: float, max_context: int, work: Work, rng: Random
) -> list[Arrival]:
    """The requests of the first `seconds`; those of `max_context` tokens or more are left out.

    Raises StartupError if the trace is too short.
    """
    fitting = [row for row in rows if row.input_tokens + row.output_tokens < max_context]
    times_s = poisson_times(len(fitting) + 1, rate_per_s, rng)
    if times_s[-1] < seconds:
        raise StartupError(f"{len(fitting)} requests of the trace end after {times_s[-2]:.0f} s, not {seconds:.0f}")
    arrivals: list[Arrival] = []
    for row, at_s in zip(fitting, times_s, strict=False):
        if at_s >= seconds:
            break
        [request] = work.requests(1, max(1, row.input_tokens), greedy(max(1, row.output_tokens)))
        arrivals.append(Arrival(at_s, request))
    return arrivals


def run_point(engine: Engine, arrivals: Sequence[Arrival], clock_s: Callable[[], float] = time.perf_counter) -> Run:
    """Serve all arrivals, and give up on what is not done DRAIN_S after the last one."""
    run = Run()
    due = deque(arrivals)
    end_s = arrivals[-1].at_s + DRAIN_S
    began_s = clock_s()
    while due or engine.has_work():
        now_s = clock_s() - began_s
        if now_s > end_s:
            break
        while due and due[0].at_s <= now_s:
            arrival = due.popleft()
            run.answers[arrival.request.key] = Answer(arrival.at_s, arrival.request.sampling.max_tokens)
            run.max_lateness_s = max(run.max_lateness_s, now_s - arrival.at_s)
            engine.add(arrival.request)
        if not engine.has_work():
            time.sleep(max(0.0, min(1e-3, due[0].at_s - now_s) if due else 0.0))
            continue
        output = engine.step()
        done_s = clock_s() - began_s
        for token in output.tokens:
            if token.finish is FinishReason.FAILED:
                raise RuntimeError(f"request {token.key} failed: {token.error}")
            answer = run.answers[token.key]
            answer.first_s = done_s if answer.first_s is None else answer.first_s
            answer.last_s = done_s
            answer.num_tokens += 1
        run.max_running = max(run.max_running, len(output.tokens))
    for key, answer in run.answers.items():
        if not answer.is_complete:
            engine.abort(key)
    while engine.has_work():
        engine.step()
    return run


def result_of(point: Point, run: Run, num_preemptions: int) -> PointResult:
    """Percentiles and attainment of a point."""
    answers = list(run.answers.values())
    complete = [answer for answer in answers if answer.is_complete]
    if not complete:
        raise RuntimeError(f"no answer of {point.name} was completed")
    took_s = max(answer.last_s for answer in complete)
    attained = [
        100 * sum(answer.ttft_s <= ttft_s and answer.tpot_s <= tpot_s for answer in answers) / len(answers)
        for ttft_s, tpot_s in SLOS
    ]
    return PointResult(
        name=point.name,
        num_requests=len(answers),
        num_complete=len(complete),
        ttft_ms=_percentiles_ms([answer.ttft_s for answer in complete]),
        tpot_ms=_percentiles_ms([answer.tpot_s for answer in complete]),
        attained=[round(percent, 1) for percent in attained],
        answer_tokens_per_s=round(sum(answer.num_tokens for answer in answers) / took_s, 1),
        max_running=run.max_running,
        max_lateness_ms=round(1e3 * run.max_lateness_s, 2),
        num_preemptions=num_preemptions,
        took_s=round(took_s, 2),
    )


def table(results: Sequence[tuple[Point, PointResult]], peers: Mapping[Point, PeerPoint]) -> str:
    """Each point beside vLLM's."""
    header = ("point", "", "TTFT p50/p90/p99 ms", "TPOT p50/p90/p99 ms", *(f"{a:g} s / {b:g} s" for a, b in SLOS))
    lines: list[tuple[str, ...]] = []
    for point, result in results:
        lines.append((point.name, "Baton", *_cells(result.ttft_ms, result.tpot_ms, result.attained)))
        peer = peers.get(point)
        if peer is not None:
            lines.append(("", "vLLM 0.26", *_cells(peer.ttft_ms, peer.tpot_ms, peer.attained)))
    return markdown(header, lines)


def _percentiles_ms(values_s: Sequence[float]) -> list[float]:
    return [round(1e3 * float(np.percentile(values_s, percent)), 2) for percent in (50, 90, 99)]


def _cells(ttft_ms: Sequence[float], tpot_ms: Sequence[float], attained: Sequence[float]) -> tuple[str, ...]:
    return (
        " / ".join(f"{value:.0f}" for value in ttft_ms),
        " / ".join(f"{value:.1f}" for value in tpot_ms),
        *(f"{percent:.1f}%" for percent in attained),
    )


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    points: Annotated[str, typer.Option(help="Traces and rates.")] = "conv:8,13,17,21;code:6,10,14,18",
    traces: Annotated[str, typer.Option(help="Folder of the traces' csv files.")] = "loadgen/data",
    seconds: Annotated[float, typer.Option(help="Arrivals of each point.")] = 30.0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    runner: Annotated[str, typer.Option(help=f"One of {', '.join(RUNNERS)}; by default triton on cuda.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    max_batch_tokens: Annotated[int, typer.Option(help="Token rows of one step: the chunk budget.")] = 2048,
    max_running: Annotated[int, typer.Option(help="Requests in the running batch.")] = 256,
    num_pages: Annotated[int, typer.Option(help="KV pages at most.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 1,
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure one colocated engine under open-loop load."""
    plan = BenchPlan(
        device=device,
        dtype=dtype,
        runner=runner or ("triton" if device == "cuda" else "torch"),
        num_pages=num_pages,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
    )
    built, start = start_engine(shape, plan, SPEED_WEIGHTS)
    engine = built.engine
    sys.stderr.write(f"ready after {process_age_s():.1f} s: {built.runs}; {engine.limits}\n")
    work = Work(engine.model.vocab_size, seed)
    results: list[tuple[Point, PointResult]] = []
    for request in work.requests(NUM_WARM_REQUESTS, 64, greedy(8)):
        run_point(engine, [Arrival(0.0, request)])
    for point in parse_points(points):
        rows = read_trace(trace_file(Path(traces), point.trace))
        max_context = min(MAX_CONTEXT, engine.limits.max_context)
        arrivals = arrivals_of(rows, point.rate_per_s, seconds, max_context, work, Random(f"{seed}/{point.name}"))
        preemptions_before = engine.stats().num_preemptions
        run = run_point(engine, arrivals)
        engine.check()
        result = result_of(point, run, engine.stats().num_preemptions - preemptions_before)
        sys.stderr.write(f"{result}\n")
        results.append((point, result))
    report = {
        "shape": shape,
        "runs": built.runs,
        "plan": asdict(plan),
        "limits": asdict(engine.limits),
        "start": asdict(start),
        "seconds": seconds,
        "points": [asdict(result) for _, result in results],
        "late_work": built.late_work(),
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": revision or commit(),
    }
    if out:
        Path(out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{table(results, VLLM.get(shape, {}))}\n\nafter ready: {built.late_work()}; {engine.limits}\n")


if __name__ == "__main__":
    typer.run(main)
