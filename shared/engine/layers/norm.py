"""RMSNorm over the hidden dimension."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN202, N803
# Triton has no types, and its constants are written in capitals.

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.layers.overlap import launch_options, overlaps

ELEMENTS_PER_WARP = 512
"""On an H200 8 warps are best for 4096 columns from 1 to 8192 rows, and 4 for 2048."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` `[T, hidden]`, each row divided by its root mean square and multiplied by `weight` `[hidden]`.

    Rows of `x` may lie apart, their elements not. Sums are float32; the result has the dtype of `x`.
    """
    num_rows, hidden = x.shape
    out = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    num_warps = min(max(block // ELEMENTS_PER_WARP, 1), 16)
    overlap = overlaps(num_rows, x.device)
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        out,
        x.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=num_warps,
        **launch_options(overlap),
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes, by torch."""
    return F.rms_norm(x, weight.shape, weight, eps)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program a row."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    tl.store(out + row * HIDDEN + column, (values * scale * gain).to(out.dtype.element_ty), mask=inside)
