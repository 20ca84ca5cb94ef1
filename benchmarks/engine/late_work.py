"""What an engine should never do after it said that it is ready, counted from outside of it."""

import sys
from collections.abc import Mapping
from typing import Any, Self

import torch


class LateWork:
    """Counts, while it is entered: kernels compiled, graphs captured, memory asked of the device's driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_compiles = 0
        self._num_captures = 0
        self._num_allocations_before = 0
        self._capture_begin = torch.cuda.CUDAGraph.capture_begin
        # A run by torch alone has no need of Triton, and then nothing to count.
        self._triton = sys.modules.get("triton")

    def __enter__(self) -> Self:
        late_work = self

        def capture_begin(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
            late_work._num_captures += 1
            late_work._capture_begin(graph, *args, **kwargs)

        torch.cuda.CUDAGraph.capture_begin = capture_begin  # type: ignore[method-assign]
        if self._triton is not None:
            self._triton.knobs.runtime.jit_post_compile_hook = self._compiled
        self._num_allocations_before = self._num_allocations()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.CUDAGraph.capture_begin = self._capture_begin  # type: ignore[method-assign]
        if self._triton is not None:
            self._triton.knobs.runtime.jit_post_compile_hook = None

    def counts(self) -> Mapping[str, int]:
        """By what was done."""
        return {
            "compiles": self._num_compiles,
            "captures": self._num_captures,
            "allocations": self._num_allocations() - self._num_allocations_before,
        }

    def _compiled(self, **_: object) -> None:
        self._num_compiles += 1

    def _num_allocations(self) -> int:
        """Segments that torch's allocator has asked the driver for so far."""
        return torch.cuda.memory_stats(self._device)["num_device_alloc"] if self._device.type == "cuda" else 0
