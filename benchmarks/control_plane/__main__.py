"""`python -m benchmarks.control_plane`: the message path against the same engine called directly, in one run."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.control_plane.loads import FULL, HALF, Load, Setup, calibrated_streams, check_pages, parse_names
from benchmarks.control_plane.machine import commit, machine
from benchmarks.control_plane.path import PathOptions, measure_path
from benchmarks.control_plane.profiler import py_spy_program
from benchmarks.control_plane.report import print_report
from benchmarks.control_plane.samples import added
from infra.local.model import MODEL_NAME, smollm2_folder
from loadgen.settings import parse_pairs
from shared.errors import StartupError

RESULTS = Path(__file__).parents[1] / "results"
ROLES = ("prefill", "decode")
DEFAULT_COUNTS = {"ingest": 1, "prefill": 1, "decode": 1, "edge": 1}

WIDTH_IN_FILES = 160

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path | None, typer.Option(help="Model folder; by default SmolLM2-135M-Instruct.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gpus: Annotated[str, typer.Option(metavar="P,D", help="GPUs of prefill and decode; bare takes decode's.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    num_pages: Annotated[int, typer.Option(min=2, help="KV pages of each engine, 64 tokens a page.")] = 2048,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that an engine runs at once.")] = 128,
    max_batch_tokens: Annotated[int, typer.Option(min=64, help="Token rows of one step.")] = 1024,
    streams: Annotated[str, typer.Option(help=f"Loads: numbers of streams, {HALF}, {FULL}.")] = f"1,16,64,{HALF}",
    seconds: Annotated[float, typer.Option(min=0.5, help="Measured part of each load.")] = 15.0,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output", min=3, help="Answer tokens.")] = 128,
    brokers: Annotated[int, typer.Option(min=1, help="Of Kafka; with 3 each record is on all of them.")] = 1,
    counts: Annotated[str, typer.Option(help="Processes, as prefill=1,decode=2,edge=1.")] = "",
    seed: Annotated[int, typer.Option(help="Of times and prompts.")] = 0,
    streams_per_client: Annotated[int, typer.Option(min=1, help="One client process serves so many.")] = 16,
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="More settings of all services.")] = None,
    fake_step_ms: Annotated[float | None, typer.Option(min=0, help="Sleep so long a step, compute nothing.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for py-spy profiles of the services.")] = None,
    profile_load: Annotated[str, typer.Option(help="The load that is profiled; default: the last.")] = "",
    out: Annotated[Path | None, typer.Option(help="The result; by default under benchmarks/results.")] = None,
    machine_name: Annotated[str, typer.Option(help="Ends the default result's name.")] = "machine",
    at_commit: Annotated[str, typer.Option("--commit", help="Where this copy has no git folder.")] = "",
    keep: Annotated[Path | None, typer.Option(help="Run folder to keep, with the services' logs.")] = None,
) -> None:
    """Measure what the path from client to engine and back adds.

    Exit status: 0 measured, 1 the run could not start or a part of it failed; the result then holds what was measured.
    """
    err = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH_IN_FILES)
    try:
        setup = Setup(
            model=str((model or smollm2_folder()).resolve()),
            model_name=model.resolve().name if model else MODEL_NAME,
            device=device,
            dtype=dtype,
            num_pages=num_pages,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seconds=seconds,
            seed=seed,
            fake_step_ms=fake_step_ms,
        )
        names = parse_names(streams)
        calibrated_streams(names, max_running)
        check_pages(setup)
        if profile_load and profile_load not in names:
            raise StartupError(f"--profile-load {profile_load}: it is one of --streams {streams}")
        if profile is not None:
            py_spy_program()
            profile.mkdir(parents=True, exist_ok=True)
        options = PathOptions(
            counts=DEFAULT_COUNTS | _counts(counts),
            brokers=brokers,
            gpus=_gpus(gpus),
            env=parse_pairs("--env", env or ()),
            streams_per_client=streams_per_client,
            profile=profile,
            profiled_load=profile_load or names[-1],
        )
        with TemporaryDirectory(prefix="control-plane-") as temporary:
            result = _run(setup, names, options, keep or Path(temporary), err)
    except StartupError as error:
        err.print(f"control_plane: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    result["commit"] = at_commit or commit()
    path = out or RESULTS / f"control-plane-{time.strftime('%Y-%m-%d')}-{machine_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print_report(err, result)
    err.print(f"written to {path}", highlight=False)
    if result["path"]["error"] is not None:
        raise typer.Exit(1)


def _run(setup: Setup, names: tuple[str, ...], options: PathOptions, run_dir: Path, err: Console) -> dict[str, Any]:
    def say(text: str) -> None:
        err.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    began_s, described = time.monotonic(), machine()
    run_dir.mkdir(parents=True, exist_ok=True)
    say("bare engine")
    bare = _bare(setup, names, options, run_dir)
    for calibration in bare["calibrations"]:
        say(f"bare, {calibration['streams']} streams: {calibration['requests_per_s']} requests a second")
    loads = [Load(**load) for load in bare["loads"]]
    path = asyncio.run(measure_path(setup, loads, options, run_dir, say))
    measured = [load for load in loads if load.name in path["results"]]
    saturating = bare["calibrations"][-1]["requests_per_s"]
    return {
        "measure": "the message path against the same engine called directly",
        "command": shlex.join(["python", "-m", "benchmarks.control_plane", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": None,
        "seconds": round(time.monotonic() - began_s, 1),
        "machine": described,
        "setup": asdict(setup) | {"model": Path(setup.model).name},
        "counts": dict(options.counts),
        "brokers": options.brokers,
        "gpus": dict(options.gpus),
        "env": dict(options.env),
        "saturating_requests_per_s": saturating,
        "share_of_saturation": {
            load.name: round(load.rate_per_s / saturating, 3) if load.rate_per_s else None for load in loads
        },
        "bare": bare,
        "path": path,
        "added": {
            load.name: added(
                path["results"][load.name],
                bare["results"][load.name],
                bare["results"][load.name]["decode_step"]["step_ms"]["mean"],
            )
            for load in measured
        },
    }


def _bare(setup: Setup, names: tuple[str, ...], options: PathOptions, run_dir: Path) -> dict[str, Any]:
    job_path, out_path = run_dir / "bare.job", run_dir / "bare.out"
    job_path.write_text(json.dumps({"setup": asdict(setup), "names": names}))
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(options.env)
    if "decode" in options.gpus:
        env["CUDA_VISIBLE_DEVICES"] = options.gpus["decode"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.control_plane.bare", str(job_path), str(out_path)], env=env, check=False
    )
    if done.returncode != 0:
        raise StartupError(f"the bare engine's process ended with status {done.returncode}")
    return json.loads(out_path.read_text())


def _counts(text: str) -> dict[str, int]:
    counts = parse_pairs("--counts", text.split(",") if text else ())
    for name, count in counts.items():
        if name not in DEFAULT_COUNTS or not count.isdecimal() or int(count) < 1:
            raise StartupError(f"--counts {name}={count}: write it as prefill=1,decode=2,ingest=1,edge=1")
    return {name: int(count) for name, count in counts.items()}


def _gpus(text: str) -> dict[str, str]:
    if not text:
        return {}
    numbers = text.split(",")
    if len(numbers) != len(ROLES):
        raise StartupError(f"--gpus {text}: write it as 0,1 (prefill's, decode's)")
    return dict(zip(ROLES, numbers, strict=True))


if __name__ == "__main__":
    app()
