"""The functions a decoder layer is made of, as one set that is passed down: plain torch, or Triton on the GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
from torch import Tensor

from shared.engine.layers.gated import silu_mul_reference
from shared.engine.layers.linear import LinearLayers
from shared.engine.layers.norm import rms_norm, rms_norm_reference


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the decoder computes with, beside attention. Weights are `[out, in]`; a bias may be None.

    Attributes:
        rms_norm: (x `[T, hidden]`, weight `[hidden]`, eps) -> normalised x.
        linear: (x `[T, in]`, weight, bias) -> `[T, out]`.
        add_linear: (residual `[T, out]`, x, weight, bias) adds the linear layer's output to `residual` in place.
        gated_linear: (x, weight `[2 * width, in]` of gate and up, bias) -> silu(gate) * up, `[T, width]`.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    add_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    gated_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual.addmm_(x, weight.t())
    if bias is not None:
        residual.add_(bias)


def _gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return silu_mul_reference(F.linear(x, weight, bias))


TORCH_KERNELS = Kernels(rms_norm_reference, F.linear, _add_linear, _gated_linear)
"""The reference, on any device."""


def triton_kernels(num_processors: int, device: torch.device) -> Kernels:
    """On CUDA, and anywhere under Triton's interpreter. A set serves one stream: its kernels share memory of theirs."""
    layers = LinearLayers.allocate(num_processors, device)
    return Kernels(rms_norm, layers.linear, layers.add_linear, layers.gated_linear)
