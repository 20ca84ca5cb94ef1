"""Copies between pages of a cache and contiguous runs of bytes, in every form that pages travel in."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shared.blocks import PAGE_TOKENS
from shared.kv.copy_kernels import Queued, TritonCopies
from shared.kv.copy_reference import TorchCopies
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes


class Copies(Protocol):
    """What copies; its arguments have been checked. See `PageCopier`."""

    def warm_up(self) -> None: ...

    def pack(
        self, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat, out: Tensor, last_tokens: int
    ) -> Queued | None: ...

    def unpack(self, source: Tensor, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat) -> Queued | None: ...


class PageCopier:
    """Copies of one cache: by torch on the CPU, where they have ended on return; on CUDA by Triton's kernels.

    There they are queued on `stream`, or on the current one, and one thread at a time may call. Nothing waits for the
    device, unless `copy_kernels.MAX_QUEUED` copies are queued: then the call waits until the oldest has ended.
    """

    def __init__(self, cache: PagedCache, max_pages: int, stream: torch.cuda.Stream | None = None) -> None:
        """At most `max_pages` pages are copied at once."""
        self._cache = cache
        self._max_pages = max_pages
        self._copies: Copies = (
            TritonCopies(cache, max_pages, stream) if cache.device.type == "cuda" else TorchCopies(cache)
        )

    def warm_up(self) -> None:
        """Compile every kernel; no page changes. Afterwards nothing is compiled or allocated."""
        self._copies.warm_up()

    def pack(
        self,
        pages: Sequence[int],
        layers: LayerSpan,
        fmt: WireFormat,
        out: Tensor,
        *,
        last_tokens: int = PAGE_TOKENS,
    ) -> Queued | None:
        """Write `layers` of `pages`, in the order given, to `out` in the form `fmt`; None if that is done on return.

        Where a lossy format meets NaN or infinity, what is coded together with it comes out as NaN.

        Args:
            pages: page numbers; may repeat.
            out: uint8 `[packed_bytes]`, contiguous, on the cache's device.
            last_tokens: how many tokens of the last page are valid. The others leave no trace in a lossy format: they
                come out as copies of the last valid one.

        Raises:
            ValueError: a page or layer outside the cache, too many pages, `last_tokens` outside 1 to PAGE_TOKENS, or an
                `out` that is not as said; on CUDA also one that begins at no multiple of 16 bytes.
        """
        self._check(pages, layers, fmt, out)
        if not 1 <= last_tokens <= PAGE_TOKENS:
            raise ValueError(f"a last page of {last_tokens} tokens is none")
        return self._copies.pack(pages, layers, fmt, out, last_tokens)

    def unpack(self, source: Tensor, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat) -> Queued | None:
        """Write what `pack` has made to `layers` of `pages`, leaving others alone; None if that is done on return.

        Args:
            source: uint8 `[packed_bytes]`, contiguous, on the cache's device.
            pages: page numbers, each at most once.

        Raises:
            ValueError: a page or layer outside the cache, a page named twice, too many pages, or a `source` that is not
                as said; on CUDA also one that begins at no multiple of 16 bytes.
        """
        if len(set(pages)) != len(pages):
            raise ValueError("a page is named twice as the destination of a copy")
        self._check(pages, layers, fmt, source)
        return self._copies.unpack(source, pages, layers, fmt)

    def _check(self, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat, run: Tensor) -> None:
        layout, num_pages = self._cache.layout, len(pages)
        if num_pages > self._max_pages:
            raise ValueError(f"{num_pages} pages are more than {self._max_pages}")
        # Checked here because an index out of range on CUDA does not raise: it ends the device's context.
        for page in (min(pages), max(pages)) if pages else ():
            if not 0 <= page < self._cache.num_pages:
                raise ValueError(f"page {page} is outside the cache of {self._cache.num_pages} pages")
        if not 0 <= layers.first < layers.end <= layout.num_layers:
            raise ValueError(f"layers {layers.first} to {layers.end} are outside the cache of {layout.num_layers}")
        if run.dtype != torch.uint8 or not run.is_contiguous():
            raise ValueError(f"a run is contiguous uint8, not {run.dtype} of strides {run.stride()}")
        if run.numel() != packed_bytes(layout, fmt, num_pages, layers.num_layers):
            raise ValueError(
                f"{layers.num_layers} layers of {num_pages} pages in {fmt} do not fill a run of {run.numel()} bytes"
            )
