"""Copies of pages by plain torch: what runs on the CPU, and the reference for `copy_kernels`."""

# pyright: reportUnknownMemberType=false
# torch types float, half and clamp in part.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.blocks import PAGE_TOKENS
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, Record, WireFormat

MAX_HALF = 65504.0
"""The largest finite float16."""

HALF_TOKENS = PAGE_TOKENS // 2
"""Tokens that lie in the low halves of INT4's bytes."""


class TorchCopies:
    """See `shared.kv.copy.PageCopier`. Page by page, so that what is in hand stays in the processor's cache."""

    def __init__(self, cache: PagedCache) -> None:
        self._pages = cache.pages
        self._num_kv_heads = cache.layout.num_kv_heads
        self._head_dim = cache.layout.head_dim

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def pack(self, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat, out: Tensor, last_tokens: int) -> None:
        last = len(pages) - 1
        for index, (page, run) in enumerate(zip(pages, self._runs(out, len(pages)), strict=True)):
            kv = self._pages[page, layers.first : layers.end]
            if fmt is WireFormat.NATIVE:
                run.view(kv.dtype).view(kv.shape).copy_(kv)
            else:
                self._pack_page(kv, fmt, run, last_tokens if index == last else PAGE_TOKENS)

    def unpack(self, source: Tensor, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat) -> None:
        for page, run in zip(pages, self._runs(source, len(pages)), strict=True):
            kv = self._pages[page, layers.first : layers.end]
            if fmt is WireFormat.NATIVE:
                kv.copy_(run.view(kv.dtype).view(kv.shape))
            else:
                self._unpack_page(self._records(run, fmt), fmt, kv)

    def _runs(self, run: Tensor, num_pages: int) -> Tensor:
        return run.view(num_pages, -1) if num_pages else run.view(0, 0)

    def _records(self, run: Tensor, fmt: WireFormat) -> "_Records":
        return _Records.of(run, fmt, self._num_kv_heads, self._head_dim)

    def _pack_page(self, kv: Tensor, fmt: WireFormat, run: Tensor, num_tokens: int) -> None:
        """`kv`: `[layer, K or V, PAGE_TOKENS, kv_head, head_dim]`."""
        records = self._records(run, fmt)
        by_head = kv.permute(1, 0, 3, 2, 4).to(torch.float32, memory_format=torch.contiguous_format)
        if by_head.data_ptr() == kv.data_ptr():
            by_head = by_head.clone()
        by_head[..., num_tokens:, :] = by_head[..., num_tokens - 1 : num_tokens, :]
        keys, values = by_head
        int4 = fmt is WireFormat.INT4
        num_steps = 15 if int4 else 255
        codes, scale, zero = _ranged_codes(keys, -2, num_steps)
        records.k_codes.copy_(_halves_joined(codes) if int4 else codes)
        records.k_scale.copy_(scale.squeeze(-2))
        records.k_zero.copy_(zero.squeeze(-2))
        if int4:
            codes, scale, zero = _ranged_codes(values, -1, num_steps)
            records.v_codes.copy_(_halves_joined(codes))
            records.v_zero.copy_(zero.squeeze(-1))
        else:
            codes, scale = _centred_codes(values, -1)
            records.v_codes.copy_(codes)
        records.v_scale.copy_(scale.squeeze(-1))

    def _unpack_page(self, records: "_Records", fmt: WireFormat, kv: Tensor) -> None:
        int4 = fmt is WireFormat.INT4
        k_codes = _halves_split(records.k_codes) if int4 else records.k_codes
        v_codes = _halves_split(records.v_codes) if int4 else records.v_codes
        keys = k_codes * records.k_scale.float().unsqueeze(-2) + records.k_zero.float().unsqueeze(-2)
        v_scale = records.v_scale.float().unsqueeze(-1)
        values = v_codes * v_scale + records.v_zero.float().unsqueeze(-1) if int4 else (v_codes.float() - 128) * v_scale
        kv[:, 0] = keys.transpose(1, 2)
        kv[:, 1] = values.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Records:
    """Views of the parts of one page's records: `[layer, kv_head, ...]`.

    Attributes:
        k_codes, v_codes: uint8 `[..., PAGE_TOKENS, head_dim]`, of INT4 `[..., PAGE_TOKENS / 2, head_dim]`.
        k_scale, k_zero: float16 `[..., head_dim]`.
        v_scale, v_zero: float16 `[..., PAGE_TOKENS]`; `v_zero` is empty in INT8.
    """

    k_codes: Tensor
    k_scale: Tensor
    k_zero: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_zero: Tensor

    @classmethod
    def of(cls, run: Tensor, fmt: WireFormat, num_kv_heads: int, head_dim: int) -> "_Records":
        """`run`: uint8, the records of one page."""
        record = Record.of(fmt, head_dim)
        records = run.view(-1, num_kv_heads, record.num_bytes)
        return cls(
            k_codes=records[..., : record.k_scale].unflatten(-1, (-1, head_dim)),
            k_scale=records[..., record.k_scale : record.k_zero].view(torch.float16),
            k_zero=records[..., record.k_zero : record.v_codes].view(torch.float16),
            v_codes=records[..., record.v_codes : record.v_scale].unflatten(-1, (-1, head_dim)),
            v_scale=records[..., record.v_scale : record.v_zero].view(torch.float16),
            v_zero=records[..., record.v_zero :].view(torch.float16),
        )


def _ranged_codes(values: Tensor, dim: int, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 from 0 to `num_steps`, and scale and zero (float16) of their range along `dim`.

    The range from zero to zero + num_steps * scale covers the values as far as float16 reaches, and codes are of this
    rounded range: an error is at most half a scale.
    """
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)  # aminmax takes ten times as long
    zero = _rounded_down(low.clamp(-MAX_HALF, MAX_HALF))
    # 0, or NaN where a value is no finite number: the clamps would hide an infinity.
    poison = low * 0 + high * 0
    scale = _rounded_up(((high - zero.float()) * (1 / num_steps)).clamp(0, MAX_HALF) + poison)
    codes = values.sub(zero.float()).mul_(_inverse(scale)).clamp_(0, num_steps).round_()
    return codes.to(torch.uint8), scale, zero


def _centred_codes(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 from 1 to 255, of which 128 is 0, and the scale (float16) along `dim`."""
    largest = torch.maximum(-values.amin(dim, keepdim=True), values.amax(dim, keepdim=True))
    scale = _rounded_up((largest * (1 / 127)).clamp(0, MAX_HALF) + largest * 0)
    codes = values.mul(_inverse(scale)).clamp_(-127, 127).round_().add_(128)
    return codes.to(torch.uint8), scale


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1 / scale.float())


def _rounded_down(values: Tensor) -> Tensor:
    """The next float16 that is not above."""
    half = values.half()
    bits = half.view(torch.int16)
    below = torch.where(bits > 0, bits - 1, bits + 1).view(torch.float16)
    return torch.where(half.float() > values, below, half)


def _rounded_up(values: Tensor) -> Tensor:
    """The next float16 that is not below; the values are not negative."""
    half = values.half()
    return torch.where(half.float() < values, (half.view(torch.int16) + 1).view(torch.float16), half)


def _halves_joined(codes: Tensor) -> Tensor:
    """Codes of 4 bits `[..., PAGE_TOKENS, head_dim]` as bytes `[..., PAGE_TOKENS / 2, head_dim]`."""
    return codes[..., :HALF_TOKENS, :] | codes[..., HALF_TOKENS:, :] << 4


def _halves_split(codes: Tensor) -> Tensor:
    """The inverse of `_halves_joined`."""
    return torch.cat((codes & 15, codes >> 4), dim=-2)
