"""The gated activation of the MLP."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803
# Triton has no types, and its constants are written in capitals.

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.layers.overlap import launch_options, overlaps

BLOCK = 2048
"""Columns of one program, of 8 warps: on an H200 no other from 512 to 4096 is faster, and all are above 4 TB/s."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up `[T, width]` of `gate_up` `[T, 2 * width]`, contiguous, computed in float32."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    overlap = overlaps(num_rows, gate_up.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(width, BLOCK))](
        gate_up, out, WIDTH=width, BLOCK=BLOCK, OVERLAP=overlap, num_warps=8, **launch_options(overlap)
    )
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """What `silu_mul` computes, by torch."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up of float32."""
    decay = tl.exp(-tl.abs(gate))  # never overflows
    return gate * tl.where(gate < 0, decay, 1.0) / (1 + decay) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program a row and `BLOCK` columns."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, silu_times(gate, up).to(out.dtype.element_ty), mask=inside)
