"""Runs as tables for people."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from loadgen.simulator.outcome import Interval, Outcome, interval
from loadgen.simulator.policies import Goals
from loadgen.simulator.sizing import Plan, Tried

MIN_WIDTH = 140


def comparison(title: str, outcomes: Mapping[str, Sequence[Outcome]], lru_rate: float) -> Table:
    """A row for each policy, over its seeds."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for name in ("goals kept", "TTFT s\np50 / p90 / p99", "TPOT ms\np50 / p90 / p99", "hit\nrate", "of\nLRU", "local"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fetched\ntokens", justify="right", no_wrap=True)
    table.add_column("busy\np/d", justify="right", no_wrap=True)
    for name, runs in outcomes.items():
        hit = interval([run.hit_rate for run in runs])
        table.add_row(
            name,
            percent(interval([run.attainment for run in runs])),
            latencies([run.ttft_s for run in runs], 1.0, 3),
            latencies([run.tpot_s for run in runs], 1000.0, 1),
            f"{hit.mean:.1%}",
            f"{hit.mean / lru_rate:.0%}" if lru_rate else "",
            f"{fmean(run.num_local / run.num_requests for run in runs):.0%}",
            f"{fmean(run.num_fetched_tokens for run in runs):.3g}",
            f"{fmean(run.busy_prefill for run in runs):.0%}/{fmean(run.busy_decode for run in runs):.0%}",
        )
    return table


def sizes(plan: Plan, goals: Goals) -> Table:
    """All splits that were tried."""
    title = f"splits tried, goals {goals.ttft_s:g} s / {goals.tpot_s * 1000:g} ms"
    table = Table(title=title, title_justify="left")
    for name in ("workers", "prefill", "decode", "goals\nkept", "TTFT s\np50 / p90 / p99", "TPOT ms\np50 / p90 / p99"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("busy\np/d", justify="right", no_wrap=True)
    for tried in sorted(plan.tried, key=lambda tried: (tried.split.num, tried.split.num_prefill)):
        table.add_row(*_size(tried), style="bold" if tried is plan.chosen else None)
    return table


def _size(tried: Tried) -> tuple[str, ...]:
    split, outcome = tried.split, tried.outcome
    return (
        str(split.num),
        str(split.num_prefill),
        str(split.num_decode),
        f"{outcome.attainment:.1%}",
        latencies([outcome.ttft_s], 1.0, 3),
        latencies([outcome.tpot_s], 1000.0, 1),
        f"{outcome.busy_prefill:.0%}/{outcome.busy_decode:.0%}",
    )


def console() -> Console:
    """Where tables go: a narrow terminal breaks their lines, but every number is there."""
    return Console(width=max(Console().width, MIN_WIDTH))


def percent(share: Interval) -> str:
    return f"{share.mean:.1%}±{100 * share.half:.1f}" if share.half else f"{share.mean:.1%}"


def latencies(runs: Iterable[tuple[float, ...]], factor: float, digits: int) -> str:
    """Mean of each percentile over runs."""
    return " / ".join(f"{factor * fmean(column):.{digits}f}" for column in zip(*runs, strict=True))
