"""CUDA graphs of the steps whose shapes are known beforehand."""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# triton and torch.cuda are typed in part.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
