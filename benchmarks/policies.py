"""`python -m benchmarks.policies`: ours beside the simple policies, and beside itself without its parts, simulated.

For each trace, pair of goals, number of workers and network between them:

1. the split into prefill and decode workers at which the better of least-loaded and prefix-affinity bears most, and
   that at which ours does, found with one seed on the first rows; the simple policies and ours have the first, ours
   once more and without each of its parts the second;
2. for each policy and seed the load at which the wanted share of requests keeps both goals, by search over the speed of
   the trace's clock: goodput is the requests a second of that load for each GPU;
3. what users feel at fixed loads, as shares of what least-loaded bears: the same requests at the same times for all.

The unit of work is one run. Each is written to the file of `--runs` when it ends, and none that is there is done again:
who was interrupted starts the same command once more. A case is printed as soon as all of its runs are there.

A seed draws when each row comes within its 3 s tick, how ties are broken, and what a policy draws. Intervals are 95%,
over seeds; policies are compared seed by seed.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks.control_plane.machine import commit, machine
from benchmarks.policy_cases import (
    BASE_WORKERS,
    FILES,
    LOOSE,
    MIX,
    NETWORKS,
    OWN_SPLIT,
    Case,
    Split,
    cases_of,
    scaled,
    workloads_of,
)
from benchmarks.policy_report import LOADS, Borne, problems_of, report_case, table_of
from benchmarks.policy_runs import Run, Runs, Simulator, Stream, Threads, results
from loadgen.simulator.baselines import BASELINES
from loadgen.simulator.hardware import Hardware
from loadgen.simulator.outcome import Outcome, lru_hit_rate
from loadgen.simulator.policies import ABLATIONS, OURS, contender
from loadgen.simulator.search import STEP, find_speed
from shared.errors import StartupError

SPLIT_ROWS = 3000
"""The first so many rows tell the best split."""

NEXT_SEED_STEP = 1.1
"""A search with another seed begins where the first one ended, with such steps."""

SPLIT_POLICIES = ("least-loaded", "prefix-affinity")


class Asked(NamedTuple):
    """Threads, with how urgent what they are asked for is."""

    threads: Threads
    urgency: int

    def ask(self, do: Any) -> "Future[Any]":
        return self.threads.ask(self.urgency, do)


class Bench:
    """Searches and looks, made of runs."""

    def __init__(self, simulator: Simulator, runs: Runs, wanted: float, num_rows: int | None) -> None:
        self._simulator = simulator
        self._runs = runs
        self._wanted = wanted
        self._num_rows = num_rows

    def look(self, case: Case, stream: Stream, num_prefill: int, row: str, seed: int, speed: float) -> Outcome:
        """What users feel at one speed."""
        goals, network = case.goals, NETWORKS[case.network]
        policy = OURS if row == OWN_SPLIT else row
        num_decode = case.num_workers - num_prefill
        return self._runs.outcome(
            Run(stream, goals.ttft_s, goals.tpot_s, network, num_prefill, num_decode, policy, seed, speed)
        )

    def search(
        self, case: Case, stream: Stream, num_prefill: int, row: str, seed: int, first_speed: float | None
    ) -> Borne:
        """What the policy of a row bears; from an idle guess on, if `first_speed` is None."""
        outcomes: dict[float, Outcome] = {}

        def attainment_at(speed: float) -> float:
            outcomes[speed] = self.look(case, stream, num_prefill, row, seed, speed)
            return outcomes[speed].attainment

        if first_speed is None:
            found = find_speed(attainment_at, self._wanted, self._guessed_speed(stream, num_prefill), STEP)
        else:
            found = find_speed(attainment_at, self._wanted, first_speed, NEXT_SEED_STEP)
        nearest = min(outcomes, key=lambda speed: abs(speed - found.speed))
        return Borne(
            speed=found.speed,
            per_gpu_s=outcomes[nearest].rate_per_s * found.speed / nearest / case.num_workers,
            is_bracketed=found.is_bracketed,
            num_probes=len(found.probes),
            outcome=outcomes[nearest],
        )

    def _guessed_speed(self, stream: Stream, num_prefill: int) -> float:
        """At which prefill would be busy for six tenths of the time, were nothing cached."""
        workload = self._simulator.workloads[stream]
        speeds = self._simulator.hardware.prefill.speeds
        work_s = sum(speeds.prefill_s(row.num_input, 0) for row in workload.rows)
        return 0.6 * num_prefill * workload.span_s / work_s

    def report(self, case: Case, split: Split, rows: Sequence[str], seeds: Sequence[int], threads: "Asked") -> Any:
        """All of a case: search with the first seed, then with the others from there; then look at the loads."""
        stream = case.stream(self._num_rows)

        def search(row: str, seed: int, first_speed: float | None) -> "Future[Borne]":
            return threads.ask(partial(self.search, case, stream, split.of(row), row, seed, first_speed))

        # Ours takes longest.
        firsts = {search(row, seeds[0], None): row for row in reversed(rows)}
        searches = {row: [first] for first, row in firsts.items()}
        for first in as_completed(firsts):
            row = firsts[first]
            searches[row] += [search(row, seed, first.result().speed) for seed in seeds[1:]]
        base_speed = fmean(borne.speed for borne in results(searches["least-loaded"]))
        looks = {
            (row, load): [
                threads.ask(partial(self.look, case, stream, split.of(row), row, seed, base_speed * load))
                for seed in seeds
            ]
            for row in reversed(rows)
            if row not in ABLATIONS
            for load in LOADS
        }
        workload, num_pages = self._simulator.workloads[stream], self._simulator.hardware.prefill.num_pages
        return report_case(
            case,
            split,
            rows,
            {row: results(asked) for row, asked in searches.items()},
            {each: results(asked) for each, asked in looks.items()},
            {num_prefill: lru_hit_rate(workload, num_prefill * num_pages) for num_prefill in split},
        )

    def find_split(self, base: Case, threads: "Asked") -> Split:
        """The best splits of BASE_WORKERS, found with one seed."""
        stream = _split_stream(base, self._num_rows)
        asked = {
            (row, num_prefill): threads.ask(partial(self.search, base, stream, num_prefill, row, 0, None))
            for num_prefill in range(1, BASE_WORKERS)
            for row in (OURS, *SPLIT_POLICIES)
        }
        borne = {each: future.result().per_gpu_s for each, future in asked.items()}

        def best(rows: Sequence[str]) -> int:
            return max((per_gpu_s, num_prefill) for (row, num_prefill), per_gpu_s in borne.items() if row in rows)[1]

        return Split(best(SPLIT_POLICIES), best((OURS,)))


def main(
    *,
    traces: Annotated[str, typer.Option(help="Folder of the whole traces; without it the slices of 60 rows.")] = "",
    only: Annotated[str, typer.Option(help="Cases whose name has this regular expression in it.")] = "",
    sizes: Annotated[str, typer.Option(help="Numbers of workers, in the order in which they are done.")] = "8,4,16",
    ablation_sizes: Annotated[str, typer.Option(help="Those for which parts of ours are taken away, too.")] = "8",
    seeds: Annotated[int, typer.Option(min=1, max=10)] = 5,
    rows: Annotated[int, typer.Option(min=0, help="At most so many rows of each trace; 0: all.")] = 0,
    profile: Annotated[str, typer.Option(help="As for loadgen simulate.")] = "h200-8b",
    attainment: Annotated[float, typer.Option(min=0.01, max=0.9999)] = 0.9,
    prefill: Annotated[
        str, typer.Option(help="Prefill workers of 8, for the simple policies and for ours, as 6,5; without it found.")
    ] = "",
    policies: Annotated[str, typer.Option(help="These alone, and least-loaded.")] = "",
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    runs: Annotated[str, typer.Option(help="Keep runs in this file, and do none again that it has.")] = "",
    out: Annotated[str, typer.Option(help="Write the report to this file too, as far as it is.")] = "",
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
) -> None:
    """Print the tables; exit with 1 if ours is behind anywhere."""
    num_rows = rows or None
    try:
        cases = cases_of([*FILES, MIX], _numbers("--sizes", sizes), only)
        given = Split(*_numbers("--prefill", prefill, 2)) if prefill else None
        rows_of = _rows_of(policies, _numbers("--ablation-sizes", ablation_sizes))
        streams = [stream for case in cases for stream in (case.stream(num_rows), _split_stream(case, num_rows))]
        hardware = Hardware.read(profile)
        simulator = Simulator(workloads_of(streams, Path(traces) if traces else None), hardware)
        made_by = {
            "commit": revision or commit(),
            "profile": hardware.model_dump(mode="json"),
            "traces": "whole" if traces else "60",
        }
        # Whoever is interrupted takes its processes along.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        done = Runs(simulator, processes, Path(runs) if runs else None, made_by)
    except StartupError as error:
        raise typer.BadParameter(str(error)) from error
    began_s = time.monotonic()
    bench = Bench(simulator, done, attainment, num_rows)
    threads, clerks = Threads(processes), Threads(len(cases))
    splits = dict.fromkeys(cases, given) if given else _found_splits(bench, cases, threads, clerks)
    asked = [
        clerks.ask(
            urgency,
            partial(
                bench.report,
                case,
                scaled(splits[case], case.num_workers),
                rows_of(case),
                range(seeds),
                Asked(threads, urgency),
            ),
        )
        for urgency, case in enumerate(cases)
    ]
    console = Console(width=190)
    reports: list[dict[str, Any]] = []
    problems: list[str] = []
    for future in as_completed(asked):
        report = future.result()
        reports.append(report)
        problems += problems_of(report)
        _show(report, console)
        if out:
            whole = {
                "problems": problems,
                "seeds": seeds,
                "attainment": attainment,
                "rows": rows or "all",
                **made_by,
                "took_s": time.monotonic() - began_s,
                "machine": machine(),
                "date": time.strftime("%Y-%m-%d"),
                "cases": reports,
            }
            Path(out).write_text(json.dumps(whole, indent=1) + "\n")
    clerks.end()
    threads.end()
    done.end()
    sys.exit(1 if problems else 0)


def _found_splits(bench: Bench, cases: Sequence[Case], threads: Threads, clerks: Threads) -> dict[Case, Split]:
    """For each case the best splits of BASE_WORKERS."""
    bases = {case: case._replace(num_workers=BASE_WORKERS) for case in cases}
    asked = {
        base: clerks.ask(0, partial(bench.find_split, base, Asked(threads, 0)))
        for base in dict.fromkeys(bases.values())
    }
    return {case: asked[base].result() for case, base in bases.items()}


def _split_stream(case: Case, num_rows: int | None) -> Stream:
    return case._replace(num_workers=BASE_WORKERS).stream(min(SPLIT_ROWS, num_rows or SPLIT_ROWS))


def _show(report: dict[str, Any], console: Console) -> None:
    for load in (None, *LOADS):
        console.print(table_of(report, load))
    for problem in problems_of(report):
        console.print(f"behind: {problem}", highlight=False)


def _numbers(option: str, text: str, count: int | None = None) -> list[int]:
    """Raises StartupError unless these are whole numbers from 1 on, `count` of them."""
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) for part in parts) or count not in (None, len(parts)):
        raise StartupError(f"{option} {text}: it must be {count or 'some'} whole numbers from 1 on, as 8,4")
    return [int(part) for part in parts]


def _rows_of(policies: str, with_parts: Sequence[int]) -> Callable[[Case], Sequence[str]]:
    """The policies of a case: all, or those named and least-loaded. Raises StartupError for an unknown name."""
    named = [name for name in policies.split(",") if name]
    for name in named:
        if name != OWN_SPLIT:
            contender(name, LOOSE, 0)
    if named:
        return lambda _: list(dict.fromkeys(["least-loaded", *named]))
    return lambda case: [*BASELINES, OURS, OWN_SPLIT, *(ABLATIONS if case.num_workers in with_parts else ())]


if __name__ == "__main__":
    typer.run(main)
