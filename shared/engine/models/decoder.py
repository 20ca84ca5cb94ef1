"""The one decoder of all supported families, in the order of its forward pass.

ids ─> embed ─> layer 0 ─> ... ─> layer n-1 ─> norm ─> logits

layer:  ─┬─> norm ─> qkv ─> attend ─> o ─ + ─┬─> norm ─> silu(gate) · up ─> down ─ + ─>
         └────────────────────────────┘   └─────────────────────────────────────┘

attend: (q, k norm) ─> rotate q, k ─> store k, v in their pages ─> attention of q over the pages
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
from torch import Tensor

from shared.engine.layers.kernels import Kernels
from shared.engine.models.config import ModelConfig
from shared.engine.models.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; projections are `[out, in]`, None is a bias or norm that the family does not have.

    Attributes:
        qkv: rows of q, k and v, in that order; `qkv_bias` likewise.
        gate_up: rows of the gate and of the up projection, in that order; `gate_up_bias` likewise.
        q_norm, k_norm: `[head_dim]`.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, of one dtype on one device.

    Attributes:
        embed: `[vocab, hidden]`.
        head: `[vocab, hidden]`; the same tensor as `embed` where embeddings are tied.
    """

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


class Attention(Protocol):
    """Attention of one step's token rows over the pages of their sequences.

    Only it knows which sequence and position a row has; the decoder sees rows.
    """

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, wanted: Tensor | None) -> Tensor:
        """Normalise (where `weights` say so) and rotate q and k, store k and v in the pages of `layer`, then attend.

        Args:
            qkv: `[T, q_size + 2 * kv_size]`, output of the projection; may be overwritten.
            wanted: the rows that attend, `[N]`; None: all do.

        Returns `[N, q_size]`.
        """
        ...


class Decoder:
    """A model's function from token ids to logits; keeps no state between calls."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    def rotary_embedding(self) -> RotaryEmbedding:
        """What turns q and k of this model."""
        return RotaryEmbedding(self.config.rope, self.config.head_dim, self.dtype, self.device)

    def forward(self, ids: Tensor, attention: Attention, kernels: Kernels, wanted: Tensor | None = None) -> Tensor:
        """Hidden states `[N, hidden]` of rows `wanted` `[N]` (None: of all `[T]`) before the last norm.

        Behind the last layer's keys and values nobody needs the other rows any more, so it is computed for these alone.

        Args:
            ids: int32 or int64 `[T]`.
            wanted: int32 or int64 `[N]`; may repeat.
        """
        eps = self.config.rms_norm_eps
        hidden = F.embedding(ids, self.weights.embed)
        last = len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            normed = kernels.rms_norm(hidden, layer.input_norm, eps)
            qkv = kernels.linear(normed, layer.qkv, layer.qkv_bias)
            mixed = attention.attend(index, layer, qkv, wanted if index == last else None)
            if wanted is not None and index == last:
                hidden = hidden.index_select(0, wanted)
            kernels.add_linear(hidden, mixed, layer.o, layer.o_bias)
            normed = kernels.rms_norm(hidden, layer.post_norm, eps)
            gated = kernels.gated_linear(normed, layer.gate_up, layer.gate_up_bias)
            kernels.add_linear(hidden, gated, layer.down, layer.down_bias)
        return hidden

    def logits(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """Logits `[N, vocab]` of hidden states `[N, hidden]`."""
        normed = kernels.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
        return kernels.linear(normed, self.weights.head, None)
