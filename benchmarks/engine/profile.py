"""What the device did in each step, from torch's profiler."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the profiler's events that are work of a GPU."""

NUM_KERNELS = 16
"""Most expensive kernels that a profile names."""


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """One kernel or copy on the device, times in microseconds."""

    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


@dataclass(frozen=True, slots=True)
class Profile:
    """Device time of one step, in the mean of some.

    Attributes:
        step_ms: from a step's first kernel to its last one's end, pauses between its kernels included.
        busy_ms: of that, the time in which a kernel ran.
        kernels: the most expensive ones: name, calls and ms a step.
    """

    step_ms: float
    busy_ms: float
    kernels: tuple[tuple[str, float, float], ...]


def profile_steps(num_steps: int, run: Callable[[], object]) -> Profile:
    """The profile of `run`, which computes `num_steps` steps on CUDA."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    work = [
        DeviceWork(str(event["name"]), float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") in DEVICE_WORK
    ]
    if not work:
        raise RuntimeError("the profiler saw no work on the device")
    return summarise(work, num_steps)


def summarise(work: Sequence[DeviceWork], num_steps: int) -> Profile:
    """The mean over `num_steps` steps, whose borders are taken to be the longest pauses of the device."""
    ordered = sorted(work, key=lambda each: each.start_us)
    busy_us = 0.0
    pauses_us: list[float] = []
    end_us = ordered[0].start_us
    for each in ordered:
        pauses_us.append(max(0.0, each.start_us - end_us))
        busy_us += max(0.0, each.end_us - max(each.start_us, end_us))
        end_us = max(end_us, each.end_us)
    between_steps_us = sum(sorted(pauses_us, reverse=True)[: num_steps - 1])
    span_us = end_us - ordered[0].start_us
    return Profile(
        step_ms=(span_us - between_steps_us) / num_steps / 1000,
        busy_ms=busy_us / num_steps / 1000,
        kernels=_most_expensive(ordered, num_steps),
    )


def _most_expensive(work: Sequence[DeviceWork], num_steps: int) -> tuple[tuple[str, float, float], ...]:
    durations_us: dict[str, list[float]] = defaultdict(list)
    for each in work:
        durations_us[each.name].append(each.duration_us)
    ranked = sorted(durations_us.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    return tuple(
        (name, round(len(each) / num_steps, 2), round(sum(each) / num_steps / 1000, 4)) for name, each in ranked
    )
