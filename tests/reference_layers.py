"""Torch in place of the row-wise Triton kernels, for tests of what drives them."""

import pytest
import torch
from torch import Tensor

from shared.engine import triton_runner
from shared.engine.attention import paged
from shared.engine.attention.decode import DecodeScratch
from shared.engine.attention.decode_plan import LENGTH, NUM_SPLITS, ROW, SEAT, SPLIT
from shared.engine.attention.prefill import Tiling, prefill_attention_reference
from shared.engine.layers.kernels import TORCH_KERNELS
from shared.engine.layers.rotary import rotate_and_store_reference


def use_reference_layers(patch: pytest.MonkeyPatch) -> None:
    """The kernels' own tests hold them to these; the interpreter takes 20 ms over each token of a layer."""
    patch.setattr(triton_runner, "triton_kernels", lambda _num_processors, _device: TORCH_KERNELS)
    patch.setattr(paged, "rotate_and_store", rotate_and_store_reference)
    patch.setattr(paged, "decode_attention", _decode_attention)
    patch.setattr(paged, "prefill_attention", _prefill_attention)


def _prefill_attention(
    q: Tensor,
    layer_pages: Tensor,
    page_table: Tensor,
    blocks: Tensor,
    out: Tensor,
    *,
    scale: float,
    tiling: Tiling,
) -> None:
    prefill_attention_reference(q, layer_pages, page_table, blocks, out, scale=scale)


def _decode_attention(
    q: Tensor,
    layer_pages: Tensor,
    page_table: Tensor,
    out: Tensor,
    scratch: DecodeScratch,
    *,
    scale: float,
) -> None:
    """Each row is a block of one row; the plan's first item of a row tells where it is."""
    items = scratch.work.items[: scratch.work.max_items(len(q))]
    items = items[(items[:, NUM_SPLITS.value] > 0) & (items[:, SPLIT.value] == 0)]
    rows, seats, lengths = items[:, ROW.value], items[:, SEAT.value], items[:, LENGTH.value]
    blocks = torch.stack((rows, (lengths > 0).int(), lengths - 1, seats), 1)
    prefill_attention_reference(q, layer_pages, page_table, blocks, out, scale=scale)
