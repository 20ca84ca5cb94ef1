"""Linear layers of few rows, as in decoding, where reading the weights is all the work: faster than cuBLAS's there.

One row is multiplied in registers (`_vector_kernel`), up to 64 on tensor cores (`_matrix_kernel`); the residual's sum
and the gated activation are part of them. Equal inputs give equal bits.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN202, N803
# Triton has no types, and its constants are written in capitals.

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.layers.gated import silu_mul, silu_times
from shared.engine.layers.overlap import launch_options, overlaps

PADDED_ROWS = (16, 32, 64)
"""What rows are padded to for tensor cores. Above, cuBLAS is as fast."""

MAX_ROWS = PADDED_ROWS[-1]


class Form(Enum):
    """What becomes of the products of x and the weights."""

    PLAIN = "plain"
    ADD = "add"
    """Added to what is in `out`."""
    GATED = "gated"
    """silu(gate) * up, where the weights are the rows of gate, then those of up."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the weights are cut up.

    Attributes:
        num_x_rows: rows of x that a program multiplies with; 1 is `_vector_kernel`.
        num_outputs: of one program; divides the layer's.
        depth: weights of each that are in hand at once; divides the layer's.
        num_splits: programs that share the depth of the same outputs; the last to finish adds up their parts.
    """

    num_x_rows: int
    num_outputs: int
    depth: int
    num_splits: int
    num_warps: int
    num_stages: int


VECTOR_TILE = 4096
"""Weights that a program of 4 warps has in hand, twice that if gated."""

TILE_DEPTH = 128

LEAST_WEIGHTS = {Form.PLAIN: 1 << 25, Form.ADD: 1 << 24, Form.GATED: 1 << 24}
MOST_ROWS = {Form.PLAIN: MAX_ROWS, Form.ADD: 32, Form.GATED: MAX_ROWS}
"""Where `_matrix_kernel` is the faster one."""


def choose_tiling(form: Form, num_rows: int, num_outputs: int, depth: int, num_processors: int) -> Tiling | None:
    """The fastest way for a bfloat16 layer of `num_outputs` times `depth` weights; None for cuBLAS's.

    `num_outputs` counts gate and up once. Milliseconds of a whole decode step without attention on an H200, of Llama's
    8B and 1B, whose weights take 3.49 and 0.58 at 4.3 TB/s:

        rows              1      8      16     32     64
        8B    cuBLAS      4.181  4.400  4.451  4.571  4.658
              ours        4.082  4.160  4.195  4.284  4.599
        1B    cuBLAS      0.983  1.001  1.029  1.043  1.083
              ours        0.801  0.932  0.936  0.973  1.064

    One run each, in which the kernels of one row overlap (`overlap`). Two runs of the same kernels were up to 5 percent
    apart, so that less is no difference.
    """
    if num_rows == 1:
        widest = VECTOR_TILE // (2 if form is Form.GATED else 4)
        tile_depth = min(depth & -depth, widest)  # the largest power of two that divides the depth
        tile = VECTOR_TILE // tile_depth
        if tile_depth < 256 or num_outputs % tile:
            return None
        return Tiling(1, tile, tile_depth, num_splits=1, num_warps=4, num_stages=1)
    num_weights = num_outputs * depth * (2 if form is Form.GATED else 1)
    if num_rows > MOST_ROWS[form] or num_weights < LEAST_WEIGHTS[form] or depth % TILE_DEPTH:
        return None
    padded_rows = next(rows for rows in PADDED_ROWS if num_rows <= rows)
    # Wide tiles where there are enough for all processors, but not with so many rows that few stages fit.
    wide = num_outputs > 64 * num_processors and padded_rows <= 32
    tile = 128 if wide else 64
    if num_outputs % tile:
        return None
    num_tiles, num_splits = num_outputs // tile, 1
    while form is not Form.GATED and 2 * num_splits * num_tiles <= num_processors:
        num_splits *= 2
    if depth < 4 * num_splits * TILE_DEPTH:
        return None
    num_stages = 3 if wide and form is Form.GATED else 4  # all that fit into 227 KB
    return Tiling(padded_rows, tile, TILE_DEPTH, num_splits, num_warps=8 if wide else 4, num_stages=num_stages)


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """Linear layers of any number of rows. x and weights `[out, in]` are contiguous; a bias may be None.

    What `choose_tiling` does not take, float32, and layers with a bias are computed by torch.

    Attributes:
        num_processors: of the device.
        partial: float32, what the splits of one launch leave for each other. So launches may not overlap otherwise
            than on one stream.
        arrived: int32, splits that have left their part; 0 between launches.
    """

    num_processors: int
    partial: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, num_processors: int, device: torch.device) -> "LinearLayers":
        """With room for one tile a processor, since depths are split no further than that."""
        return cls(
            num_processors,
            torch.empty(num_processors * 64 * MAX_ROWS, dtype=torch.float32, device=device),
            torch.zeros(num_processors, dtype=torch.int32, device=device),
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[T, out]`."""
        tiling = self._tiling(Form.PLAIN, x, weight, bias)
        if tiling is None:
            return F.linear(x, weight, bias)
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
        self.launch(tiling, Form.PLAIN, x, weight, out)
        return out

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add the layer's output to `residual` `[T, out]`, contiguous, in place.

        Adding in cuBLAS's kernel and normalising in the next one is faster, for any number of rows, than leaving the
        sum to the norm's kernel: the output would be written and read once more.
        """
        tiling = self._tiling(Form.ADD, x, weight, bias)
        if tiling is not None:
            self.launch(tiling, Form.ADD, x, weight, residual)
            return
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual.add_(bias)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(gate) * up, `[T, width]`, of `weight` `[2 * width, in]`."""
        tiling = self._tiling(Form.GATED, x, weight, bias)
        if tiling is None:
            return silu_mul(F.linear(x, weight, bias))
        out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
        self.launch(tiling, Form.GATED, x, weight, out)
        return out

    def launch(self, tiling: Tiling, form: Form, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Run the kernel of `tiling`; `out` `[T, out]` is written, or added to if the form says so."""
        num_rows, depth = x.shape
        num_outputs = out.shape[1]
        if tiling.num_x_rows == 1:
            overlap = overlaps(num_rows, x.device)
            _vector_kernel[(num_outputs // tiling.num_outputs,)](
                x,
                weight,
                out,
                num_outputs,
                depth,
                TILE=tiling.num_outputs,
                TILE_DEPTH=tiling.depth,
                ADD=form is Form.ADD,
                GATED=form is Form.GATED,
                OVERLAP=overlap,
                num_warps=tiling.num_warps,
                num_stages=tiling.num_stages,
                **launch_options(overlap),
            )
            return
        _matrix_kernel[num_outputs // tiling.num_outputs, tiling.num_splits](
            x,
            weight,
            out,
            self.partial,
            self.arrived,
            num_rows,
            num_outputs,
            depth,
            ROWS=tiling.num_x_rows,
            TILE=tiling.num_outputs,
            TILE_DEPTH=tiling.depth,
            SPLITS=tiling.num_splits,
            ADD=form is Form.ADD,
            GATED=form is Form.GATED,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )

    def _tiling(self, form: Form, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tiling | None:
        num_rows = len(x)
        if not 1 <= num_rows <= MAX_ROWS or x.dtype != torch.bfloat16 or bias is not None:
            return None
        num_outputs = len(weight) // 2 if form is Form.GATED else len(weight)
        return choose_tiling(form, num_rows, num_outputs, weight.shape[1], self.num_processors)


@triton.jit
def _vector_kernel(
    x,
    weight,
    out,
    num_outputs,
    depth,
    TILE: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program `TILE` outputs of the one row of x. Sums are kept for each place in the tile, and added up last."""
    if OVERLAP:
        gdc_launch_dependents()
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, TILE_DEPTH)
    gate_rows = weight + output.to(tl.int64)[:, None] * depth + place[None, :]
    up_rows = gate_rows + num_outputs.to(tl.int64) * depth
    # Weights may be read before the kernel in front has ended.
    gate = tl.load(gate_rows, eviction_policy="evict_first")
    if GATED:
        up = tl.load(up_rows, eviction_policy="evict_first")
    if OVERLAP:
        gdc_wait()
    part = tl.load(x + place).to(tl.float32)[None, :]
    gate_sums = gate.to(tl.float32) * part
    if GATED:
        up_sums = up.to(tl.float32) * part
    for start in tl.range(TILE_DEPTH, depth, TILE_DEPTH, loop_unroll_factor=2):
        part = tl.load(x + start + place).to(tl.float32)[None, :]
        gate_sums += tl.load(gate_rows + start, eviction_policy="evict_first").to(tl.float32) * part
        if GATED:
            up_sums += tl.load(up_rows + start, eviction_policy="evict_first").to(tl.float32) * part
    total = tl.sum(gate_sums, 1)
    if GATED:
        total = silu_times(total, tl.sum(up_sums, 1))
    if ADD:
        total += tl.load(out + output).to(tl.float32)
    tl.store(out + output, total.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _matrix_kernel(
    x,
    weight,
    out,
    partial,
    arrived,
    num_rows,
    num_outputs,
    depth,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program `TILE` outputs (axis 0) and a part of the depth (axis 1) of up to `ROWS` rows of x.

    The weights are the left operand, as tensor cores want at least 64 rows there. A split GATED is not supported.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_parts = depth // TILE_DEPTH
    first = split * num_parts // SPLITS
    last = (split + 1) * num_parts // SPLITS
    output = tile * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, TILE_DEPTH)
    weight_rows = weight + output.to(tl.int64) * depth
    up_shift = num_outputs.to(tl.int64) * depth
    gate_tile = weight_rows[:, None] + place[None, :]
    x_tile = x + row[None, :] * depth + place[:, None]
    is_row = row[None, :] < num_rows

    sums = tl.zeros([TILE, ROWS], tl.float32)
    up_sums = tl.zeros([TILE, ROWS], tl.float32)
    for part in tl.range(first, last):
        start = part * TILE_DEPTH
        x_part = tl.load(x_tile + start, mask=is_row, other=0.0)
        gate = tl.load(gate_tile + start, eviction_policy="evict_first")
        sums = tl.dot(gate, x_part, sums, input_precision="ieee")
        if GATED:
            up = tl.load(gate_tile + up_shift + start, eviction_policy="evict_first")
            up_sums = tl.dot(up, x_part, up_sums, input_precision="ieee")

    if SPLITS > 1:
        within = tl.arange(0, TILE)[:, None] * ROWS + row[None, :]
        parts = partial + tile * SPLITS * TILE * ROWS + within
        if not _leave_part(parts + split * TILE * ROWS, sums, arrived + tile, SPLITS):
            return
        sums = _sum_of_parts(parts, TILE * ROWS, SPLITS)
    if GATED:
        sums = silu_times(sums, up_sums)
    target = out + row[None, :] * num_outputs + output[:, None]
    if ADD:
        sums += tl.load(target, mask=is_row, other=0.0).to(tl.float32)
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _leave_part(target, sums, counter, SPLITS: tl.constexpr):
    """Store `sums`, and say whether all splits have; then the counter is 0 again."""
    tl.store(target, sums)
    # All threads' sums must be written before one thread says so.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _sum_of_parts(parts, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """In the same order whichever split adds them up; from L2, since they come from other processors."""
    sums = tl.load(parts, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(parts + split * SIZE, cache_modifier=".cg")
    return sums
