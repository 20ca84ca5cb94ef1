"""The machine that was measured, and the processor time of processes on it."""

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from infra.local.kafka import BASE_CONFIG, jvm_options

LIBRARIES = ("aiokafka", "httpx", "orjson", "pydantic", "redis", "starlette", "torch", "uvicorn", "uvloop")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of user and system time of one process so far, and of its threads by id."""

    pid: int
    total_s: float
    threads_s: Mapping[int, float]


def cpu_times(pids: Mapping[str, int]) -> dict[str, CpuTimes]:
    """Of each process, by name."""
    found: dict[str, CpuTimes] = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
        found[name] = CpuTimes(pid, sum(process.cpu_times()[:2]), threads)
    return found


def cpu_shares(
    before: Mapping[str, CpuTimes], after: Mapping[str, CpuTimes], seconds: float
) -> dict[str, dict[str, float]]:
    """Percent of one core by process: in all, of its first thread (a service's event loop), of its busiest other one
    (a worker's engine) and of all the rest."""
    shares: dict[str, dict[str, float]] = {}
    for name, now in after.items():
        then = before.get(name)
        if then is None or then.pid != now.pid:
            continue
        spent = {thread: at_s - then.threads_s.get(thread, 0.0) for thread, at_s in now.threads_s.items()}
        first = spent.pop(now.pid, 0.0)
        busiest = max(spent.values(), default=0.0)
        total = now.total_s - then.total_s
        parts = {"total": total, "loop": first, "busiest_other": busiest, "rest": total - first - busiest}
        shares[name] = {part: round(100 * part_s / seconds, 1) for part, part_s in parts.items()}
    return shares


def machine() -> dict[str, object]:
    """Processor, memory, system, and versions of what matters for speed."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu_driver": _gpu_driver(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "kafka": {
            "acks": "all",
            "linger_ms": 0,
            "compression": "none",
            "replication": 1,
            "jvm": list(jvm_options()),
            "server": [line for line in BASE_CONFIG.read_text().splitlines() if line and not line.startswith("#")],
        },
        "redis": "append-only file, fsync every second",
    }


def commit() -> str | None:
    """The commit of this checkout, `+` for changes beside it; None where git or its folder is missing."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parents[2]
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changed = subprocess.run([git, "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "") if head.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_driver() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    asked = subprocess.run(
        [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None
