"""`python -m benchmarks.policies`: ours beside the simple policies, and beside itself without its parts, simulated.

For each trace, pair of goals and number of workers:

1. the split into prefill and decode workers at which the better of least-loaded and prefix-affinity bears most, and
   that at which ours does; all rows but one have the first;
2. for each policy and seed the load at which the wanted share of requests keeps both goals, by search over the speed of
   the trace's clock: goodput is the requests a second of that load for each GPU;
3. what users feel at fixed loads, as shares of what least-loaded bears: the same requests at the same times for all.

A seed draws when each row comes within its 3 s tick, how ties are broken, and what a policy draws. Intervals are 95%,
over seeds; policies are compared seed by seed.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.machine import commit, machine
from loadgen.simulator.baselines import BASELINES
from loadgen.simulator.hardware import Hardware
from loadgen.simulator.outcome import Interval, Outcome, interval, lru_hit_rate, outcome_of
from loadgen.simulator.policies import ABLATIONS, OURS, Goals, contender
from loadgen.simulator.search import STEP, find_speed
from loadgen.simulator.simulation import Setup, simulate
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

BASE_WORKERS = 8
"""The split is found for so many; for others it has the same shares. So many workers get one copy of the trace."""

NEXT_SEED_STEP = 1.1
"""A search with another seed begins where the last one ended, with such steps."""

LOADS = (0.7, 0.9, 1.1)
"""Of what least-loaded bears."""

SPLIT_POLICIES = ("least-loaded", "prefix-affinity")

OWN_SPLIT = "ours-own-split"
"""Ours with the split at which it bears most, of as many workers."""


class Case(NamedTuple):
    """A trace, what its users want, and how many workers there are."""

    trace: str
    goals: Goals
    num_workers: int

    @property
    def name(self) -> str:
        return f"{self.trace} {self.goals.ttft_s:g}s/{self.goals.tpot_s * 1000:g}ms {self.num_workers} workers"

    @property
    def stream(self) -> tuple[str, bool, int]:
        """Which workload it is: the trace, whether long chains are left out, copies."""
        return self.trace, self.goals == TIGHT, max(1, self.num_workers // BASE_WORKERS)


class Split(NamedTuple):
    """Prefill workers of a case: the simple policies' best, and ours."""

    num_prefill: int
    own_num_prefill: int

    def of(self, row: str) -> int:
        return self.own_num_prefill if row == OWN_SPLIT else self.num_prefill


class Search(NamedTuple):
    """Find what the policy of a row bears with each of the seeds."""

    case: Case
    num_prefill: int
    row: str
    seeds: tuple[int, ...]
    first_speed: float


class Look(NamedTuple):
    """See what users feel at one speed."""

    case: Case
    num_prefill: int
    row: str
    seed: int
    speed: float


@dataclass(frozen=True, slots=True)
class Borne:
    """What came of a `Search`.

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
    """All that a process needs to run tasks. It is inherited by forking, not sent."""

    def __init__(self, workloads: Mapping[tuple[str, bool, int], Workload], hardware: Hardware, wanted: float) -> None:
        self.workloads = workloads
        self.hardware = hardware
        self.wanted = wanted

    def run(self, task: Search | Look) -> list[Borne] | Outcome:
        """Do one task."""
        if isinstance(task, Look):
            return self._simulate(task, task.seed, task.speed)
        borne: list[Borne] = []
        for seed in task.seeds:
            if borne:
                borne.append(self._search(task, seed, borne[-1].speed, NEXT_SEED_STEP))
            else:
                borne.append(self._search(task, seed, task.first_speed, STEP))
        return borne

    def _search(self, task: Search, seed: int, first_speed: float, step: float) -> Borne:
        outcomes: dict[float, Outcome] = {}

        def attainment_at(speed: float) -> float:
            outcomes[speed] = self._simulate(task, seed, speed)
            return outcomes[speed].attainment

        found = find_speed(attainment_at, self.wanted, first_speed, step)
        nearest = min(outcomes, key=lambda speed: abs(speed - found.speed))
        return Borne(
            speed=found.speed,
            per_gpu_s=outcomes[nearest].rate_per_s * found.speed / nearest / task.case.num_workers,
            is_bracketed=found.is_bracketed,
            num_probes=len(found.probes),
            outcome=outcomes[nearest],
        )

    def first_speed(self, case: Case, num_prefill: int) -> float:
        """At which prefill would be busy for six tenths of the time, were nothing cached."""
        workload = self.workloads[case.stream]
        speeds = self.hardware.prefill.speeds
        work_s = sum(speeds.prefill_s(row.num_input, 0) for row in workload.rows)
        return 0.6 * num_prefill * workload.span_s / work_s

    def _simulate(self, task: Search | Look, seed: int, speed: float) -> Outcome:
        case = task.case
        chosen = contender(OURS if task.row == OWN_SPLIT else task.row, case.goals, seed)
        setup = Setup(
            self.hardware,
            task.num_prefill,
            case.num_workers - task.num_prefill,
            speed=speed,
            seed=seed,
            gauges=chosen.gauges,
        )
        finished = simulate(self.workloads[case.stream], chosen.policy, chosen.lengths, setup)
        return outcome_of(finished, case.goals)


class Crew:
    """Processes that share the work of a bench."""

    def __init__(self, bench: Bench, num_processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._tasks: Any = context.Queue()
        self._done: Any = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(bench, self._tasks, self._done), daemon=True)
            for _ in range(num_processes)
        ]
        for process in self._processes:
            process.start()

    def run(self, tasks: Sequence[Search | Look]) -> dict[Search | Look, Any]:
        """Results by task; says on stderr how far it is."""
        for task in tasks:
            self._tasks.put(task)
        results: dict[Search | Look, Any] = {}
        began_s = time.monotonic()
        for _ in tasks:
            task, result, error = self._done.get()
            if error is not None:
                raise RuntimeError(f"{task}: {error}")
            results[task] = result
            if len(results) % 20 == 0 or len(results) == len(tasks):
                sys.stderr.write(f"{len(results)} of {len(tasks)} after {time.monotonic() - began_s:.0f} s\n")
        return results

    def end(self) -> None:
        for _ in self._processes:
            self._tasks.put(None)
        for process in self._processes:
            process.join()


def _work(bench: Bench, tasks: Any, done: Any) -> None:
    while (task := tasks.get()) is not None:
        try:
            done.put((task, bench.run(task), None))
        except Exception as error:  # noqa: BLE001 - told to the process that waits for it
            done.put((task, None, repr(error)))


def workloads_of(
    cases: Iterable[Case], folder: Path | None, num_rows: int | None
) -> dict[tuple[str, bool, int], Workload]:
    """The workload of each case's stream."""
    names = FILES if folder else SLICES
    base = folder or Path(__file__).parents[1] / "loadgen" / "data"
    workloads: dict[tuple[str, bool, int], Workload] = {}
    for trace, is_tight, copies in {case.stream for case in cases}:
        wanted = list(FILES) if trace == MIX else [trace]
        workloads[trace, is_tight, copies] = build_workload(
            [(name, read_trace(base / names[name])) for name in wanted],
            max_input=TIGHT_MAX_INPUT if is_tight else None,
            num_rows=num_rows,
            copies=copies,
        )
    return workloads


def find_splits(cases: Sequence[Case], bench: Bench, crew: Crew) -> dict[Case, Split]:
    """The best splits of each case, found with one seed."""
    bases = {case._replace(num_workers=BASE_WORKERS) for case in cases}
    tasks = [
        Search(base, num_prefill, row, (0,), bench.first_speed(base, num_prefill))
        for base in sorted(bases, key=lambda base: base.name)
        for num_prefill in range(1, BASE_WORKERS)
        for row in (*SPLIT_POLICIES, OURS)
    ]
    borne = crew.run(tasks)

    def best(base: Case, rows: Sequence[str]) -> int:
        of_rows = [task for task in tasks if task.case == base and task.row in rows]
        return max((borne[task][0].per_gpu_s, task.num_prefill) for task in of_rows)[1]

    found = {base: Split(best(base, SPLIT_POLICIES), best(base, (OURS,))) for base in bases}
    return {case: _scaled(found[case._replace(num_workers=BASE_WORKERS)], case.num_workers) for case in cases}


def _scaled(split: Split, num_workers: int) -> Split:
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
        ratios = [mine.per_gpu_s / others.per_gpu_s for mine, others in zip(borne[name], borne[best], strict=True)]
        rows[name] = {
            "num_prefill": split.of(name),
            "lru_hit_rate": lru_rates[split.of(name)],
            "goodput_per_gpu_s": asdict(interval([each.per_gpu_s for each in borne[name]])),
            "to_best_simple": asdict(interval(ratios)),
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
        "copies": case.stream[2],
        "lru_hit_rate": lru_rates[split.num_prefill],
        "best_simple": best,
        "policies": rows,
    }


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
    """All whose name has the pattern in it."""
    cases = [Case(trace, goals, size) for trace in traces for goals in (LOOSE, TIGHT) for size in sizes]
    return [case for case in cases if re.search(pattern, case.name)]


def run_cases(
    cases: Sequence[Case],
    policies_of: Mapping[Case, Sequence[str]],
    seeds: Sequence[int],
    bench: Bench,
    crew: Crew,
    splits: Mapping[Case, Split],
) -> list[dict[str, Any]]:
    """Search, then look at the loads."""
    searches = [
        Search(case, splits[case].of(row), row, tuple(seeds), bench.first_speed(case, splits[case].of(row)))
        for case in sorted(cases, key=lambda case: -case.num_workers)
        for row in reversed(policies_of[case])
    ]
    borne = crew.run(searches)
    base_speeds = {
        task.case: fmean(each.speed for each in borne[task]) for task in searches if task.row == "least-loaded"
    }
    looks = [
        Look(task.case, task.num_prefill, task.row, seed, base_speeds[task.case] * load)
        for task in searches
        for load in LOADS
        for seed in seeds
        if task.row not in ABLATIONS
    ]
    seen = crew.run(looks)
    reports: list[dict[str, Any]] = []
    for case in cases:
        found = {task.row: borne[task] for task in searches if task.case == case}
        by_policy = {policy: found[policy] for policy in policies_of[case]}
        by_load = {
            (policy, load): [
                seen[look]
                for look in looks
                if look.case == case and look.row == policy and look.speed == base_speeds[case] * load
            ]
            for policy in policies_of[case]
            if policy not in ABLATIONS
            for load in LOADS
        }
        workload, num_pages = bench.workloads[case.stream], bench.hardware.prefill.num_pages
        lru_rates = {num_prefill: lru_hit_rate(workload, num_prefill * num_pages) for num_prefill in splits[case]}
        reports.append(report_case(case, splits[case], policies_of[case], by_policy, by_load, lru_rates))
    return reports


def main(
    *,
    traces: Annotated[str, typer.Option(help="Folder of the whole traces; without it the slices of 60 rows.")] = "",
    only: Annotated[str, typer.Option(help="Cases whose name has this regular expression in it.")] = "",
    sizes: Annotated[str, typer.Option(help="Numbers of workers.")] = "4,8,16",
    ablation_sizes: Annotated[str, typer.Option(help="Those for which parts of ours are taken away, too.")] = "8",
    seeds: Annotated[int, typer.Option(min=1, max=10)] = 5,
    rows: Annotated[int, typer.Option(min=0, help="At most so many rows of each trace; 0: all.")] = 0,
    profile: Annotated[str, typer.Option(help="As for loadgen simulate.")] = "h200-8b",
    attainment: Annotated[float, typer.Option(min=0.01, max=0.9999)] = 0.9,
    prefill: Annotated[
        str, typer.Option(help="Prefill workers of 8, for all but ours and for ours, as 6,5; without it found.")
    ] = "",
    policies: Annotated[str, typer.Option(help="These alone, and least-loaded.")] = "",
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
) -> None:
    """Print the tables; exit with 1 if ours is behind anywhere."""
    cases = cases_of([*FILES, MIX], [int(size) for size in sizes.split(",")], only)
    if not cases:
        raise typer.BadParameter(f"--only {only}: no case has it in its name")
    with_parts = {int(size) for size in ablation_sizes.split(",") if size}
    policies_of = {
        case: _chosen(policies) or [*BASELINES, OURS, OWN_SPLIT, *(ABLATIONS if case.num_workers in with_parts else ())]
        for case in cases
    }
    began_s = time.monotonic()
    bases = [case._replace(num_workers=BASE_WORKERS) for case in cases]
    workloads = workloads_of([*cases, *bases], Path(traces) if traces else None, rows or None)
    bench = Bench(workloads, Hardware.read(profile), attainment)
    crew = Crew(bench, processes)
    if prefill:
        given = Split(*(int(num) for num in prefill.split(",")))
        splits = {case: _scaled(given, case.num_workers) for case in cases}
    else:
        splits = find_splits(cases, bench, crew)
    reports = run_cases(cases, policies_of, range(seeds), bench, crew, splits)
    crew.end()
    problems = [problem for report in reports for problem in problems_of(report)]
    console = Console(width=170)
    for report in reports:
        console.print(table_of(report, None))
        for load in LOADS:
            console.print(table_of(report, load))
    for problem in problems:
        console.print(f"behind: {problem}", highlight=False)
    if out:
        whole = {
            "problems": problems,
            "seeds": seeds,
            "attainment": attainment,
            "profile": bench.hardware.model_dump(mode="json"),
            "rows": rows or "all",
            "took_s": time.monotonic() - began_s,
            "machine": machine(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "cases": reports,
        }
        Path(out).write_text(json.dumps(whole, indent=1) + "\n")
    sys.exit(1 if problems else 0)


def _chosen(policies: str) -> list[str]:
    names = [name for name in policies.split(",") if name]
    return ["least-loaded", *(name for name in names if name != "least-loaded")] if names else []


if __name__ == "__main__":
    typer.run(main)
