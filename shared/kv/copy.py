"""Copies between the pages of a cache and one contiguous run of bytes."""

from collections.abc import Sequence

import torch

from shared.kv.paged_cache import PagedCache


def gather_pages(cache: PagedCache, pages: Sequence[int], out: torch.Tensor) -> None:
    """Copy `pages`, in the order given, to `out`.

    On CUDA the copy is queued on the current stream of the calling thread.

    Args:
        pages: page numbers; may repeat.
        out: uint8 `[len(pages) * page_bytes]`, contiguous, on the cache's device.

    Raises:
        ValueError: a page outside the cache, or `out` of the wrong size.
    """
    index = _page_index(cache, pages, out)
    torch.index_select(_words(cache, cache.pages), 0, index, out=_words(cache, out))


def scatter_pages(cache: PagedCache, source: torch.Tensor, pages: Sequence[int]) -> None:
    """Copy `source` to `pages`: the inverse of `gather_pages`.

    Args:
        source: uint8 `[len(pages) * page_bytes]`, contiguous, on the cache's device.
        pages: page numbers, each at most once.

    Raises:
        ValueError: a page outside the cache or named twice, or `source` of the wrong size.
    """
    if len(set(pages)) != len(pages):
        raise ValueError("a page is named twice as the destination of a copy")
    index = _page_index(cache, pages, source)
    _words(cache, cache.pages).index_copy_(0, index, _words(cache, source))


def _words(cache: PagedCache, run: torch.Tensor) -> torch.Tensor:
    """A run of pages as int64 `[num_pages, words]`: a copy needs no dtype, and wide words make it fast."""
    return run.view(-1).view(torch.int64).view(-1, cache.layout.page_bytes // 8)


def _page_index(cache: PagedCache, pages: Sequence[int], run: torch.Tensor) -> torch.Tensor:
    # Checked here because an index out of range on CUDA does not raise: it ends the device's context.
    outside = [page for page in pages if not 0 <= page < cache.num_pages]
    if outside:
        raise ValueError(f"page {outside[0]} is outside the cache of {cache.num_pages} pages")
    if run.numel() != len(pages) * cache.layout.page_bytes:
        raise ValueError(
            f"{len(pages)} pages of {cache.layout.page_bytes} bytes do not fill a run of {run.numel()} bytes"
        )
    index = torch.tensor(pages, dtype=torch.int64)
    # From pinned memory the copy is queued; from ordinary memory it waits for all that the stream has to do before it.
    return index.pin_memory().to(cache.device, non_blocking=True) if cache.device.type == "cuda" else index
