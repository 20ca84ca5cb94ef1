"""Attention of one step by the Triton kernels: decode rows first, then the chunks in blocks."""

# pyright: reportUnknownMemberType=false
# torch types unflatten in part.

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.engine.attention.decode import DecodeScratch, decode_attention
from shared.engine.attention.prefill import Tiling, prefill_attention
from shared.engine.layers.rotary import rotate_and_store
from shared.engine.models.config import ModelConfig
from shared.engine.models.decoder import LayerWeights


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Where the token rows of one step belong. Everything is on the device and may change between replays of a graph.

    Attributes:
        pages: of the cache, `[num_pages, layer, K or V, PAGE_TOKENS, kv_head, head_dim]`.
        page_table: int32 `[seats, max_pages]`.
        seats, positions: int32 `[T]`; position -1 in padding rows.
        num_decode: how many of the rows, the first ones, are the only one of their sequence.
        blocks: int32 `[num_blocks, 4]` over the other rows, as `prefill_attention` needs them for `tiling`.
        angles: float32 `[max_position, head_dim]`, cosines then sines.
        scratch: of `decode_attention`; holds the plan of these rows.
    """

    config: ModelConfig
    pages: Tensor
    page_table: Tensor
    seats: Tensor
    positions: Tensor
    num_decode: int
    blocks: Tensor
    tiling: Tiling
    angles: Tensor
    scratch: DecodeScratch

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor) -> Tensor:
        """Turn q and k of `qkv` `[T, q_size + 2 * kv_size]` in place, store k and v of `layer`, then attend.

        Returns `[T, q_size]`.
        """
        config, num_decode = self.config, self.num_decode
        layer_pages = self.pages[:, layer]
        rotate_and_store(
            qkv,
            self.positions,
            self.seats,
            self.page_table,
            layer_pages,
            self.angles,
            weights.q_norm,
            weights.k_norm,
            eps=config.rms_norm_eps,
            num_heads=config.num_heads,
        )
        q = qkv[:, : config.q_size].unflatten(1, (config.num_heads, config.head_dim))
        mixed = torch.empty((len(qkv), config.q_size), dtype=qkv.dtype, device=qkv.device)
        scale = config.head_dim**-0.5
        if num_decode:
            decode_attention(
                q[:num_decode],
                layer_pages,
                self.page_table,
                mixed[:num_decode],
                self.scratch,
                scale=scale,
            )
        if len(self.blocks):
            prefill_attention(q, layer_pages, self.page_table, self.blocks, mixed, scale=scale, tiling=self.tiling)
        return mixed
