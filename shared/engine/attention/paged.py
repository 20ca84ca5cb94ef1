"""Attention of one step by the Triton kernels: of its decode rows, and beside them of its chunks in blocks.

The former is bound by memory and the latter by arithmetic, so on CUDA they run at the same time:

    current stream:  rotate and store ─┬─> decode attention ─┬─>
    side stream:                       └─> prefill attention ┘
"""

# pyright: reportUnknownMemberType=false
# torch types unflatten and torch.cuda in part.

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shared.engine.attention.decode import DecodeScratch, decode_attention
from shared.engine.attention.decode_plan import plan_decode
from shared.engine.attention.prefill import Tiling, prefill_attention
from shared.engine.layers.rotary import rotate_and_store
from shared.engine.models.config import ModelConfig
from shared.engine.models.decoder import LayerWeights

URGENT = -1
"""Priority of the side stream. Programs of prefill attention are few and leave room beside them; those of decode
attention fill every processor, and the others would wait for their end."""


@dataclass(frozen=True, slots=True)
class SideStream:
    """A stream that takes work over from the current one and gives it back; the same in a capture of a graph.

    What is used there needs no `record_stream`: whoever takes its memory next is behind the join.

    Attributes:
        begun, ended: recorded anew by each fork.
    """

    stream: torch.cuda.Stream
    begun: torch.cuda.Event
    ended: torch.cuda.Event

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """One for `device`; the CPU has none."""
        if device.type == "cpu":
            return None
        return cls(torch.cuda.Stream(device, priority=URGENT), torch.cuda.Event(), torch.cuda.Event())

    @contextmanager
    def fork(self) -> Generator[None, None, None]:
        """What is launched in this context runs behind all that was launched before it, and beside what comes after.

        It may allocate nothing.
        """
        self.begun.record()
        self.stream.wait_event(self.begun)
        with torch.cuda.stream(self.stream):
            yield
            self.ended.record()

    def join(self) -> None:
        """Let the current stream wait for what was forked."""
        self.ended.wait()


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
        scratch: of `decode_attention`; holds the plan of these rows, until only those wanted attend.
        side: where prefill attention runs if there are decode rows too; None where there is but one stream.
        stored: called with each layer's number once the work that stores its keys and values is launched.
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
    side: SideStream | None
    stored: Callable[[int], None] | None = None

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, wanted: Tensor | None) -> Tensor:
        """See `shared.engine.models.decoder.Attention`. Behind a layer with rows `wanted` no other may follow."""
        config = self.config
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
        if self.stored is not None:
            self.stored(layer)
        q = qkv[:, : config.q_size].unflatten(1, (config.num_heads, config.head_dim))
        return self._attend_all(layer_pages, q) if wanted is None else self._attend_wanted(layer_pages, q, wanted)

    def _attend_all(self, layer_pages: Tensor, q: Tensor) -> Tensor:
        num_decode, scale = self.num_decode, self._scale
        mixed = self._room_for(q)
        side = self.side if num_decode and len(self.blocks) else None
        with side.fork() if side else nullcontext():
            prefill_attention(q, layer_pages, self.page_table, self.blocks, mixed, scale=scale, tiling=self.tiling)
        decode_attention(q[:num_decode], layer_pages, self.page_table, mixed[:num_decode], self.scratch, scale=scale)
        if side:
            side.join()
        return mixed

    def _attend_wanted(self, layer_pages: Tensor, q: Tensor, wanted: Tensor) -> Tensor:
        """Each wanted row attends by itself, as a decode row does, whatever it is."""
        plan_decode(self.positions.index_select(0, wanted), self.seats.index_select(0, wanted), self.scratch.work)
        wanted_q = q.index_select(0, wanted)
        mixed = self._room_for(wanted_q)
        decode_attention(wanted_q, layer_pages, self.page_table, mixed, self.scratch, scale=self._scale)
        return mixed

    def _room_for(self, q: Tensor) -> Tensor:
        return torch.empty((len(q), self.config.q_size), dtype=q.dtype, device=q.device)

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5
