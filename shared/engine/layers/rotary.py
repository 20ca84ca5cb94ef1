"""From the qkv projection to what attention reads: q and k normalised per head and rotated, k and v in their pages."""

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

from shared.blocks import PAGE_TOKENS
from shared.engine.layers.overlap import launch_options, overlaps

HEADS_PER_PROGRAM = 16
NUM_WARPS = 4
"""On an H200 these two are within 4 percent of the best of six, from 64 to 8192 rows of heads of 64 and of 128."""


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    seats: Tensor,
    page_table: Tensor,
    layer_pages: Tensor,
    angles: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    eps: float,
    num_heads: int,
) -> None:
    """Turn q and k of each row by its position; q stays in `qkv`, k and v go to the row's place in its pages.

    Args:
        qkv: `[T, (num_heads + 2 * num_kv_heads) * head_dim]`: heads of q, k and v, in that order; rows may lie apart.
            The k of `qkv` is left as it was.
        positions: int32 `[T]`; -1 marks a row that is left alone.
        seats: int32 `[T]`, row of `page_table`.
        page_table: int32 `[seats, pages]`, page numbers of each seat in the order of positions.
        layer_pages: `[num_pages, 2, PAGE_TOKENS, num_kv_heads, head_dim]`; each page contiguous, pages any way apart.
        angles: float32 `[positions, head_dim]`, cosines then sines of each pair (`rope.angle_table`).
        q_norm, k_norm: `[head_dim]`, weights of an RMSNorm with `eps` over each head before it is turned; or both None.
    """
    num_kv_heads, head_dim = layer_pages.shape[3:]
    overlap = overlaps(len(positions), qkv.device)
    grid = (len(positions), triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))
    _rotate_and_store_kernel[grid](
        qkv,
        positions,
        seats,
        page_table,
        layer_pages,
        angles,
        q_norm,
        k_norm,
        qkv.stride(0),
        page_table.stride(0),
        layer_pages.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        PAGE_TOKENS=PAGE_TOKENS,
        HEADS=HEADS_PER_PROGRAM,
        OVERLAP=overlap,
        num_warps=NUM_WARPS,
        **launch_options(overlap),
    )


def rotate_and_store_reference(
    qkv: Tensor,
    positions: Tensor,
    seats: Tensor,
    page_table: Tensor,
    layer_pages: Tensor,
    angles: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    eps: float,
    num_heads: int,
) -> None:
    """What `rotate_and_store` does, by torch."""
    num_kv_heads, head_dim = layer_pages.shape[3:]
    rows = (positions >= 0).nonzero()[:, 0]
    places = positions[rows].long()
    heads = qkv[rows].unflatten(1, (-1, head_dim)).float()
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        qk = normed_heads(qk, num_heads, q_norm.float(), k_norm.float(), eps)
    cosine, sine = angles[places].unsqueeze(1).chunk(2, -1)
    low, high = qk.chunk(2, -1)
    q, k = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1).split((num_heads, num_kv_heads), 1)
    qkv[rows, : num_heads * head_dim] = q.flatten(1).to(qkv.dtype)
    pages = page_table[seats[rows].long(), places // PAGE_TOKENS].long()
    layer_pages[pages, 0, places % PAGE_TOKENS] = k.to(layer_pages.dtype)
    layer_pages[pages, 1, places % PAGE_TOKENS] = v.to(layer_pages.dtype)


def normed_heads(qk: Tensor, num_heads: int, q_norm: Tensor, k_norm: Tensor, eps: float) -> Tensor:
    """`qk` `[T, num_heads + num_kv_heads, head_dim]` with RMSNorm over each head."""
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    return torch.cat((F.rms_norm(q, q_norm.shape, q_norm, eps), F.rms_norm(k, k_norm.shape, k_norm, eps)), 1)


@triton.jit(do_not_specialize_on_alignment=["positions", "seats"])
def _rotate_and_store_kernel(
    qkv,
    positions,
    seats,
    page_table,
    layer_pages,
    angles,
    q_norm,
    k_norm,
    qkv_stride,
    seat_stride,
    page_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a row and `HEADS` heads, which may be of q, k and v; low and high are the halves of each head."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    position = tl.load(positions + row)
    if position < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    within = pair < HALF
    inside = within & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS

    source = qkv + row.to(tl.int64) * qkv_stride + head * (2 * HALF) + pair
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if q_norm is not None:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
        norm = tl.where(is_q, q_norm + pair, k_norm + pair)
        low = tl.where(is_v, low, low * scale * tl.load(norm, mask=inside, other=0.0))
        high = tl.where(is_v, high, high * scale * tl.load(norm + HALF, mask=inside, other=0.0))
    angle = angles + position * (2 * HALF) + pair
    cosine = tl.load(angle, mask=within, other=0.0)
    sine = tl.load(angle + HALF, mask=within, other=0.0)
    turned_low = tl.where(is_v, low, low * cosine - high * sine).to(qkv.dtype.element_ty)
    turned_high = tl.where(is_v, high, high * cosine + low * sine).to(qkv.dtype.element_ty)

    tl.store(source, turned_low, mask=inside & is_q)
    tl.store(source + HALF, turned_high, mask=inside & is_q)
    page = tl.load(page_table + tl.load(seats + row) * seat_stride + position // PAGE_TOKENS).to(tl.int64)
    kv_head = tl.where(is_v, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    token = tl.where(is_v, PAGE_TOKENS, 0) + position % PAGE_TOKENS
    target = layer_pages + page * page_stride + (token * NUM_KV_HEADS + kv_head) * (2 * HALF) + pair
    tl.store(target, turned_low, mask=inside & (head >= NUM_HEADS))
    tl.store(target + HALF, turned_high, mask=inside & (head >= NUM_HEADS))
