"""The gated activation of the MLP."""

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

BLOCK = 1024
"""Columns of one program."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up `[T, width]` of `gate_up` `[T, 2 * width]`, contiguous, computed in float32."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(width, BLOCK))](gate_up, out, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """What `silu_mul` computes, by torch."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_mul_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row and `BLOCK` columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))  # never overflows
    silu = gate * tl.where(gate < 0, decay, 1.0) / (1 + decay)
    tl.store(out + row * WIDTH + column, (silu * up).to(out.dtype.element_ty), mask=inside)
