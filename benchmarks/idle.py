"""`python -m benchmarks.idle`: processor time of a stack that has nothing to do, process by process, as JSON.

The stack of the demo is started, serves one request (so that all is loaded), rests, and is measured for a while. The
figures are shares of one core, from the operating system's accounting of user and system time.
"""

import asyncio
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from infra.local.composition import Composition
from infra.local.model import MODEL_NAME, smollm2_folder
from infra.local.stack import Stack, local_stack

REST_S = 10.0
MEASURED_S = 30.0
COUNTS = {"ingest": 1, "prefill": 1, "decode": 2, "edge": 1}


async def measure(run_dir: Path) -> dict[str, object]:
    """Percent of one core by process."""
    composition = Composition(
        counts=COUNTS,
        model=str(smollm2_folder()),
        model_name=MODEL_NAME,
        num_pages=128,
        kafka_port=None,
        redis_port=None,
    )
    async with local_stack(composition, run_dir) as stack, httpx.AsyncClient(timeout=120) as client:
        (edge,) = stack.addresses("edge")
        answer = await client.post(
            f"{edge}/v1/completions", json={"model": MODEL_NAME, "prompt": "Once", "max_tokens": 2}
        )
        answer.raise_for_status()
        await asyncio.sleep(REST_S)
        before, began_s = cpu_seconds(stack), time.monotonic()
        await asyncio.sleep(MEASURED_S)
        took_s = time.monotonic() - began_s
        after = cpu_seconds(stack)
    shares = {name: round(100 * (after[name] - before[name]) / took_s, 2) for name in before}
    return {
        "measure": "idle stack, percent of one core",
        "processes": shares,
        "total": round(sum(shares.values()), 2),
        "seconds": round(took_s, 1),
        "machine": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, shared",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """User and system time of each process so far; the supervisor is this one."""
    pids = {process.name: process.pid for process in stack.record().processes}
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as run_dir:
        json.dump(asyncio.run(measure(Path(run_dir))), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
