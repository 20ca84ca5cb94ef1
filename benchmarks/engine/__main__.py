"""Command line; `--help` says the rest, `benchmarks/README.md` how to read the result."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine.build import RUNNERS, SHAPES, SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.machine import commit, machine, process_age_s
from benchmarks.engine.peer import PEERS
from benchmarks.engine.report import kernel_table, table
from benchmarks.engine.rows import FULL, TINY, Bench, Row

TRIAL_SHAPES = ("tiny", "small")
"""Shapes whose rows are small, to see that they can be measured."""

ALL_ROWS = "first,prefill,decode,throughput,sampling,mixed"


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    rows: Annotated[str, typer.Option(help="What to measure.")] = ALL_ROWS,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    runner: Annotated[str, typer.Option(help=f"One of {', '.join(RUNNERS)}; by default triton on cuda.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    max_batch_tokens: Annotated[int, typer.Option(help="Token rows of one step.")] = 8192,
    num_pages: Annotated[int, typer.Option(help="KV pages; 0 takes what the rows need.")] = 0,
    profile: Annotated[bool, typer.Option(help="Profile first tokens and decode steps at the end.")] = True,
    repeats: Annotated[int, typer.Option(help="Of each row; 0 takes the usual number.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure one engine alone on one device, and print it beside vLLM, the hardware's limits and the aims."""
    wanted = rows.split(",")
    unknown = set(wanted) - set(ALL_ROWS.split(","))
    if shape not in SHAPES or unknown:
        raise typer.BadParameter(f"--shape is one of {', '.join(SHAPES)}, --rows some of {ALL_ROWS}")
    sizes = TINY if shape in TRIAL_SHAPES else FULL
    sizes = sizes.with_repeats(repeats) if repeats else sizes
    plan = BenchPlan(
        device=device,
        dtype=dtype,
        runner=runner or ("triton" if device == "cuda" else "torch"),
        num_pages=num_pages or sizes.num_pages,
        max_running=sizes.num_rows,
        max_batch_tokens=max_batch_tokens,
    )
    built, start = start_engine(shape, plan, SPEED_WEIGHTS)
    engine = built.engine
    start_s = process_age_s()
    say(f"ready after {start_s:.1f} s: {built.runs}; {asdict(start)}, {engine.limits}")
    bench = Bench(engine, sizes, on_cuda=device == "cuda", seed=seed)
    measured = [Row("start to ready", "s", start_s, [start.weights_s, start.ready_s])]
    for name, measure in bench.groups().items():
        if name in wanted:
            began_s = time.perf_counter()
            measured += measure()
            say(f"{name}: {time.perf_counter() - began_s:.1f} s")
    if profile:
        profiles = bench.profiles({row.name for row in measured})
        measured = [replace(row, profile=profiles.get(row.name)) for row in measured]
    engine.check()
    result = {
        "shape": shape,
        "runs": built.runs,
        "plan": asdict(plan),
        "limits": asdict(engine.limits),
        "start": asdict(start),
        "rows": [asdict(row) for row in measured],
        "late_work": built.late_work(),
        "num_preemptions": engine.stats().num_preemptions,
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": revision or commit(),
        "took_s": round(process_age_s(), 1),
    }
    if out:
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{table(measured, PEERS.get(shape, {}))}\n\n{kernel_table(measured)}\n")
    sys.stdout.write(f"\nafter ready: {built.late_work()}; {engine.limits}; {result['took_s']} s in all\n")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    typer.run(main)
