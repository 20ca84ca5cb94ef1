"""Copies of pages by Triton, on CUDA: native by words, and INT8 and INT4 in one pass over memory.

Every kernel runs a bounded number of programs, which share the work out among themselves, so that a copy leaves room
for the steps that run beside it.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN202, N803, N806
# Triton has no types, and its constants are written in capitals.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.blocks import PAGE_TOKENS
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, Record, WireFormat

ALIGNMENT = 16
"""Bytes of the widest load: where a run begins on the device."""

MAX_QUEUED = 64
"""Copies that may be queued on the device; the next one waits on the host until the first of them has ended."""

NUMBERS_STEP = 64
"""Page numbers in a row are a multiple of this, so that every row begins at a multiple of ALIGNMENT."""

TOKENS = tl.constexpr(PAGE_TOKENS)
HALF_TOKENS = tl.constexpr(PAGE_TOKENS // 2)
MAX_HALF = tl.constexpr(65504.0)
WHOLE = tl.constexpr(float(1 << 23))
"""From here float32 holds whole numbers alone: adding it rounds, and leaves the number in the lowest bits."""


class Queued(Protocol):
    """A copy on the device."""

    def query(self) -> bool:
        """Whether it has ended. (Once `MAX_QUEUED` later copies were queued, whether the last of those has.)"""
        ...


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the copies are cut up.

    Attributes:
        copy_programs, lossy_programs: at most so many of one kernel. An H200 has 132 processors.
        copy_bytes: of one load of the native copy; a power of two.
        copy_warps, pack_warps, unpack_warps: of one program.
        pack_stages, unpack_stages: units in hand at once, the next ones on their way to shared memory.
    """

    copy_programs: int = 132
    lossy_programs: int = 528
    copy_bytes: int = 32768
    copy_warps: int = 4
    pack_warps: int = 2
    pack_stages: int = 2
    unpack_warps: int = 2
    unpack_stages: int = 2


class TritonCopies:
    """See `shared.kv.copy.PageCopier`. On CPU tensors it runs under Triton's interpreter alone."""

    def __init__(
        self,
        cache: PagedCache,
        max_pages: int,
        stream: torch.cuda.Stream | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        layout = cache.layout
        tuning = tuning or Tuning()
        self._pages = cache.pages
        self._stream = stream
        self._numbers = _PageNumbers(max_pages, cache.device)
        # Halved until it divides what a layer takes, so that no block crosses the end of a span.
        block_bytes = min(tuning.copy_bytes, layout.layer_bytes & -layout.layer_bytes)
        self._gather, self._scatter = (
            _Launch(
                _copy_kernel,
                layout.layer_bytes // block_bytes,
                tuning.copy_programs,
                {
                    "NUM_LAYERS": layout.num_layers,
                    "LAYER_WORDS": layout.layer_bytes // 4,
                    "BLOCK": block_bytes // 4,
                    "GATHER": gather,
                    "num_warps": tuning.copy_warps,
                },
            )
            for gather in (True, False)
        )
        self._pack, self._unpack = (
            {
                fmt: _Launch(
                    kernel, layout.num_kv_heads, tuning.lossy_programs, {**_record_constants(layout, fmt), **cut}
                )
                for fmt in (WireFormat.INT8, WireFormat.INT4)
            }
            for kernel, cut in (
                (_pack_kernel, {"STAGES": tuning.pack_stages, "num_warps": tuning.pack_warps}),
                (_unpack_kernel, {"STAGES": tuning.unpack_stages, "num_warps": tuning.unpack_warps}),
            )
        )

    def warm_up(self) -> None:
        """Launches every kernel for no pages."""
        run = self._pages.view(-1).view(torch.uint8)  # any memory will do
        layers = LayerSpan(0, 1)
        for fmt in WireFormat:
            self.pack((), layers, fmt, run, PAGE_TOKENS)
            self.unpack(run, (), layers, fmt)

    def pack(
        self, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat, out: Tensor, last_tokens: int
    ) -> "Queued | None":
        if fmt is WireFormat.NATIVE:
            return self._launch(self._gather, self._numbers.put(pages), len(pages), layers, out)
        numbers = self._numbers.bring(pages, self._stream)
        return self._launch(self._pack[fmt], numbers, len(pages), layers, out, last_tokens)

    def unpack(self, source: Tensor, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat) -> "Queued | None":
        if fmt is WireFormat.NATIVE:
            return self._launch(self._scatter, self._numbers.put(pages), len(pages), layers, source)
        return self._launch(self._unpack[fmt], self._numbers.bring(pages, self._stream), len(pages), layers, source)

    def _launch(
        self, launch: "_Launch", numbers: Tensor, num_pages: int, layers: LayerSpan, run: Tensor, *more: int
    ) -> "Queued | None":
        if run.data_ptr() % ALIGNMENT:
            raise ValueError(f"a run begins at no multiple of {ALIGNMENT} bytes")
        num_units = num_pages * layers.num_layers * launch.units_per_layer
        programs = max(1, min(num_units, launch.max_programs))
        arguments = (self._pages, run, numbers, num_pages, layers.first, layers.num_layers, *more)
        launch.start(programs, self._stream, arguments)
        return self._numbers.are_in_use(self._stream)


def _record_constants(layout: KvLayout, fmt: WireFormat) -> dict[str, Any]:
    record = Record.of(fmt, layout.head_dim)
    return {
        "NUM_LAYERS": layout.num_layers,
        "NUM_HEADS": layout.num_kv_heads,
        "DIM": layout.head_dim,
        "PADDED_DIM": triton.next_power_of_2(layout.head_dim),
        "K_SCALE": record.k_scale,
        "K_ZERO": record.k_zero,
        "V_CODES": record.v_codes,
        "V_SCALE": record.v_scale,
        "V_ZERO": record.v_zero,
        "RECORD_BYTES": record.num_bytes,
        "INT4": fmt is WireFormat.INT4,
        "enable_fp_fusion": False,  # the reference rounds each product
    }


class _Launch:
    """A kernel with what never changes; its programs share out `units_per_layer` units of each layer of each page."""

    def __init__(self, kernel: Any, units_per_layer: int, max_programs: int, constants: dict[str, Any]) -> None:
        self.units_per_layer = units_per_layer
        self.max_programs = max_programs
        self._kernel = kernel
        self._constants = constants
        self._last_arguments = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: Any = None

    def start(self, programs: int, stream: torch.cuda.Stream | None, arguments: tuple[Any, ...]) -> None:
        """Only the first launch finds out which variant its arguments ask for: all others ask for the same."""
        if self._compiled is None:
            with torch.cuda.stream(stream):
                self._compiled = self._kernel[(programs,)](*arguments, **self._constants)
        else:
            handle = None if stream is None else stream.cuda_stream
            self._compiled[(programs, 1, 1)](*arguments, *self._last_arguments, stream=handle)


class _PageNumbers:
    """Page numbers for the device, with a row and an event for each copy in the queue.

    A native copy reads them from the host's memory: to bring them over first would take longer than it saves. A lossy
    one asks for a number so often that they are brought.
    """

    def __init__(self, max_pages: int, device: torch.device) -> None:
        width = -(-max(1, max_pages) // NUMBERS_STEP) * NUMBERS_STEP
        is_cuda = device.type == "cuda"
        pinned = torch.zeros((MAX_QUEUED, width), dtype=torch.int32, pin_memory=is_cuda)
        self._words = pinned.numpy()
        self._rows = pinned.unbind()
        self._brought = torch.zeros_like(pinned, device=device, pin_memory=False).unbind()
        # Under Triton's interpreter a copy has ended when it returns.
        self._ended = [torch.cuda.Event() for _ in range(MAX_QUEUED)] if is_cuda else None
        self._turn = 0

    def put(self, pages: Sequence[int]) -> Tensor:
        """The numbers as int32."""
        turn = self._turn
        if self._ended is not None:
            self._ended[turn].synchronize()
        self._words[turn, : len(pages)] = pages
        return self._rows[turn]

    def bring(self, pages: Sequence[int], stream: torch.cuda.Stream | None) -> Tensor:
        """The numbers as int32 on the device, for what `stream` is given next."""
        row = self.put(pages)
        with torch.cuda.stream(stream):
            return self._brought[self._turn].copy_(row, non_blocking=True)

    def are_in_use(self, stream: torch.cuda.Stream | None) -> "Queued | None":
        """Until what `stream` has been given by now has ended, which the result tells; None: it has."""
        ended = None if self._ended is None else self._ended[self._turn]
        if ended is not None:
            ended.record(stream)
        self._turn = (self._turn + 1) % MAX_QUEUED
        return ended


@triton.jit(do_not_specialize=["num_pages", "first_layer", "num_layers"])
def _copy_kernel(
    cache,
    run,
    numbers,
    num_pages,
    first_layer,
    num_layers,
    NUM_LAYERS: tl.constexpr,
    LAYER_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    """A unit is a block of words of a page's span of layers, which is one run in memory."""
    cache_words = cache.to(tl.pointer_type(tl.int32))
    run_words = run.to(tl.pointer_type(tl.int32))
    word = tl.arange(0, BLOCK)
    blocks_per_page = num_layers * (LAYER_WORDS // BLOCK)
    for unit in range(tl.program_id(0), num_pages * blocks_per_page, tl.num_programs(0)):
        page = tl.load(numbers + unit // blocks_per_page).to(tl.int64)
        in_cache = cache_words + (page * NUM_LAYERS + first_layer) * LAYER_WORDS + unit % blocks_per_page * BLOCK + word
        in_run = run_words + tl.cast(unit, tl.int64) * BLOCK + word
        if GATHER:
            tl.store(in_run, tl.load(in_cache))
        else:
            tl.store(in_cache, tl.load(in_run))


@triton.jit(do_not_specialize=["num_pages", "first_layer", "num_layers", "last_tokens"])
def _pack_kernel(
    cache,
    out,
    numbers,
    num_pages,
    first_layer,
    num_layers,
    last_tokens,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    INT4: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A unit is a record. The two halves of its tokens are apart, since INT4 joins them in its bytes."""
    TOKEN: tl.constexpr = NUM_HEADS * DIM
    STEPS: tl.constexpr = tl.constexpr(15 if INT4 else 255)
    row = tl.arange(0, HALF_TOKENS)
    column = tl.arange(0, PADDED_DIM)
    inside = column < DIM
    code_at = row[:, None] * DIM + column[None, :]
    num_units = num_pages * num_layers * NUM_HEADS
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0), num_stages=STAGES):
        nth_page = unit // (num_layers * NUM_HEADS)
        layer = first_layer + unit // NUM_HEADS % num_layers
        page = tl.load(numbers + nth_page).to(tl.int64)
        keys = cache + (page * NUM_LAYERS + layer) * (2 * TOKENS * TOKEN) + unit % NUM_HEADS * DIM
        values = keys + TOKENS * TOKEN
        last = tl.where(nth_page == num_pages - 1, last_tokens, TOKENS) - 1
        low_k, high_k = _load_halves(keys, last, row, column, TOKEN, DIM)
        record = out + tl.cast(unit, tl.int64) * RECORD_BYTES

        smallest = tl.reduce(tl.minimum(low_k, high_k, propagate_nan=tl.PropagateNan.ALL), 0, _smaller)
        largest = tl.reduce(tl.maximum(low_k, high_k, propagate_nan=tl.PropagateNan.ALL), 0, _larger)
        scale, zero = _range(smallest, largest, STEPS)
        k_scale = (record + K_SCALE).to(tl.pointer_type(tl.float16))
        k_zero = (record + K_ZERO).to(tl.pointer_type(tl.float16))
        tl.store(k_scale + column, scale, mask=inside)
        tl.store(k_zero + column, zero, mask=inside)
        factor, origin = _inverse(scale)[None, :], zero.to(tl.float32)[None, :]
        low_codes = _ranged_codes(low_k, factor, origin, STEPS)
        high_codes = _ranged_codes(high_k, factor, origin, STEPS)
        _store_codes(record + code_at, low_codes, high_codes, inside[None, :], DIM, INT4)

        low_v, high_v = _load_halves(values, last, row, column, TOKEN, DIM)
        v_scale = (record + V_SCALE).to(tl.pointer_type(tl.float16)) + row
        if INT4:
            v_zero = (record + V_ZERO).to(tl.pointer_type(tl.float16)) + row
            low_scale, low_zero = _row_range(low_v, inside[None, :], STEPS, PADDED_DIM != DIM)
            high_scale, high_zero = _row_range(high_v, inside[None, :], STEPS, PADDED_DIM != DIM)
            tl.store(v_zero, low_zero)
            tl.store(v_zero + HALF_TOKENS, high_zero)
            low_origin, high_origin = low_zero.to(tl.float32)[:, None], high_zero.to(tl.float32)[:, None]
            low_codes = _ranged_codes(low_v, _inverse(low_scale)[:, None], low_origin, STEPS)
            high_codes = _ranged_codes(high_v, _inverse(high_scale)[:, None], high_origin, STEPS)
        else:
            low_scale, high_scale = _centred_scale(low_v), _centred_scale(high_v)
            low_codes = _centred_codes(low_v, _inverse(low_scale)[:, None])
            high_codes = _centred_codes(high_v, _inverse(high_scale)[:, None])
        tl.store(v_scale, low_scale)
        tl.store(v_scale + HALF_TOKENS, high_scale)
        _store_codes(record + V_CODES + code_at, low_codes, high_codes, inside[None, :], DIM, INT4)


@triton.jit(do_not_specialize=["num_pages", "first_layer", "num_layers"])
def _unpack_kernel(
    cache,
    source,
    numbers,
    num_pages,
    first_layer,
    num_layers,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    INT4: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A unit is a record."""
    TOKEN: tl.constexpr = NUM_HEADS * DIM
    row = tl.arange(0, HALF_TOKENS)
    column = tl.arange(0, PADDED_DIM)
    inside = column < DIM
    code_at = row[:, None] * DIM + column[None, :]
    low_at = row[:, None] * TOKEN + column[None, :]
    num_units = num_pages * num_layers * NUM_HEADS
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0), num_stages=STAGES):
        page = tl.load(numbers + unit // (num_layers * NUM_HEADS)).to(tl.int64)
        layer = first_layer + unit // NUM_HEADS % num_layers
        keys = cache + (page * NUM_LAYERS + layer) * (2 * TOKENS * TOKEN) + unit % NUM_HEADS * DIM + low_at
        values = keys + TOKENS * TOKEN
        record = source + tl.cast(unit, tl.int64) * RECORD_BYTES

        low_k, high_k = _load_codes(record + code_at, inside[None, :], DIM, INT4)
        low_v, high_v = _load_codes(record + V_CODES + code_at, inside[None, :], DIM, INT4)
        k_scale = (record + K_SCALE).to(tl.pointer_type(tl.float16)) + column
        k_zero = (record + K_ZERO).to(tl.pointer_type(tl.float16)) + column
        scale = tl.load(k_scale, mask=inside, other=0.0).to(tl.float32)[None, :]
        zero = tl.load(k_zero, mask=inside, other=0.0).to(tl.float32)[None, :]
        v_scale = (record + V_SCALE).to(tl.pointer_type(tl.float16)) + row
        low_scale = tl.load(v_scale).to(tl.float32)[:, None]
        high_scale = tl.load(v_scale + HALF_TOKENS).to(tl.float32)[:, None]
        if INT4:
            v_zero = (record + V_ZERO).to(tl.pointer_type(tl.float16)) + row
            low_v = low_v * low_scale + tl.load(v_zero).to(tl.float32)[:, None]
            high_v = high_v * high_scale + tl.load(v_zero + HALF_TOKENS).to(tl.float32)[:, None]
        else:
            low_v = (low_v - 128.0) * low_scale
            high_v = (high_v - 128.0) * high_scale
        dtype = cache.dtype.element_ty
        tl.store(keys, (low_k * scale + zero).to(dtype), mask=inside[None, :])
        tl.store(keys + HALF_TOKENS * TOKEN, (high_k * scale + zero).to(dtype), mask=inside[None, :])
        tl.store(values, low_v.to(dtype), mask=inside[None, :])
        tl.store(values + HALF_TOKENS * TOKEN, high_v.to(dtype), mask=inside[None, :])


@triton.jit
def _load_halves(at, last, row, column, TOKEN: tl.constexpr, DIM: tl.constexpr):
    """Tokens 0 to 31 and 32 to 63, float32, where those behind `last` are read as that one."""
    inside = (column < DIM)[None, :]
    low = tl.load(at + tl.minimum(row, last)[:, None] * TOKEN + column[None, :], mask=inside, other=0.0)
    high = tl.load(at + tl.minimum(row + HALF_TOKENS, last)[:, None] * TOKEN + column[None, :], mask=inside, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _range(smallest, largest, STEPS: tl.constexpr):
    """Scale and zero, float16; see `copy_reference`."""
    zero = _rounded_down(tl.clamp(smallest, -MAX_HALF, MAX_HALF))
    # 0, or NaN where a value is no finite number: the clamps would hide it.
    poison = smallest * 0.0 + largest * 0.0
    scale = tl.clamp((largest - zero.to(tl.float32)) * (1.0 / STEPS), 0.0, MAX_HALF)
    return _rounded_up(scale + poison), zero


@triton.jit
def _row_range(values, inside, STEPS: tl.constexpr, IS_PADDED: tl.constexpr):
    smallest, largest = values, values
    if IS_PADDED:
        smallest = tl.where(inside, values, float("inf"))
        largest = tl.where(inside, values, float("-inf"))
    return _range(tl.reduce(smallest, 1, _smaller), tl.reduce(largest, 1, _larger), STEPS)


@triton.jit
def _centred_scale(values):
    largest = tl.reduce(tl.abs(values), 1, _larger)
    return _rounded_up(tl.clamp(largest * (1.0 / 127), 0.0, MAX_HALF) + largest * 0.0)


@triton.jit
def _inverse(scale):
    """1 / scale in float32; 0 where the scale is 0."""
    wide = scale.to(tl.float32)
    return tl.where(wide == 0.0, 0.0, tl.div_rn(1.0, tl.where(wide == 0.0, 1.0, wide)))


@triton.jit
def _ranged_codes(values, factor, origin, STEPS: tl.constexpr):
    """int32 whose lowest byte is the code."""
    scaled = tl.clamp((values - origin) * factor, 0.0, STEPS * 1.0)
    return (scaled + WHOLE).to(tl.int32, bitcast=True)


@triton.jit
def _centred_codes(values, factor):
    """int32 whose lowest byte is the code."""
    scaled = tl.clamp(values * factor, -127.0, 127.0)
    return (scaled + (WHOLE + 128.0)).to(tl.int32, bitcast=True)


@triton.jit
def _store_codes(at, low, high, inside, DIM: tl.constexpr, INT4: tl.constexpr):
    if INT4:
        tl.store(at, (low | high << 4).to(tl.uint8), mask=inside)
    else:
        tl.store(at, low.to(tl.uint8), mask=inside)
        tl.store(at + HALF_TOKENS * DIM, high.to(tl.uint8), mask=inside)


@triton.jit
def _load_codes(at, inside, DIM: tl.constexpr, INT4: tl.constexpr):
    """Codes of both halves, float32."""
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    if INT4:
        high = low >> 4
        low &= 15
    else:
        high = tl.load(at + HALF_TOKENS * DIM, mask=inside, other=0).to(tl.int32)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _rounded_down(values):
    """The next float16 that is not above."""
    half = values.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    below = tl.where(bits > 0, bits - 1, bits + 1).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) > values, below, half)


@triton.jit
def _rounded_up(values):
    """The next float16 that is not below; the values are not negative."""
    half = values.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) < values, above, half)
