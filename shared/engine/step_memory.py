"""Device memory of the steps that are launched kernel by kernel, taken from the driver once."""

# pyright: reportUnknownMemberType=false
# torch.cuda is typed in part.

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

SPARE = 2.0
"""Room for gaps between tensors, over what the tensors of the largest step take together. In a simulation of the
allocator with the decoder's tensors, steps of random sizes needed up to 1.56."""

SMALLEST_SEGMENT_BYTES = 20 * 2**20
"""PyTorch's allocator takes as much for a tensor of more than SMALL_BYTES."""

SMALL_BYTES = 2**20
"""Tensors up to this size have segments of their own, of twice the size."""

NUM_SMALL = 32
"""More than a step has small tensors at a time, so that one segment is always free for the next."""


class StepMemory:
    """A pool of memory for steps of any size up to the largest, of which none asks the driver.

    What PyTorch caches elsewhere goes back to the driver whenever a graph is captured, and what steps of one size leave
    does not fit those of another. This pool keeps one segment, from which every step cuts its tensors anew.
    On the CPU there is nothing to keep.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None

    def reserve(self, run_largest: Callable[[], object]) -> None:
        """Run the largest step outside of the pool, and take as much memory as it needed."""
        if self._device.type == "cpu":
            return
        run_largest()  # what the first run loads or keeps does not count
        torch.cuda.synchronize(self._device)
        kept_bytes = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run_largest()
        torch.cuda.synchronize(self._device)
        step_bytes = torch.cuda.max_memory_allocated(self._device) - kept_bytes
        torch.cuda.empty_cache()
        self._pool = torch.cuda.MemPool()
        with self.use():
            sizes = [max(SMALLEST_SEGMENT_BYTES, int(SPARE * step_bytes)), *[SMALL_BYTES] * NUM_SMALL]
            _ = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]

    @contextmanager
    def use(self) -> Generator[None]:
        """Tensors that this thread makes in this context come from the pool, once there is one."""
        if self._pool is None:
            yield
            return
        with nothing_collected(), torch.cuda.use_mem_pool(self._pool, self._device):
            yield


@contextmanager
def nothing_collected() -> Generator[None]:
    """No garbage is collected inside.

    If it held the graphs or the pool of an old runner, PyTorch's allocator would end the process: it gives no memory
    back while a graph is captured or a pool is in use.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
