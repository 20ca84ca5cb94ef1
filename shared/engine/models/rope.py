"""Rotary position embedding: the frequencies of each variant, and turning q and k by them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.engine.models.config import DefaultRope, LinearRope, Llama3Rope, Rope, YarnRope


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and signed sine of the positions of one step, `[T, 1, head_dim]`, in the model's dtype.

    The first half of `sine` is negated, so that turning x is `x * cosine + roll(x, head_dim / 2) * sine`.
    """

    cosine: Tensor
    sine: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """`heads` `[T, num_heads, head_dim]`, each pair (i, i + head_dim / 2) turned by its position's angle."""
        return torch.addcmul(heads * self.cosine, heads.roll(heads.shape[-1] // 2, -1), self.sine)


class RotaryEmbedding:
    """Angles of all positions of one model on one device."""

    def __init__(self, rope: Rope, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = rope_frequencies(rope, head_dim).to(device)
        self._scale = _scale_of(rope)
        self._dtype = dtype

    def at(self, positions: Tensor) -> Rotation:
        """The rotation of int64 `positions` `[T]`; angles are float32 whatever the model's dtype."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cosine, sine = angles.cos() * self._scale, angles.sin() * self._scale
        return Rotation(
            torch.cat((cosine, cosine), -1)[:, None].to(self._dtype),
            torch.cat((-sine, sine), -1)[:, None].to(self._dtype),
        )


def angle_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of each pair at positions 0 to `num_positions` - 1: float32 `[num_positions, head_dim]`."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = positions[:, None] * rope_frequencies(rope, head_dim).to(device)
    return torch.cat((angles.cos(), angles.sin()), -1) * _scale_of(rope)


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair, float32 `[head_dim / 2]`."""
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope:
        case DefaultRope():
            return base
        case LinearRope():
            return base / rope.factor
        case Llama3Rope():
            return _llama3_frequencies(rope, base)
        case YarnRope():
            return _yarn_frequencies(rope, base, head_dim)


def _scale_of(rope: Rope) -> float:
    return rope.attention_factor if isinstance(rope, YarnRope) else 1.0


def _llama3_frequencies(rope: Llama3Rope, base: Tensor) -> Tensor:
    """Blend by how often a pair turns within the original context (Llama 3.1 reference code)."""
    turns = rope.original_max_position * base / (2 * math.pi)
    kept_share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_share = kept_share.clamp(0.0, 1.0)
    return (1 - kept_share) * base / rope.factor + kept_share * base


def _yarn_frequencies(rope: YarnRope, base: Tensor, head_dim: int) -> Tensor:
    """Ramp between kept and interpolated frequencies (YaRN, arXiv:2309.00071, section 3.2)."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return base / rope.factor * interpolated_share + base * (1 - interpolated_share)
