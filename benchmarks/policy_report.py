"""A case in numbers: how much each policy bears, what its users feel, and where ours is behind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.policy_cases import OWN_SPLIT, Case, Split
from loadgen.simulator.baselines import BASELINES
from loadgen.simulator.outcome import Interval, Outcome, interval
from loadgen.simulator.policies import OURS
from loadgen.simulator.tables import latencies, percent

LOADS = (0.7, 0.9, 1.1)
"""Of what least-loaded bears."""


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
