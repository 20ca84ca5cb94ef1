"""The count of what belongs into the warm-up and came after it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
# triton and torch.cuda are typed in part.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from triton import knobs

from shared.engine.graphs import StepGraphs


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
