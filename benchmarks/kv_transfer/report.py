"""What was measured, beside the aims, as lines."""

from collections.abc import Mapping, Sequence
from math import ceil
from statistics import mean, median
from typing import Any

PULL_AIMS_MS = {1024: 1.0, 4096: 2.4, 16384: 7.0, 32768: 13.5}
TOGETHER_AIM_MS = 3.9
IDLE_AIM_PERCENT = 5.0
COPIES_AIM_MS = 0.55
SLOWDOWN_AIMS_PERCENT = {("decode", "paced"): 3.0, ("decode", "full"): 30.0, ("prefill", "paced"): 5.0}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def pull_row(num_tokens: int, num_bytes: int, times_ms: Sequence[float]) -> dict[str, Any]:
    p50_ms = median(times_ms)
    return {
        "tokens": num_tokens,
        "mib": num_bytes / 2**20,
        "p50_ms": p50_ms,
        "p90_ms": percentile(times_ms, 0.9),
        "min_ms": min(times_ms),
        "gb_per_s": num_bytes / p50_ms / 1e6,
        "all_ms": [round(each, 3) for each in times_ms],
    }


def slowdown(with_ms: Sequence[float], without_ms: Sequence[float]) -> dict[str, float]:
    """Of steps: percent by which the median and the mean are longer."""
    return {
        "median_ms": median(with_ms),
        "mean_ms": mean(with_ms),
        "p99_ms": percentile(with_ms, 0.99),
        "median_percent": 100 * (median(with_ms) / median(without_ms) - 1),
        "mean_percent": 100 * (mean(with_ms) / mean(without_ms) - 1),
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """The whole result; parts that were not measured are left out."""
    parts = {
        "link": _link,
        "pulls": _pulls,
        "together": _together,
        "idle": _idle,
        "formats": _formats,
        "interference": _interference,
    }
    return [line for name, show in parts.items() if name in result for line in show(result[name])]


def _link(link: Mapping[str, Any]) -> list[str]:
    speed = link["speed"] or {"bytes_per_s": 0.0, "latency_s": 0.0}
    found = f"{link['transport']}, {speed['bytes_per_s'] / 1e9:.1f} GB/s, {1e6 * speed['latency_s']:.0f} µs"
    return [f"link: {found}; connected and measured in {link['took_ms']:.0f} ms; {link['warning'] or 'no warning'}"]


def _pulls(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = ["", "| tokens | MiB | p50 ms | aim | p90 | min | GB/s | equal |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        aim = PULL_AIMS_MS.get(row["tokens"])
        told.append(
            f"| {row['tokens']} | {row['mib']:.0f} | {row['p50_ms']:.2f}{_mark(row['p50_ms'], aim)} | {aim} | "
            f"{row['p90_ms']:.2f} | {row['min_ms']:.2f} | {row['gb_per_s']:.0f} | {row['equal']} |"
        )
    told += ["", "Phases of a pull, ms:"]
    for row in rows:
        told += [f"{row['tokens']}: " + ", ".join(f"{name} {value}" for name, value in row["phases_ms"].items())]
    for row in rows:
        told += ["", f"A pull of {row['tokens']} tokens, µs: began, ended, where, what", *row["timeline"]]
    return told


def _together(row: Mapping[str, Any]) -> list[str]:
    p50_ms = row["p50_ms"]
    return [
        "",
        f"{row['at_once']} × {row['tokens']} tokens at once, ms: p50 {p50_ms:.2f}{_mark(p50_ms, TOGETHER_AIM_MS)}",
        f"  aim {TOGETHER_AIM_MS}, p90 {row['p90_ms']:.2f}, min {row['min_ms']:.2f}; {row['gb_per_s']:.0f} GB/s",
    ]


def _idle(idle: Mapping[str, float]) -> list[str]:
    return [
        "idle, % of a core: "
        + ", ".join(f"{end} {share:.1f}{_mark(share, IDLE_AIM_PERCENT)}" for end, share in idle.items())
    ]


def _formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [
        "",
        "| form | share of bytes | pack ms | unpack ms | both | aim | largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        both_ms = row["pack_ms"] + row["unpack_ms"]
        told.append(
            f"| {row['format']} | {row['share']} | {row['pack_ms']:.3f} | {row['unpack_ms']:.3f} | "
            f"{both_ms:.3f}{_mark(both_ms, COPIES_AIM_MS)} | {COPIES_AIM_MS} | {row['largest_error']:.3g} |"
        )
    return told


def _interference(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [
        "",
        "| engine's steps | pulls meanwhile | median ms | mean | p99 | slower: median % | mean % | aim % | GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        aim = SLOWDOWN_AIMS_PERCENT.get((row["work"], row["stream"]))
        times = " | ".join(f"{row[name]:.3f}" for name in ("median_ms", "mean_ms", "p99_ms"))
        told.append(
            f"| {row['work']} | {row['stream']} | {times} | "
            f"{row['median_percent']:+.1f} | {row['mean_percent']:+.1f}{_mark(row['mean_percent'], aim)} | "
            f"{'' if aim is None else aim} | {row['gb_per_s']:.1f} |"
        )
    return told


def _mark(value: float, aim: float | None) -> str:
    """Says that an aim is missed."""
    return " (!)" if aim is not None and value > aim else ""
