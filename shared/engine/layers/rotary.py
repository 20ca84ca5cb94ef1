"""From the qkv projection to what attention reads: q and k normalised per head and rotated, k and v in their pages."""

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
from torch import Tensor


def normed_heads(qk: Tensor, num_heads: int, q_norm: Tensor, k_norm: Tensor, eps: float) -> Tensor:
    """`qk` `[T, num_heads + num_kv_heads, head_dim]` with RMSNorm over each head."""
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    return torch.cat((F.rms_norm(q, q_norm.shape, q_norm, eps), F.rms_norm(k, k_norm.shape, k_norm, eps)), 1)
