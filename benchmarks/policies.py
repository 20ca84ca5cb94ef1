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
import re
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.machine import commit, machine
from benchmarks.policy_runs import Run, Runs, Simulator, Stream, Threads, results
from loadgen.simulator.baselines import BASELINES
from loadgen.simulator.hardware import Hardware
from loadgen.simulator.outcome import Interval, Outcome, interval, lru_hit_rate
from loadgen.simulator.policies import ABLATIONS, OURS, Goals
from loadgen.simulator.search import STEP, find_speed
from loadgen.simulator.tables import latencies, percent
from loadgen.simulator.workload import Workload, build_workload
from loadgen.traces import read_trace

FILES = {
    "mooncake": "mooncake/conversation_trace.jsonl",
    "conv": "azure-llm-2023/AzureLLMInferenceTrace_conv.csv",
    "code": "azure-llm-2023/AzureLLMInferenceTrace_code.csv",
}
SLICES = {
    "mooncake": "mooncake_conversation_60.jsonl",
    "conv": "azure_conv_60.csv",
    "code": "azure_code_60.csv",
}
MIX = "mix"

LOOSE = Goals(ttft_s=2.0, tpot_s=0.1)
TIGHT = Goals(ttft_s=0.5, tpot_s=0.03)
TIGHT_MAX_INPUT = 16_384

NVLINK = ""
NETWORKS = {NVLINK: None, "25 Gbit/s": 3.1e9}
"""Bytes a second between workers; None: the profile's."""

BASE_WORKERS = 8
"""The split is found for so many; for others it has the same shares. So many workers get one copy of the trace."""

SPLIT_ROWS = 3000
"""The first so many rows tell the best split."""

NEXT_SEED_STEP = 1.1
"""A search with another seed begins where the first one ended, with such steps."""

LOADS = (0.7, 0.9, 1.1)
"""Of what least-loaded bears."""

SPLIT_POLICIES = ("least-loaded", "prefix-affinity")

OWN_SPLIT = "ours-own-split"
"""Ours with the split at which it bears most, of as many workers; its parts are taken away there."""


class Case(NamedTuple):
    """A trace, what its users want, how many workers there are and what is between them."""

    trace: str
    goals: Goals
    num_workers: int
    network: str = NVLINK

    @property
    def name(self) -> str:
        name = f"{self.trace} {self.goals.ttft_s:g}s/{self.goals.tpot_s * 1000:g}ms {self.num_workers} workers"
        return f"{name}, {self.network}" if self.network else name

    def stream(self, num_rows: int | None) -> Stream:
        """What comes: of tight goals only what can keep them."""
        max_input = TIGHT_MAX_INPUT if self.goals == TIGHT else None
        return Stream(self.trace, max_input, num_rows, max(1, self.num_workers // BASE_WORKERS))


class Split(NamedTuple):
    """Prefill workers of a case: the simple policies' best, and ours."""

    num_prefill: int
    own_num_prefill: int

    def of(self, row: str) -> int:
        return self.own_num_prefill if row == OWN_SPLIT or row in ABLATIONS else self.num_prefill


@dataclass(frozen=True, slots=True)
class Borne:
    """What came of a search.

    Attributes:
        speed: at which the wanted share kept the goals.
        per_gpu_s: requests a second and GPU there.
        outcome: of the run nearest to that speed.
    """

    speed: float
    per_gpu_s: float
    is_bracketed: bool
    num_probes: int
    outcome: Outcome


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
        stream = base.stream(min(SPLIT_ROWS, self._num_rows or SPLIT_ROWS))
        asked = {
            (row, num_prefill): threads.ask(partial(self.search, base, stream, num_prefill, row, 0, None))
            for num_prefill in range(1, BASE_WORKERS)
            for row in (OURS, *SPLIT_POLICIES)
        }
        borne = {each: future.result().per_gpu_s for each, future in asked.items()}

        def best(rows: Sequence[str]) -> int:
            return max((per_gpu_s, num_prefill) for (row, num_prefill), per_gpu_s in borne.items() if row in rows)[1]

        return Split(best(SPLIT_POLICIES), best((OURS,)))


class Asked(NamedTuple):
    """Threads, with how urgent what they are asked for is."""

    threads: Threads
    urgency: int

    def ask(self, do: Any) -> "Future[Any]":
        return self.threads.ask(self.urgency, do)


def workloads_of(streams: Iterable[Stream], folder: Path | None) -> dict[Stream, Workload]:
    """Of whole traces in a folder, or of the slices that come with loadgen."""
    names = FILES if folder else SLICES
    base = folder or Path(__file__).parents[1] / "loadgen" / "data"
    rows = {name: read_trace(base / file) for name, file in names.items()}
    return {
        stream: build_workload(
            [(name, rows[name]) for name in (FILES if stream.trace == MIX else [stream.trace])],
            max_input=stream.max_input,
            num_rows=stream.num_rows,
            copies=stream.copies,
        )
        for stream in set(streams)
    }


def scaled(split: Split, num_workers: int) -> Split:
    """The same shares of another number."""
    return Split(*(min(max(round(num * num_workers / BASE_WORKERS), 1), num_workers - 1) for num in split))


def report_case(
    case: Case,
    split: Split,
    policies: Sequence[str],
    borne: Mapping[str, Sequence[Borne]],
    looks: Mapping[tuple[str, float], Sequence[Outcome]],
    lru_rates: Mapping[int, float],
) -> dict[str, Any]:
    """A case in numbers.

    Args:
        lru_rates: hit rate of one LRU of so many prefill workers' pages.
    """
    simple = [name for name in policies if name in BASELINES]
    best = max(simple, key=lambda name: fmean(each.per_gpu_s for each in borne[name]))
    rows: dict[str, Any] = {}
    for name in policies:
        ratios = _ratios(borne[name], borne[best])
        rows[name] = {
            "num_prefill": split.of(name),
            "lru_hit_rate": lru_rates[split.of(name)],
            "goodput_per_gpu_s": asdict(interval([each.per_gpu_s for each in borne[name]])),
            "to_best_simple": asdict(interval(ratios)),
            "to_own_split": asdict(interval(_ratios(borne[name], borne[OWN_SPLIT]))) if OWN_SPLIT in borne else None,
            "all_bracketed": all(each.is_bracketed for each in borne[name]),
            "hit_rate": asdict(interval([each.outcome.hit_rate for each in borne[name]])),
            "seeds": [asdict(each) for each in borne[name]],
            "loads": {
                str(load): [asdict(outcome) for outcome in looks[name, load]] for load in LOADS if (name, load) in looks
            },
        }
    return {
        "case": case.name,
        "trace": case.trace,
        "goals": asdict(case.goals),
        "num_workers": case.num_workers,
        "num_prefill": split.num_prefill,
        "network": case.network or "as the profile",
        "lru_hit_rate": lru_rates[split.num_prefill],
        "best_simple": best,
        "policies": rows,
    }


def _ratios(mine: Sequence[Borne], others: Sequence[Borne]) -> list[float]:
    return [one.per_gpu_s / other.per_gpu_s for one, other in zip(mine, others, strict=True)]


def problems_of(report: Mapping[str, Any]) -> list[str]:
    """Where ours falls behind what it is to reach."""
    if OURS not in report["policies"]:
        return []
    ours = report["policies"][OURS]
    found: list[str] = []
    ratio = Interval(**ours["to_best_simple"])
    if ratio.mean + ratio.half < 1:
        found.append(f"{report['case']}: goodput {ratio} of {report['best_simple']}'s")
    if report["lru_hit_rate"] and ours["hit_rate"]["mean"] < 0.95 * report["lru_hit_rate"]:
        found.append(f"{report['case']}: hit rate {ours['hit_rate']['mean']:.1%}, one LRU {report['lru_hit_rate']:.1%}")
    for load, runs in ours["loads"].items():
        mine = [run["attainment"] for run in runs]
        for name in (name for name in report["policies"] if name in BASELINES):
            other = [run["attainment"] for run in report["policies"][name]["loads"][load]]
            gap = interval([a - b for a, b in zip(mine, other, strict=True)])
            if gap.mean + gap.half < 0:
                found.append(f"{report['case']}: at load {load} {-gap.mean:.2%} fewer keep the goals than with {name}")
    return found


def table_of(report: Mapping[str, Any], load: float | None) -> Table:
    """Latencies at a load, or at what each policy bears (None)."""
    at = "at what each bears" if load is None else f"at {load:g} of what least-loaded bears"
    table = Table(
        title=f"{report['case']} ({report['num_prefill']} of them prefill), {at}; "
        f"one LRU of these hits {report['lru_hit_rate']:.1%}"
    )
    table.add_column("policy", no_wrap=True)
    columns = (
        "req/s/GPU",
        "of best simple",
        "of ours, own split",
        "goals kept",
        "TTFT s p50/p90/p99",
        "TPOT ms p50/p90/p99",
        "hit",
        "of LRU",
        "local",
    )
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["policies"].items():
        runs = [each["outcome"] for each in row["seeds"]] if load is None else row["loads"].get(str(load), [])
        if not runs:
            continue
        hit = fmean(run["hit_rate"] for run in runs)
        rate = Interval(**row["goodput_per_gpu_s"])
        workers = report["num_workers"]
        shown = name if row["num_prefill"] == report["num_prefill"] else f"{name} ({row['num_prefill']} prefill)"
        table.add_row(
            shown,
            str(rate) if load is None else f"{fmean(run['rate_per_s'] for run in runs) / workers:.3g}",
            str(Interval(**row["to_best_simple"])) if load is None else "",
            str(Interval(**row["to_own_split"])) if load is None and row["to_own_split"] else "",
            percent(interval([run["attainment"] for run in runs])),
            latencies([tuple(run["ttft_s"]) for run in runs], 1.0, 3),
            latencies([tuple(run["tpot_s"]) for run in runs], 1000.0, 1),
            f"{hit:.1%}",
            f"{hit / row['lru_hit_rate']:.0%}" if row["lru_hit_rate"] else "",
            f"{fmean(run['num_local'] / run['num_requests'] for run in runs):.0%}",
            style="bold" if name == OURS else None,
        )
    return table


def cases_of(traces: Sequence[str], sizes: Sequence[int], pattern: str) -> list[Case]:
    """All whose name has the pattern in it; a slow network lies between BASE_WORKERS only, and under one trace."""
    cases = [Case(trace, goals, size) for size in sizes for trace in traces for goals in (LOOSE, TIGHT)]
    if BASE_WORKERS in sizes:
        cases += [Case(traces[0], LOOSE, BASE_WORKERS, network) for network in NETWORKS if network != NVLINK]
    return [case for case in cases if re.search(pattern, case.name)]


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
    # Whoever is interrupted takes its processes along.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    num_rows = rows or None
    cases = cases_of([*FILES, MIX], [int(size) for size in sizes.split(",")], only)
    if not cases:
        raise typer.BadParameter(f"--only {only}: no case has it in its name")
    with_parts = {int(size) for size in ablation_sizes.split(",") if size}
    began_s = time.monotonic()
    bases = {case: case._replace(num_workers=BASE_WORKERS) for case in cases}
    split_streams = [base.stream(min(SPLIT_ROWS, num_rows or SPLIT_ROWS)) for base in bases.values()]
    workloads = workloads_of(
        [*(case.stream(num_rows) for case in cases), *split_streams], Path(traces) if traces else None
    )
    hardware = Hardware.read(profile)
    simulator = Simulator(workloads, hardware)
    made_by = {
        "commit": revision or commit(),
        "profile": hardware.model_dump(mode="json"),
        "traces": "whole" if traces else "60",
    }
    try:
        done = Runs(simulator, processes, Path(runs) if runs else None, made_by)
    except ValueError as error:
        raise typer.BadParameter(f"--runs: {error}") from error
    bench = Bench(simulator, done, attainment, num_rows)
    threads = Threads(processes)
    clerks = Threads(2 * len(cases))
    if prefill:
        given = Split(*(int(num) for num in prefill.split(",")))
        found = dict.fromkeys(bases.values(), given)
    else:
        asked = {base: clerks.ask(0, partial(bench.find_split, base, Asked(threads, 0))) for base in bases.values()}
        found = {base: future.result() for base, future in asked.items()}
    splits = {case: scaled(found[base], case.num_workers) for case, base in bases.items()}
    reports: list[dict[str, Any]] = []
    console = Console(width=190)
    waited_for = [
        clerks.ask(
            0,
            partial(
                bench.report,
                case,
                splits[case],
                _chosen(policies)
                or [*BASELINES, OURS, OWN_SPLIT, *(ABLATIONS if case.num_workers in with_parts else ())],
                range(seeds),
                Asked(threads, urgency),
            ),
        )
        for urgency, case in enumerate(cases)
    ]
    problems: list[str] = []
    for future in as_completed(waited_for):
        report = future.result()
        reports.append(report)
        console.print(table_of(report, None))
        for load in LOADS:
            console.print(table_of(report, load))
        for problem in problems_of(report):
            problems.append(problem)
            console.print(f"behind: {problem}", highlight=False)
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


def _chosen(policies: str) -> list[str]:
    names = [name for name in policies.split(",") if name]
    return ["least-loaded", *(name for name in names if name != "least-loaded")] if names else []


if __name__ == "__main__":
    typer.run(main)
