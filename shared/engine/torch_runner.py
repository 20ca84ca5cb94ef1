"""The model over paged KV in plain PyTorch: on CPUs, and the reference for `triton_runner` on GPUs."""

# pyright: reportUnknownMemberType=false
# torch types tolist, split and unflatten only in part.

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.blocks import PAGE_TOKENS, pages_for
from shared.engine.attention.sdpa import PagedSdpa, Run
from shared.engine.batch import BatchRow, Done, Sampled
from shared.engine.layer_marks import LayerEvents, LayerMarks
from shared.engine.layers.kernels import TORCH_KERNELS
from shared.engine.sampling.torch_sampler import Sampler
from shared.engine.weights import Checkpoint
from shared.kv.paged_cache import PagedCache


class TorchRunner:
    """Runs a checkpoint's decoder by plain torch, on the device that holds its weights."""

    def __init__(self, checkpoint: Checkpoint, num_pages: int) -> None:
        self._decoder = checkpoint.decoder
        self._cache = PagedCache(checkpoint.layout, num_pages, checkpoint.decoder.device)
        self._events = LayerEvents(checkpoint.config.num_layers, 1, self._cache.device)
        self._rotary = self._decoder.rotary_embedding()
        self._sampler = Sampler(checkpoint.config.eos_token_ids, checkpoint.config.vocab_size)
        torch.set_float32_matmul_precision("highest")  # TF32 would break the promise of equal tokens in float32
        # cuDNN plans its attention anew for every length, and a decode step has a new one: 1.6 ms a layer on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def cache(self) -> PagedCache:
        return self._cache

    @property
    def num_ahead(self) -> int:
        """None: a batch needs the tokens of the one before it."""
        return 0

    def launch(self, rows: tuple[BatchRow, ...], layers: LayerMarks | None = None) -> Done:
        """Compute the rows, write their KV, and sample where wanted; all is done on return."""
        return Done(self._run(rows, None if layers is None else self._events.marking(layers)))

    @torch.inference_mode()
    def _run(self, rows: tuple[BatchRow, ...], stored: Callable[[int], None] | None) -> list[Sampled | None]:
        """One entry a row, None where no token is wanted.

        Invariant: behind the last position of a sequence, its last page holds finite numbers (zeros, since a page is
        cleared when its first position is computed). Otherwise a NaN left by an earlier user of the page would reach
        this sequence through keys that the attention mask hides.
        """
        if not rows:
            return []
        order = sorted(range(len(rows)), key=lambda index: _attention_order(rows[index]))
        ordered = [rows[index] for index in order]
        self._clear_entered_pages(ordered)
        ends = np.cumsum([row.end - row.start for row in ordered]) - 1
        sampling = [(index, end) for index, end in zip(order, ends, strict=True) if rows[index].sample]
        last_rows = torch.tensor([end for _, end in sampling], dtype=torch.int64, device=self._decoder.device)
        hidden = self._forward(ordered, last_rows, stored)
        results: list[Sampled | None] = [None] * len(rows)
        if sampling:
            logits = self._decoder.logits(hidden, TORCH_KERNELS)
            sampled = self._sampler.sample(logits, [rows[index] for index, _ in sampling])
            for (index, _), token in zip(sampling, sampled, strict=True):
                results[index] = token
        elif hidden.is_cuda:
            torch.cuda.current_stream(hidden.device).synchronize()  # reading sampled tokens does the same
        return results

    def _forward(self, rows: Sequence[BatchRow], wanted: Tensor, stored: Callable[[int], None] | None) -> Tensor:
        """Hidden states `[N, hidden]` of the `wanted` ones of the rows' tokens, one row's behind the other."""
        runs = [Run(row.start, row.end, row.pages[: pages_for(row.end)]) for row in rows]
        attention = PagedSdpa(self._cache, runs, self._decoder.config, self._rotary, stored)
        ids = np.concatenate([np.frombuffer(row.ids[row.start : row.end], dtype=np.int32) for row in rows])
        device_ids = torch.tensor(ids, dtype=torch.int64, device=self._decoder.device)
        return self._decoder.forward(device_ids, attention, TORCH_KERNELS, wanted)

    def _clear_entered_pages(self, rows: Sequence[BatchRow]) -> None:
        last_pages = [(row, (row.end - 1) // PAGE_TOKENS) for row in rows]
        entered = [row.pages[index] for row, index in last_pages if row.start <= index * PAGE_TOKENS]
        if entered:
            self._cache.pages.index_fill_(0, torch.tensor(entered, device=self._cache.device), 0)


def _attention_order(row: BatchRow) -> tuple[bool, int]:
    """Decode rows first, long ones before short ones: neighbours share an attention call."""
    return row.end - row.start > 1, -row.end
