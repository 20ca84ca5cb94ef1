"""How many KV pages a GPU has room for, beside what its engine needs for its largest step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shared.errors import StartupError

CONTEXT_BYTES = 2**30
"""What a process holds on a GPU outside of PyTorch's allocator: the CUDA context, loaded kernels, UCX."""

GRAPH_BYTES = 2**30
"""What captured CUDA graphs hold."""

MIN_PAGES = 2


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU's memory before the pages are allocated.

    Attributes:
        total_bytes: of the device.
        free_bytes: that nobody holds, other processes included, beside the largest step.
        peak_bytes: held by this process's tensors (the weights) and by its largest step.
    """

    total_bytes: int
    free_bytes: int
    peak_bytes: int


def measure_memory(run_largest_step: Callable[[], object], device: torch.device) -> DeviceMemory:
    """Run the step and see what it took."""
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    peak_bytes = torch.cuda.max_memory_reserved(device)
    given_back_bytes = peak_bytes - torch.cuda.memory_reserved(device)
    return DeviceMemory(total_bytes, free_bytes - given_back_bytes, peak_bytes)


def pages_that_fit(memory: DeviceMemory, page_bytes: int, *, share: float, reserved_bytes: int) -> int:
    """Pages for which there is room.

    Args:
        share: of the device's memory that this process may take in all.
        reserved_bytes: that will be allocated later, by others than PyTorch's pool of the steps.

    Raises StartupError if not even a few pages fit.
    """
    within_share = int(memory.total_bytes * share) - memory.peak_bytes - CONTEXT_BYTES - reserved_bytes
    within_device = memory.free_bytes - reserved_bytes
    num_pages = min(within_share, within_device) // page_bytes
    if num_pages < MIN_PAGES:
        raise StartupError(
            f"no room for KV pages: of the GPU's {_gb(memory.total_bytes)}, {_gb(memory.free_bytes)} are free; "
            f"the model and its largest step take {_gb(memory.peak_bytes)}, {_gb(reserved_bytes + CONTEXT_BYTES)} are "
            f"kept for buffers and graphs, and this process may have a share of {share:g} (gpu_memory_share)"
        )
    return num_pages


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
