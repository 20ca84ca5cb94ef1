"""Paged attention by torch's scaled_dot_product_attention, on CPU and CUDA: the reference for every faster kernel."""

# pyright: reportUnknownMemberType=false
# torch types tolist, split and unflatten only in part.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by
from torch import Tensor

from shared.blocks import PAGE_TOKENS
from shared.engine.layers.rotary import normed_heads
from shared.engine.models.config import ModelConfig
from shared.engine.models.decoder import LayerWeights
from shared.engine.models.rope import RotaryEmbedding
from shared.kv.paged_cache import PagedCache

MAX_PADDING_RATIO = 2
"""Longest over shortest page list of sequences that are decoded in one call; the shorter ones are padded."""


@dataclass(frozen=True, slots=True)
class Run:
    """Token rows of one sequence: positions [start, end), computed now, whose pages are `pages`.

    `pages` covers positions [0, end); KV of [0, start) is in them already.
    """

    start: int
    end: int
    pages: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Decode:
    """Neighbouring runs of one row each, attended in one call.

    Attributes:
        first, last: token rows [first, last).
        table: `[last - first, n]` page numbers, flattened; short lists are padded with the sequence's own first page.
        length: keys to use of the n pages.
        mask: `[last - first, 1, 1, length]`, 0 or -inf, added to the scores; None if all lengths are equal.
    """

    first: int
    last: int
    table: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One run of several rows.

    Attributes:
        first, last: token rows [first, last).
        table: `[n]` page numbers; None if the run starts its sequence, so that all its keys are at hand.
        length: keys to use of the n pages.
        mask: `[last - first, length]`, 0 or -inf, added to the scores; None: causal from position 0.
    """

    first: int
    last: int
    table: Tensor | None
    length: int
    mask: Tensor | None


class PagedSdpa:
    """Attention of one step, planned once and used by every layer.

    Token rows lie in the order of `runs`. One-row runs that are neighbours and of similar length share a call, so
    callers sort them by length. A masked key is still multiplied (by a weight of 0), so what lies behind a sequence's
    end in its last page must be finite.

    Args:
        stored: called with each layer's number once the work that stores its keys and values is launched.
    """

    def __init__(
        self,
        cache: PagedCache,
        runs: Sequence[Run],
        config: ModelConfig,
        rotary: RotaryEmbedding,
        stored: Callable[[int], None] | None = None,
    ) -> None:
        self._stored = stored
        self._cache = cache
        self._config = config
        device = cache.device
        positions = [torch.arange(run.start, run.end) for run in runs]
        pages = [torch.tensor(run.pages)[own // PAGE_TOKENS] for run, own in zip(runs, positions, strict=True)]
        row_positions = torch.cat(positions).to(device)
        self._rotation = rotary.at(row_positions)
        self._row_page = torch.cat(pages).to(device)
        self._row_slot = row_positions % PAGE_TOKENS
        self._parts = [self._plan(first, group) for first, group in _grouped(runs)]

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, wanted: Tensor | None) -> Tensor:
        """See `shared.engine.models.decoder.Attention`; all rows attend, and those wanted are picked."""
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        heads = qkv.unflatten(1, (-1, self._config.head_dim))
        qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            qk = normed_heads(qk, num_heads, weights.q_norm, weights.k_norm, self._config.rms_norm_eps)
        qk = self._rotation.turn(qk)
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        layer_pages = self._cache.pages[:, layer]
        key_pages, value_pages = layer_pages[:, 0], layer_pages[:, 1]
        key_pages.index_put_((self._row_page, self._row_slot), k)
        value_pages.index_put_((self._row_page, self._row_slot), v)
        if self._stored is not None:
            self._stored(layer)
        mixed: list[Tensor] = []
        for part in self._parts:
            rows = slice(part.first, part.last)
            if isinstance(part, _Decode):
                mixed.append(_decode(part, q[rows], key_pages, value_pages))
            elif part.table is None:
                mixed.append(_prefill(part, q[rows], k[rows], v[rows]))
            else:
                keys = _gather(key_pages, part.table).flatten(0, 1)[: part.length]
                values = _gather(value_pages, part.table).flatten(0, 1)[: part.length]
                mixed.append(_prefill(part, q[rows], keys, values))
        together = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return together if wanted is None else together.index_select(0, wanted)

    def _plan(self, first: int, runs: Sequence[Run]) -> _Decode | _Prefill:
        if runs[0].num_rows > 1:
            return self._plan_prefill(first, runs[0])
        return self._plan_decode(first, runs)

    def _plan_decode(self, first: int, runs: Sequence[Run]) -> _Decode:
        width = max(len(run.pages) for run in runs)
        table = [chain(run.pages, run.pages[:1] * (width - len(run.pages))) for run in runs]
        lengths = torch.tensor([run.end for run in runs])
        longest = int(lengths.max())
        mask = None
        if int(lengths.min()) < longest:
            hidden = torch.arange(longest) >= lengths[:, None]
            mask = self._mask(hidden.to(self._cache.device))[:, None, None]
        pages = torch.tensor(list(chain.from_iterable(table)), device=self._cache.device)
        return _Decode(first, first + len(runs), pages, longest, mask)

    def _plan_prefill(self, first: int, run: Run) -> _Prefill:
        last = first + run.num_rows
        if run.start == 0:
            return _Prefill(first, last, table=None, length=run.end, mask=None)
        device = self._cache.device
        hidden = torch.ones((run.num_rows, run.end), dtype=torch.bool, device=device).triu(run.start + 1)
        pages = torch.tensor(run.pages, device=device)
        return _Prefill(first, last, pages, run.end, self._mask(hidden))

    def _mask(self, hidden: Tensor) -> Tensor:
        zeros = torch.zeros(hidden.shape, dtype=self._cache.pages.dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))


def _grouped(runs: Sequence[Run]) -> list[tuple[int, list[Run]]]:
    """Runs that are attended together, each group with its first token row."""
    groups: list[tuple[int, list[Run]]] = []
    row = 0
    for run in runs:
        if groups and _joins(groups[-1][1][0], run):
            groups[-1][1].append(run)
        else:
            groups.append((row, [run]))
        row += run.num_rows
    return groups


def _joins(leader: Run, run: Run) -> bool:
    shorter, longer = sorted((len(leader.pages), len(run.pages)))
    return leader.num_rows == run.num_rows == 1 and longer <= MAX_PADDING_RATIO * shorter


def _gather(pages: Tensor, table: Tensor) -> Tensor:
    """`pages` `[num_pages, PAGE_TOKENS, kv_head, head_dim]` of one layer, picked: `[n, PAGE_TOKENS, ...]`."""
    return pages.flatten(1).index_select(0, table).view(-1, *pages.shape[1:])


def _decode(part: _Decode, q: Tensor, key_pages: Tensor, value_pages: Tensor) -> Tensor:
    """One query row a sequence. The query heads that share a KV head are its rows, so that no key is copied."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = key_pages.shape[2]
    keys, values = (
        _gather(pages, part.table).view(batch, -1, num_kv_heads, head_dim)[:, : part.length].transpose(1, 2)
        for pages in (key_pages, value_pages)
    )
    grouped_q = q.reshape(batch, num_kv_heads, -1, head_dim)
    mixed = F.scaled_dot_product_attention(grouped_q, keys, values, attn_mask=part.mask)
    return mixed.reshape(batch, num_heads * head_dim)


def _prefill(part: _Prefill, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Many query rows of one sequence; `keys` and `values` are `[length, kv_head, head_dim]`.

    No key is copied for the query heads that share it: from position 0 on KV heads are the batch and the query heads
    that share one are its heads; behind other keys, which takes a mask, the sharing heads are one longer run of rows.
    (The mask with expanded keys would do for both, but there CUDA's kernel reads out of bounds, seen in torch 2.11.)
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    shared = num_heads // num_kv_heads
    grouped_q = q.unflatten(1, (num_kv_heads, shared)).permute(1, 2, 0, 3)
    by_head = (kv.transpose(0, 1)[:, None] for kv in (keys, values))
    if part.mask is None:
        wide_keys, wide_values = (kv.expand(-1, shared, -1, -1) for kv in by_head)
        mixed = F.scaled_dot_product_attention(grouped_q, wide_keys, wide_values, is_causal=True)
    else:
        narrow_keys, narrow_values = by_head
        rows = grouped_q.reshape(num_kv_heads, 1, shared * num_rows, head_dim)
        mixed = F.scaled_dot_product_attention(
            rows, narrow_keys, narrow_values, attn_mask=part.mask.repeat(shared, 1)
        ).view(num_kv_heads, shared, num_rows, head_dim)
    return mixed.permute(2, 0, 1, 3).reshape(num_rows, num_heads * head_dim)
