"""`python -m benchmarks.start --model FOLDER`: how long a worker's engine takes to be ready, cold and warm.

Each start is a process of its own, and its times count from the start of that process.

Cold: Triton's compile cache is an empty temporary folder, and the kernel was told to drop the checkpoint's files from
its page cache (posix_fadvise; what is not yet written to the disk stays). Python and the libraries may be cached.
Warm: the same again, with the compile cache and the page cache that the cold start has left.

The engine is one with a worker's defaults, without the worker around it: no log, no store, no staging buffers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.drive import Work, greedy, run_all
from benchmarks.engine.machine import commit, machine, process_age_s
from shared.engine.start import EnginePlan, StartedEngine, start_engine
from shared.transfer.staging import staging_bytes

PROMPT_TOKENS = 200
ANSWER_TOKENS = 16
NUM_LATER_REQUESTS = 20

REPORT_INTERVAL_S = 1.0
"""Between two points of the reading of the weights."""

START_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the GPU, when the engine is ready, in bytes.

    Attributes:
        taken: by this process, but for what CUDA itself takes when it is opened.
        reserved: by PyTorch, of that.
        peak: weights and largest step together, as measured before pages were allocated.
    """

    total: int
    free: int
    taken: int
    reserved: int
    peak: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start; what ends in `_s` is the moment, in seconds since the process was started, unless it says otherwise.

    Attributes:
        runs: what computes the steps, in words.
        imported_s: Python runs, and torch and all modules but the Triton runner are imported.
        opened_s: CUDA is there.
        read: moments while weights were read, and the bytes read by then; the last has them all.
        loaded_s: weights are there, kernels compiled, the largest step has run.
        ready_s: pages allocated, every shape of a step run, graphs captured.
        first_request_s: duration of the first request.
        later_request_s: median duration of the next NUM_LATER_REQUESTS.
        late_at_ready, late_in_the_end: compiled, captured or allocated since the warm-up, before the first request and
            behind the last; None where nothing counts it.
        memory: None on a CPU.
    """

    runs: str
    num_pages: int
    weight_bytes: int
    kv_bytes: int
    imported_s: float
    opened_s: float
    read: list[tuple[float, int]]
    loaded_s: float
    ready_s: float
    first_request_s: float
    later_request_s: float
    late_at_ready: dict[str, Any] | None
    late_in_the_end: dict[str, Any] | None
    memory: Memory | None


class ReadingTimes:
    """Keeps when how many bytes of the weights were there: first, last, and about once a second between."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self.points: list[tuple[float, int]] = []

    def __call__(self, num_read: int, num_bytes: int) -> None:
        """See `shared.engine.weight_reading.Report`."""
        now_s = self._clock_s()
        if not self.points or num_read == num_bytes or now_s - self.points[-1][0] >= REPORT_INTERVAL_S:
            self.points.append((now_s, num_read))


def worker_plan(model: Path, device: str, max_batch_tokens: int) -> EnginePlan:
    """The engine that a worker starts where its environment says only this much."""
    on_cuda = device == "cuda"
    return EnginePlan(
        folder=model,
        name="model",
        device=torch.device(device),
        dtype=None,
        kernels="triton" if on_cuda else "torch",
        num_pages=None if on_cuda else 256,
        gpu_memory_share=0.9,
        reserved_bytes=staging_bytes(device),
        max_running=256 if on_cuda else 32,
        max_batch_tokens=max_batch_tokens,
    )


def start_here(plan: EnginePlan) -> Start:
    """Start the engine in this process and send it requests, one after another."""
    zero_s = time.perf_counter() - process_age_s()

    def clock_s() -> float:
        return time.perf_counter() - zero_s

    on_cuda = plan.device.type == "cuda"
    imported_s = clock_s()
    free_before = torch.cuda.mem_get_info()[0] if on_cuda else 0
    opened_s = clock_s()
    reading = ReadingTimes(clock_s)
    started = start_engine(plan, reading, clock_s)
    ready_s = clock_s()
    memory = _memory(started, free_before) if on_cuda else None
    late_at_ready = _late_work(started)
    first_request_s, *later_s = _request_times(started)
    return Start(
        runs=started.runs,
        num_pages=started.engine.limits.num_pages,
        weight_bytes=started.weight_bytes,
        kv_bytes=started.kv_bytes,
        imported_s=imported_s,
        opened_s=opened_s,
        read=reading.points,
        loaded_s=ready_s - started.warm_up_s,
        ready_s=ready_s,
        first_request_s=first_request_s,
        later_request_s=median(later_s),
        late_at_ready=late_at_ready,
        late_in_the_end=_late_work(started),
        memory=memory,
    )


def _request_times(started: StartedEngine) -> list[float]:
    work = Work(started.engine.model.vocab_size, seed=1)
    requests = work.requests(1 + NUM_LATER_REQUESTS, PROMPT_TOKENS, greedy(ANSWER_TOKENS))
    return [run_all(started.engine, [request]) for request in requests]


def _late_work(started: StartedEngine) -> dict[str, Any] | None:
    return None if started.late_work is None else asdict(started.late_work())


def _memory(started: StartedEngine, free_before: int) -> Memory:
    free, total = torch.cuda.mem_get_info()
    assert started.peak_bytes is not None
    return Memory(total, free, free_before - free, torch.cuda.memory_reserved(), started.peak_bytes)


def start_elsewhere(model: Path, device: str, max_batch_tokens: int, triton_cache: Path) -> dict[str, Any]:
    """The fields of a `Start` in a fresh process. Raises CalledProcessError or TimeoutExpired if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "start.json"
        options = ["--model", str(model), "--device", device, "--max-batch-tokens", str(max_batch_tokens)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.start", *options, "--in-this-process", "--out", str(out)],
            env=os.environ | {"TRITON_CACHE_DIR": str(triton_cache)},
            cwd=Path(__file__).parents[1],
            timeout=START_TIMEOUT_S,
            check=True,
        )
        return json.loads(out.read_text())


def drop_from_page_cache(model: Path) -> None:
    """Tell the kernel that nobody needs these weights in memory."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timeline(start: Mapping[str, Any]) -> str:
    """A start as lines for people."""
    first_s, later_s, memory = start["first_request_s"], start["later_request_s"], start["memory"]
    lines = [
        f"{start['imported_s']:7.2f} s  imported",
        f"{start['opened_s']:7.2f} s  device opened",
        *(f"{at_s:7.2f} s    {num_bytes / 1e9:.2f} GB of weights read" for at_s, num_bytes in start["read"]),
        f"{start['loaded_s']:7.2f} s  loaded: weights read, kernels compiled, largest step run",
        f"{start['ready_s']:7.2f} s  ready: {start['runs']}; {start['num_pages']} pages",
        f"first request {1e3 * first_s:.1f} ms, {first_s / later_s:.2f} times the later ones' {1e3 * later_s:.1f} ms",
        f"late work at ready {start['late_at_ready']}, in the end {start['late_in_the_end']}",
        f"weights {start['weight_bytes'] / 1e9:.2f} GB, KV {start['kv_bytes'] / 1e9:.2f} GB",
    ]
    if memory is not None:
        lines.append("at ready, GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items()))
    return "\n".join(lines)


def main(
    *,
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.", exists=True, file_okay=False)],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    max_batch_tokens: Annotated[int, typer.Option(help="Token rows of one step.")] = 8192,
    warm: Annotated[
        bool, typer.Option("--warm/--cold", help="A warm start behind the cold one, or that alone.")
    ] = True,
    in_this_process: Annotated[bool, typer.Option("--in-this-process", hidden=True)] = False,
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure the start of an engine in fresh processes, and print its timeline."""
    model = model.resolve()
    if in_this_process:
        Path(out).write_text(json.dumps(asdict(start_here(worker_plan(model, device, max_batch_tokens)))))
        return
    starts: dict[str, Mapping[str, Any]] = {}
    drop_from_page_cache(model)
    with tempfile.TemporaryDirectory() as triton_cache:
        for name in ("cold", "warm") if warm else ("cold",):
            starts[name] = start_elsewhere(model, device, max_batch_tokens, Path(triton_cache))
            sys.stdout.write(f"--- {name}\n{timeline(starts[name])}\n")
            sys.stdout.flush()
    if out:
        result = {
            "model": model.name,
            "max_batch_tokens": max_batch_tokens,
            "starts": starts,
            "machine": machine(device),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
        }
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
