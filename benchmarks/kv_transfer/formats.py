"""Packing and unpacking alone, in each form in which pages travel."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from shared.kv.copy import PageCopier
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes

NUM_WARM_UPS = 3


def format_times(cache: PagedCache, pages: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """For each form: milliseconds of both copies, the bytes made, and how far off a value is after both at worst.

    The cache's contents come back as the last form leaves them. On a GPU the times are the device's.
    """
    copier = PageCopier(cache, len(pages))
    copier.warm_up()
    layers = LayerSpan(0, cache.layout.num_layers)
    before = cache.pages[list(pages)].clone()
    rows: list[dict[str, Any]] = []
    for fmt in WireFormat:
        size = packed_bytes(cache.layout, fmt, len(pages), layers.num_layers)
        packed = torch.empty(size, dtype=torch.uint8, device=cache.device)
        for page, content in zip(pages, before, strict=True):
            cache.pages[page] = content

        def pack(fmt: WireFormat = fmt, out: torch.Tensor = packed) -> None:
            copier.pack(pages, layers, fmt, out)

        def unpack(fmt: WireFormat = fmt, source: torch.Tensor = packed) -> None:
            copier.unpack(source, pages, layers, fmt)

        pack_ms, unpack_ms = (_times_ms(work, cache.device, repeats) for work in (pack, unpack))
        off = max((cache.pages[page] - content).abs().max().item() for page, content in zip(pages, before, strict=True))
        rows.append(
            {
                "format": fmt.value,
                "bytes": size,
                "share": round(size / before.nbytes, 4),
                "pack_ms": median(pack_ms),
                "unpack_ms": median(unpack_ms),
                "largest_error": off,
            }
        )
    return rows


def _times_ms(work: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    for _ in range(NUM_WARM_UPS):
        work()
    return [(_device_ms if device.type == "cuda" else _wall_ms)(work) for _ in range(repeats)]


def _device_ms(work: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def _wall_ms(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began_s)
