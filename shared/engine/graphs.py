"""CUDA graphs of the steps whose shapes are known beforehand, and the count of what came too late to be ready."""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# triton and torch.cuda are typed in part.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from triton import knobs

from shared.engine.step_memory import nothing_collected
from shared.engine.step_plan import Draw, StepShape


class StepGraphs:
    """For each shape a graph from inputs to logits, and one from logits to tokens for each way to draw.

    They share one pool of memory: logits live from the first graph of a shape to the second alone, and what a layer
    needs between its kernels is the same memory in every graph. So only one step may run at a time, which one stream
    sees to.
    """

    def __init__(self) -> None:
        self._forward: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._draw: dict[tuple[StepShape, Draw], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        """Shapes captured."""
        return len(self._forward)

    def capture(
        self, shape: StepShape, forward: Callable[[StepShape], Tensor], draw: Callable[[StepShape, Draw, Tensor], None]
    ) -> None:
        """Record both functions for `shape`; both must have run for it before, so that all their kernels are there."""
        self._forward[shape], logits = self._record(lambda: forward(shape))
        for kind in Draw:
            self._draw[shape, kind], _ = self._record(lambda kind=kind: draw(shape, kind, logits))

    def replay(self, shape: StepShape, kind: Draw) -> bool:
        """Launch a step on the current stream; False if its shape was not captured."""
        forward = self._forward.get(shape)
        if forward is None:
            return False
        forward.replay()
        self._draw[shape, kind].replay()
        return True

    def _record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, transfers for instance, go on using the device meanwhile.
        with nothing_collected(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph, result


@dataclass(frozen=True, slots=True)
class LateWork:
    """What belongs into the warm-up and was done after it; each count must stay 0, as each makes all requests wait.

    Attributes:
        num_compiles: Triton kernels, of the whole process.
        num_captures: graphs.
        num_allocations: blocks of memory that torch asked the driver of the runner's device for.
        compiled: the kernels, with what they were compiled for.
    """

    num_compiles: int
    num_captures: int
    num_allocations: int
    compiled: tuple[str, ...] = ()


class LateWorkCounter:
    """Keeps the counts of `LateWork`."""

    def __init__(self, device: torch.device, graphs: StepGraphs) -> None:
        self._device = device
        self._graphs = graphs
        self._compiled: list[str] = []
        hooks = cast("Any", knobs.runtime)
        hooks.jit_post_compile_hook = _noting(self._compiled, hooks.jit_post_compile_hook)
        self.restart()

    def restart(self) -> None:
        """What was done before does not count."""
        self._compiled.clear()
        self._num_captures = len(self._graphs)
        self._num_allocations = _num_allocations(self._device)

    def read(self) -> LateWork:
        return LateWork(
            num_compiles=len(self._compiled),
            num_captures=len(self._graphs) - self._num_captures,
            num_allocations=_num_allocations(self._device) - self._num_allocations,
            compiled=tuple(self._compiled),
        )


def _noting(compiled: list[str], next_hook: Callable[..., Any] | None) -> Callable[..., Any]:
    """A hook of Triton's that adds each kernel to `compiled`. It outlives its counter, and keeps nothing else."""

    def note(*, repr: str, **kwargs: Any) -> Any:  # noqa: A002  Triton's name
        compiled.append(repr)
        return next_hook(repr=repr, **kwargs) if next_hook is not None else None

    return note


def _num_allocations(device: torch.device) -> int:
    return torch.cuda.memory_stats(device)["num_device_alloc"] if device.type == "cuda" else 0
