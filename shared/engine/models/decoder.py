"""The one decoder of all supported families, in the order of its forward pass.

ids ─> embed ─> layer 0 ─> ... ─> layer n-1 ─> norm ─> logits

layer:  ─┬─> norm ─> qkv ─> (q, k norm) ─> rotate ─> attend ─> o ─ + ─┬─> norm ─> silu(gate) · up ─> down ─ + ─>
         └───────────────────────────────────────────────────────┘   └─────────────────────────────────────┘
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
from torch import Tensor

from shared.engine.models.config import ModelConfig
from shared.engine.models.rope import RotaryEmbedding, Rotation


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
    """Attention of one step's token rows over the pages of their sequences."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store `k` and `v` `[T, num_kv_heads, head_dim]` of `layer`, then attend with `q` `[T, num_heads, head_dim]`.

        Returns `[T, num_heads * head_dim]`.
        """
        ...


class Decoder:
    """A model's function from token ids to logits; keeps no state between calls."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    def forward(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states `[T, hidden]` of int64 `ids` and `positions` `[T]`, before the last norm.

        The rows may belong to any number of sequences: only `attention` knows which.
        """
        hidden = F.embedding(ids, self.weights.embed)
        rotation = self._rotary.at(positions)
        for index, layer in enumerate(self.weights.layers):
            self._attention_block(index, layer, hidden, rotation, attention)
            self._mlp_block(layer, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, vocab]` of hidden states `[N, hidden]`."""
        return F.linear(self._norm(hidden, self.weights.norm), self.weights.head)

    def _attention_block(
        self, index: int, layer: LayerWeights, hidden: Tensor, rotation: Rotation, attention: Attention
    ) -> None:
        """Adds the layer's attention to `hidden`."""
        config = self.config
        normed = self._norm(hidden, layer.input_norm)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, config.head_dim)
        num_qk_heads = config.num_heads + config.num_kv_heads
        qk, v = qkv[:, :num_qk_heads], qkv[:, num_qk_heads:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
            qk = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)), 1)
        qk = rotation.turn(qk)
        mixed = attention.attend(index, qk[:, : config.num_heads], qk[:, config.num_heads :], v)
        _add_linear(hidden, mixed, layer.o, layer.o_bias)

    def _mlp_block(self, layer: LayerWeights, hidden: Tensor) -> None:
        """Adds the layer's gated MLP to `hidden`."""
        gate_up = F.linear(self._norm(hidden, layer.post_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = gate_up.chunk(2, -1)
        _add_linear(hidden, F.silu(gate).mul_(up), layer.down, layer.down_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def _add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual.addmm_(x, weight.t())
    if bias is not None:
        residual.add_(bias)
