"""`python -m loadgen simulate` and `python -m loadgen plan`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadgen.simulator.hardware import Hardware
from loadgen.simulator.outcome import Outcome, lru_hit_rate, outcome_of
from loadgen.simulator.policies import OURS, Goals, contender, policy_names
from loadgen.simulator.search import find_speed
from loadgen.simulator.sent import is_schedule, read_schedule
from loadgen.simulator.simulation import Setup, simulate
from loadgen.simulator.sizing import Plan, Sizing, Split
from loadgen.simulator.tables import comparison, console, sizes
from loadgen.simulator.workload import Workload, build_workload
from loadgen.traces import read_trace
from shared.errors import StartupError

EXIT_CANNOT = 2

Traces = Annotated[
    list[Path],
    typer.Argument(help="Mooncake .jsonl or Azure .csv; several are mixed. Or one file of replay's --save-schedule"),
]
Profile = Annotated[str, typer.Option(help="name of a profile that comes with it, or a JSON file")]
Speed = Annotated[float, typer.Option(min=0.0001, help="the trace's clock runs so many times faster")]
Rows = Annotated[int | None, typer.Option(min=1, help="at most so many rows")]
MaxInput = Annotated[int | None, typer.Option(min=1, help="leave out conversations with a longer prompt")]
Copies = Annotated[int, typer.Option(min=1, help="each row comes so often, in conversations of its own")]
HostGb = Annotated[
    float, typer.Option(min=0, max=100_000, help="host memory of each worker for pages that left its GPU, in GB")
]
Ttft = Annotated[float, typer.Option(min=0.000001, help="goal for the first token, in seconds")]
Tpot = Annotated[float, typer.Option(min=0.000001, help="goal for the mean of the later tokens, in seconds")]
Attainment = Annotated[float, typer.Option(min=0.01, max=0.9999, help="share of requests that keep both goals")]
PolicyNames = Annotated[list[str] | None, typer.Option("--policy", help=f"one or more of {', '.join(policy_names())}")]


def simulate_command(
    traces: Traces,
    prefill: Annotated[int, typer.Option(min=1, help="prefill workers")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="decode workers")] = 1,
    speed: Speed = 1.0,
    policy: PolicyNames = None,
    profile: Profile = "h200-8b",
    seeds: Annotated[int, typer.Option(min=1, max=10, help="runs of each policy, with seeds from 0 on")] = 1,
    ttft: Ttft = 2.0,
    tpot: Tpot = 0.1,
    rows: Rows = None,
    max_input: MaxInput = None,
    copies: Copies = 1,
    host_gb: HostGb = 0.0,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="a next turn shares its parent's answer too")
    ] = True,
    max_wait: Annotated[
        float | None, typer.Option(min=0, help="refuse who would wait longer for a placement, in seconds")
    ] = None,
    goodput: Annotated[
        bool,
        typer.Option("--goodput", help="search for the speed at which --attainment of the requests keep the goals"),
    ] = False,
    attainment: Attainment = 0.9,
    save: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    """Run a trace through Baton's placement in virtual time and say what its users would have felt."""
    out, err = console(), Console(stderr=True)
    try:
        hardware = _hardware(profile, host_gb)
        goals = Goals(ttft, tpot)
        names = policy or [OURS]
        for name in names:
            contender(name, goals, 0)
        workload = _workload(traces, rows, max_input, copies, history=history)
        setup = Setup(hardware, prefill, decode, speed=speed, max_wait_s=max_wait)
        if goodput:
            speeds = {name: _find(workload, name, goals, setup, attainment, err) for name in names}
        else:
            speeds = dict.fromkeys(names, speed)
        runs = {
            name: [_run(workload, name, goals, replace(setup, speed=speeds[name], seed=seed)) for seed in range(seeds)]
            for name in names
        }
        lru_rate = lru_hit_rate(workload, prefill * hardware.prefill.num_pages)
        first = next(iter(runs.values()))[0]
        title = (
            f"{' + '.join(trace.name for trace in traces)}: {first.num_requests} requests, {prefill} prefill + "
            f"{decode} decode of {hardware.name}, goals {ttft:g} s / {tpot * 1000:g} ms"
        )
        if not goodput:
            title += f", speed {speed:g} ({first.rate_per_s:.3g} requests/s)"
        out.print(comparison(title, runs, lru_rate))
        out.print(f"one LRU of all {prefill} prefill workers' pages: hit rate {lru_rate:.1%}")
        for name, each in runs.items():
            if goodput:
                per_gpu = each[0].rate_per_s / (prefill + decode)
                out.print(f"{name}: speed {speeds[name]:.3g}, {per_gpu:.3g} requests/s per GPU at {attainment:.0%}")
            for note in _notes(each):
                out.print(f"{name}: {note}")
        if save is not None:
            _save(save, runs)
    except StartupError as error:
        err.print(f"loadgen: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_CANNOT) from error


def _notes(runs: Sequence[Outcome]) -> Iterator[str]:
    """What else befell requests of a policy, of those in all of its runs."""
    num = sum(run.num_requests for run in runs)
    if num_refused := sum(run.num_refused for run in runs):
        yield f"{num_refused} of {num} requests were refused, as too long or after --max-wait"
    if num_preemptions := sum(run.num_preemptions for run in runs):
        yield f"{num_preemptions} times a row lost its pages to older ones and was computed again"
    if num_held_back := sum(run.num_held_back for run in runs):
        yield f"{num_held_back} of {num} waited for their parent's answer, against the trace's clock"


def _save(path: Path, runs: Mapping[str, Sequence[Outcome]]) -> None:
    text = json.dumps({name: [asdict(run) for run in each] for name, each in runs.items()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise StartupError(f"--save {path}: {error}") from error


def plan_command(
    traces: Traces,
    speed: Speed = 1.0,
    policy: Annotated[str, typer.Option(help=f"one of {', '.join(policy_names())}")] = OURS,
    profile: Profile = "h200-8b",
    ttft: Ttft = 2.0,
    tpot: Tpot = 0.1,
    attainment: Attainment = 0.9,
    rows: Rows = None,
    max_input: MaxInput = None,
    copies: Copies = 1,
    host_gb: HostGb = 0.0,
    max_workers: Annotated[int, typer.Option(min=2, max=256, help="give up beyond so many")] = 64,
    seed: Annotated[int, typer.Option(help="of arrivals and ties")] = 0,
) -> None:
    """How many prefill and decode workers a trace needs, and why not fewer."""
    out, err = console(), Console(stderr=True)
    goals = Goals(ttft, tpot)
    try:
        hardware = _hardware(profile, host_gb)
        contender(policy, goals, seed)
        workload = _workload(traces, rows, max_input, copies, history=True)

        def run(split: Split) -> Outcome:
            setup = Setup(hardware, split.num_prefill, split.num_decode, speed=speed, seed=seed)
            outcome = _run(workload, policy, goals, setup)
            err.print(f"{split}: {outcome.attainment:.1%}", highlight=False)
            return outcome

        plan = Sizing(run, attainment, max_workers).plan()
        out.print(sizes(plan, goals))
        out.print(reason(plan, goals, attainment), highlight=False, soft_wrap=True)
        if plan.chosen is None:
            raise StartupError(
                f"--max-workers {max_workers}: not enough for --attainment {attainment:g} at --speed {speed:g}"
            )
    except StartupError as error:
        err.print(f"loadgen: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_CANNOT) from error


def reason(plan: Plan, goals: Goals, wanted: float) -> str:
    """The answer in words."""
    if plan.chosen is None:
        assert plan.best_of_fewer is not None
        best = plan.best_of_fewer
        return f"not enough: {best.split}, the best of {best.split.num}, keep {_kept(best.outcome, goals)}"
    chosen = plan.chosen
    text = f"{chosen.split}: {_kept(chosen.outcome, goals)}, {wanted:.0%} are wanted."
    if plan.best_of_fewer is None:
        return f"{text} Fewer there cannot be."
    fewer = plan.best_of_fewer
    return f"{text} One less, best as {fewer.split}: {_kept(fewer.outcome, goals)}."


def _kept(outcome: Outcome, goals: Goals) -> str:
    def beside(times_s: tuple[float, ...], goal_s: float) -> str:
        return f"{times_s[1]:.3g} s at p90 of {goal_s:g}" if times_s else "none"

    return (
        f"{outcome.attainment:.1%} (first token {beside(outcome.ttft_s, goals.ttft_s)}, each later one "
        f"{beside(outcome.tpot_s, goals.tpot_s)}; prefill {outcome.busy_prefill:.0%} busy, decode "
        f"{outcome.busy_decode:.0%})"
    )


def _hardware(profile: str, host_gb: float) -> Hardware:
    hardware = Hardware.read(profile)
    if not host_gb:
        return hardware
    num_host_pages = int(host_gb * 1e9 / hardware.page_bytes)
    return hardware.model_copy(
        update={
            "prefill": hardware.prefill.model_copy(update={"num_host_pages": num_host_pages}),
            "decode": hardware.decode.model_copy(update={"num_host_pages": num_host_pages}),
        }
    )


def _workload(traces: list[Path], rows: int | None, max_input: int | None, copies: int, *, history: bool) -> Workload:
    if any(is_schedule(path) for path in traces):
        if len(traces) > 1 or rows is not None or max_input is not None or copies > 1:
            raise StartupError(
                f"{traces[0]} is a schedule: it is taken as it is, without --rows, --max-input, --copies"
            )
        return read_schedule(traces[0])
    return build_workload(
        [(path.stem, read_trace(path)) for path in traces],
        max_input=max_input,
        num_rows=rows,
        copies=copies,
        history=history,
    )


def _run(workload: Workload, name: str, goals: Goals, setup: Setup) -> Outcome:
    chosen = contender(name, goals, setup.seed)
    finished = simulate(workload, chosen.policy, chosen.lengths, replace(setup, gauges=chosen.gauges))
    return outcome_of(finished, goals)


def _find(workload: Workload, name: str, goals: Goals, setup: Setup, wanted: float, err: Console) -> float:
    def attainment_at(speed: float) -> float:
        attainment = _run(workload, name, goals, replace(setup, speed=speed)).attainment
        err.print(f"{name} at speed {speed:.3g}: {attainment:.1%}", highlight=False)
        return attainment

    found = find_speed(attainment_at, wanted, setup.speed)
    if not found.is_bracketed:
        raise StartupError(
            f"--attainment {wanted:g}: {name} did not cross it between speeds "
            f"{min(probe.speed for probe in found.probes):.3g} and {max(probe.speed for probe in found.probes):.3g}"
        )
    return found.speed
