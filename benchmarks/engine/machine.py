"""The machine that was measured, by what needs no package beside torch."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = ("torch", "triton", "numpy")


def machine(device: str) -> dict[str, object]:
    """GPU, driver, processor, and versions of what matters for speed."""
    on_cuda = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_cuda else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on_cuda else None,
        "gpu_driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def commit() -> str | None:
    """The commit of this checkout, `+` for changes beside it; None where git or its folder is missing."""
    head = _asked("git", "rev-parse", "HEAD")
    return head and head + ("+" if _asked("git", "status", "--porcelain", "--untracked-files=no") else "")


def process_age_s() -> float:
    """Seconds since this process was started (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def _asked(*command: str) -> str | None:
    """What a command prints; None if it is missing or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    root = Path(__file__).parents[2]
    done = subprocess.run([program, *command[1:]], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
