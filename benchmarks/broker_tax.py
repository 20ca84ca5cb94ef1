"""What three brokers cost beside one: `python -m benchmarks.broker_tax`, each count of brokers in turn on one machine.

With three, each record is on all of them and acknowledged by two at least. Workers sleep for a step instead of
computing (`--fake-step-ms`), so that what differs is the log.
"""

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.machine import commit

RESULTS = Path(__file__).parent / "results"
BROKERS = (1, 3)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Runs with each number of brokers; the median counts.")] = 3,
    streams: Annotated[str, typer.Option(help="Loads: numbers of streams.")] = "1,16",
    seconds: Annotated[float, typer.Option(min=0.5, help="Measured part of each load.")] = 10.0,
    fake_step_ms: Annotated[float, typer.Option(min=0, help="Length of an engine's step.")] = 10.0,
    model: Annotated[Path | None, typer.Option(help="Model folder; by default SmolLM2-135M-Instruct.")] = None,
    out: Annotated[Path | None, typer.Option(help="The result; by default under benchmarks/results.")] = None,
    machine_name: Annotated[str, typer.Option(help="Ends the default result's name.")] = "machine",
    at_commit: Annotated[str, typer.Option("--commit", help="Where this copy has no git folder.")] = "",
) -> None:
    """Measure the log's hop and what a stream's tokens take on their way, with one broker and with three."""
    at_commit = at_commit or commit()
    options = ["--streams", streams, "--seconds", f"{seconds}", "--fake-step-ms", f"{fake_step_ms}"]
    options += ["--num-pages", "512", "--max-running", "32", "--commit", at_commit]
    options += ["--model", str(model)] if model else []
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in BROKERS}
    for _ in range(rounds):
        for number in BROKERS:
            runs[number].append(_run([*options, "--brokers", f"{number}"]))
    figures = {number: _medians([_figures(run) for run in runs[number]]) for number in BROKERS}
    one, three = (figures[number] for number in BROKERS)
    result = {
        "measure": "the log and the path with three brokers beside one",
        "command": shlex.join(["python", "-m", "benchmarks.broker_tax", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": at_commit,
        "machine": runs[1][0]["machine"],
        "rounds": rounds,
        "medians_ms": {f"{number} brokers": figures[number] for number in BROKERS},
        "ratio": {name: round(three[name] / one[name], 3) for name in one if one[name]},
        "runs": {f"{number} brokers": [_figures(run) for run in runs[number]] for number in BROKERS},
    }
    path = out or RESULTS / f"broker-tax-{time.strftime('%Y-%m-%d')}-{machine_name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("ms", *(f"{number} of {number}" for number in BROKERS), "ratio", "more")
    for name in one:
        more = three[name] - one[name]
        table.add_row(
            name, f"{one[name]:.2f}", f"{three[name]:.2f}", f"{result['ratio'].get(name, 0):.2f}", f"{more:.2f}"
        )
    console = Console()
    console.print(table)
    console.print(f"written to {path}")


def _run(options: list[str]) -> dict[str, Any]:
    with TemporaryDirectory(prefix="broker-tax-") as folder:
        out = Path(folder) / "result.json"
        subprocess.run([sys.executable, "-m", "benchmarks.control_plane", *options, "--out", str(out)], check=True)
        return json.loads(out.read_text())


def _figures(run: dict[str, Any]) -> dict[str, float]:
    """The figures that the log has a part in, by name, in milliseconds."""
    found: dict[str, float] = {}
    for name, times in run["path"]["log_hop"].items():
        _add(found, f"log hop, {name.removesuffix('_ms').replace('_', ' ')}", times)
    for load, measured in run["path"]["results"].items():
        _add(found, f"{load} streams, first token", measured["ttft_ms"])
        _add(found, f"{load} streams, gap between tokens", measured["gap_ms"])
        for hop, times in measured["hops_ms"].items():
            _add(found, f"{load} streams, {hop}", times)
    return found


def _add(found: dict[str, float], name: str, times: dict[str, float] | None) -> None:
    if times is not None:
        found |= {f"{name}, {part}": times[part] for part in ("p50", "p99")}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in rounds if name in each), 4) for name in rounds[0]}


if __name__ == "__main__":
    app()
