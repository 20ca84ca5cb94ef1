"""`python -m infra.local up | down | status | setup`: the local stack from the command line."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from infra.local.composition import Composition
from infra.local.kafka import java_program, kafka_jars
from infra.local.model import MODEL_NAME, smollm2_folder
from infra.local.redis import server_program
from infra.local.stack import local_stack
from infra.local.state_file import ProcessRecord, StackPhase, StackRecord, StateFile, kill_left_behind
from shared.errors import StartupError

DEFAULT_RUN_DIR = Path(".run")
LOOK_INTERVAL_S = 0.1
CPU_SAMPLE_S = 0.3
DOWN_WITHIN_S = 120.0
PIPE_COLUMNS = 200

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)

RunDir = Annotated[Path, typer.Option(help="Folder of state, logs and data.")]


@app.command()
def up(
    *,
    ingest: Annotated[int, typer.Option(help="Ingest processes.", min=0)] = 1,
    prefill: Annotated[int, typer.Option(help="Prefill workers.", min=0)] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.", min=0)] = 2,
    edge: Annotated[int, typer.Option(help="Edges.", min=0)] = 1,
    model: Annotated[str, typer.Option(help="Folder of a model; by default SmolLM2-135M-Instruct.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    prefill_gpus: Annotated[str, typer.Option(help="GPUs of the prefill workers in turn, as in 0,1.")] = "",
    decode_gpus: Annotated[str, typer.Option(help="GPUs of the decode workers in turn.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    num_pages: Annotated[
        int | None,
        typer.Option(help="KV pages of each worker, 64 tokens a page; by default 512, on GPUs as many as fit.", min=2),
    ] = None,
    brokers: Annotated[int, typer.Option(help="Kafka brokers: 1, or 3 that may lose one.", min=1)] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of a process that dies.", min=0)] = 3,
    run_dir: RunDir = DEFAULT_RUN_DIR,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C.")] = False,
) -> None:
    """Start the stack; returns when it is ready, and it goes on in the background."""
    counts = {"ingest": ingest, "prefill": prefill, "decode": decode, "edge": edge}
    composition = Composition(
        counts=counts,
        model=model or (str(_fetch_model()) if any(counts.values()) else ""),
        model_name="" if model else MODEL_NAME,
        device=device,
        gpus={service: gpus for service, gpus in (("prefill", prefill_gpus), ("decode", decode_gpus)) if gpus},
        dtype=dtype,
        num_pages=num_pages,
        max_restarts=max_restarts,
        brokers=brokers,
    )
    if foreground:
        asyncio.run(_serve(composition, run_dir))
        return
    record = StateFile(run_dir).read()
    if record is not None and record.lives():
        _already_up(record, composition)
        return
    if record is not None:
        _down(run_dir)
    _fetch_jars()
    _up_in_background(run_dir, sys.argv[1:])


def _already_up(record: StackRecord, composition: Composition) -> None:
    if record.composition != asdict(composition):
        raise StartupError("a stack of another composition runs; stop it first with `make down`")
    console.print("the stack runs already")
    _print_addresses(record)


def _up_in_background(run_dir: Path, arguments: list[str]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    log_path = run_dir / "supervisor.log"
    with log_path.open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "infra.local", *arguments, "--foreground"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        record = _follow_until_ready(supervisor, log_path, StateFile(run_dir))
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    if record is None:
        raise typer.Exit(1)
    _print_addresses(record)


def _follow_until_ready(
    supervisor: subprocess.Popen[bytes], log_path: Path, state_file: StateFile
) -> StackRecord | None:
    """Shows what the supervisor says; its record when the stack is ready, None when it ended instead."""
    with log_path.open(encoding="utf-8", errors="replace") as log:
        while True:
            ended = supervisor.poll() is not None
            record = state_file.read()
            console.print(log.read(), end="", markup=False)
            if ended:
                return None
            if record is not None and record.pid == supervisor.pid and record.phase is StackPhase.READY:
                return record
            time.sleep(LOOK_INTERVAL_S)


async def _serve(composition: Composition, run_dir: Path) -> None:
    """Runs the stack until a signal asks it to stop."""
    task = asyncio.current_task()
    assert task is not None
    asked_by: list[signal.Signals] = []

    def ask(signal_number: signal.Signals) -> None:
        asked_by.append(signal_number)
        if len(asked_by) == 1:  # while it stops, more signals change nothing: each wait has its limit
            task.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signal_number, ask, signal_number)
    try:
        async with local_stack(composition, run_dir, report=lambda line: console.print(line, markup=False)):
            console.print("the stack is ready")
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not asked_by:
            raise
        console.print(f"stopped by {asked_by[0].name}")


@app.command()
def down(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Stop the stack and whatever a crashed supervisor left behind."""
    console.print("stopped" if _down(run_dir) else "no stack runs")


def _down(run_dir: Path) -> bool:
    state_file = StateFile(run_dir)
    record = state_file.read()
    if record is None:
        return False
    if record.lives():
        os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_WITHIN_S
        while record.lives() and time.monotonic() < deadline:
            record = state_file.read() or record
            time.sleep(LOOK_INTERVAL_S)
        if record.lives():
            console.print(f"the supervisor did not stop within {DOWN_WITHIN_S:g} s and is killed")
            os.kill(record.pid, signal.SIGKILL)
    left = kill_left_behind(record)
    if left:
        console.print(f"killed what was left behind: {', '.join(left)}")
    state_file.remove()
    return True


@app.command()
def status(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Show the processes of the stack; fails where none runs."""
    record = StateFile(run_dir).read()
    if record is None or not record.lives():
        console.print("no stack runs" if record is None else "the supervisor is gone; `make down` cleans up")
        raise typer.Exit(1)
    console.print(f"the stack is {record.phase}; logs are in {run_dir / 'logs'}")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("process", "state", "pid", "address", "up for", "restarts", "CPU %", "MiB"):
        numeric = column not in ("process", "state", "address")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for process, row in zip(record.processes, _usage(record.processes), strict=True):
        table.add_row(process.name, process.phase, str(process.pid), process.address, *row)
    console.print(table)


def _usage(processes: tuple[ProcessRecord, ...]) -> list[tuple[str, str, str, str]]:
    """Uptime, restarts, CPU and memory of each process."""
    living = {process.name: psutil.Process(process.pid) for process in processes if process.lives()}
    for watched in living.values():
        watched.cpu_percent()
    time.sleep(CPU_SAMPLE_S)
    rows: list[tuple[str, str, str, str]] = []
    for process in processes:
        watched = living.get(process.name)
        if watched is None:
            rows.append(("-", str(process.restarts), "-", "-"))
            continue
        up_for_s = time.time() - watched.create_time()
        memory_mib = watched.memory_info().rss / 2**20
        rows.append((f"{up_for_s:.0f} s", str(process.restarts), f"{watched.cpu_percent():.1f}", f"{memory_mib:.0f}"))
    return rows


@app.command()
def setup() -> None:
    """Fetch once what the stack needs beside the Python environment: Kafka's jars and the model."""
    _fetch_jars()
    model = _fetch_model()
    console.print(f"Java    {java_program()}\nKafka   {kafka_jars()}\nRedis   {server_program()}\nmodel   {model}")


def _fetch_jars() -> Path:
    with console.status("fetching Kafka's jars (once)"):
        return kafka_jars()


def _fetch_model() -> Path:
    with console.status("fetching and converting SmolLM2-135M-Instruct (once, about a minute)"):
        return smollm2_folder()


def _print_addresses(record: StackRecord) -> None:
    for process in record.processes:
        console.print(f"{process.name:12} {process.address}")


def main() -> None:
    """Runs a command; what it cannot do is one clear line, not a traceback."""
    try:
        app()
    except StartupError as error:
        console.print(f"baton: {error}", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
