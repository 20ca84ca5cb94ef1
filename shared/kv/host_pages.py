"""Host memory for copies of pages, allocated once, and the copies between it and the pages of a cache.

A page is one run of bytes on both sides, so the device's copy engines do all the work and no kernel runs. Pages that
lie side by side on both sides go together, and no copy is longer than MAX_COPY_BYTES: a step's small copies, which go
over the same link, wait for one of them at most.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types its CUDA runtime and tensors from buffers in part.

import mmap
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor

from shared.errors import StartupError
from shared.kv.host_tier import Copied
from shared.kv.paged_cache import PagedCache

MAX_COPY_BYTES = 8 * 2**20
"""0.15 ms at 55 GB/s."""


class Ended:
    """A copy that had ended when it returned."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class PinnedPages:
    """See `shared.kv.host_tier.HostPages`. On the CPU a copy has ended on return.

    Raises StartupError if the host has no such memory.
    """

    def __init__(self, cache: PagedCache, num_slots: int) -> None:
        self._num_slots = num_slots
        self._page_bytes = cache.layout.page_bytes
        self._device_bytes = cache.pages.view(-1).view(torch.uint8)
        self._host_bytes = _host_memory(num_slots * self._page_bytes, pinned=cache.device.type == "cuda")
        self._down = _Lane(cache.device)
        self._up = _Lane(cache.device)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def page_bytes(self) -> int:
        return self._page_bytes

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> Copied:
        """The pages must have been written by work that has been seen to end."""
        return self._down.copy(self._device_bytes, pages, self._host_bytes, slots, self._page_bytes)

    def restore(self, slots: Sequence[int], pages: Sequence[int]) -> Copied:
        """Nothing may read or write the pages until the copy has been seen to end."""
        return self._up.copy(self._host_bytes, slots, self._device_bytes, pages, self._page_bytes)


class _Lane:
    """Copies of one direction, one behind the other on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._idle: deque[torch.cuda.Event] = deque()

    def copy(self, source: Tensor, froms: Sequence[int], target: Tensor, tos: Sequence[int], page_bytes: int) -> Copied:
        """Begin to copy page by page from `source` to `target`, which both are bytes."""
        if self._stream is None:
            for start, to, num_bytes in _runs(froms, tos, page_bytes):
                target[to : to + num_bytes].copy_(source[start : start + num_bytes])
            return Ended()
        with torch.cuda.stream(self._stream):
            for start, to, num_bytes in _runs(froms, tos, page_bytes):
                target[to : to + num_bytes].copy_(source[start : start + num_bytes], non_blocking=True)
            event = self._idle.popleft() if self._idle else torch.cuda.Event()
            event.record()
        return _OnStream(event, self._idle)


class _OnStream:
    """A copy on the device; its event is used again once it was seen to end."""

    def __init__(self, event: torch.cuda.Event, idle: "deque[torch.cuda.Event]") -> None:
        self._event: torch.cuda.Event | None = event
        self._idle = idle

    def query(self) -> bool:
        if self._event is not None and self._event.query():
            self._idle.append(self._event)
            self._event = None
        return self._event is None

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def _runs(froms: Sequence[int], tos: Sequence[int], page_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Copies (from byte, to byte, number of bytes) that do all pages, as few and as long as they may be."""
    if len(froms) != len(tos):
        raise ValueError(f"{len(froms)} pages are copied to {len(tos)}")
    start = 0
    for end in range(1, len(froms) + 1):
        is_run = end < len(froms) and froms[end] == froms[end - 1] + 1 and tos[end] == tos[end - 1] + 1
        if is_run:
            continue
        num_bytes = (end - start) * page_bytes
        for done in range(0, num_bytes, MAX_COPY_BYTES):
            copied = min(MAX_COPY_BYTES, num_bytes - done)
            yield froms[start] * page_bytes + done, tos[start] * page_bytes + done, copied
        start = end


def _host_memory(num_bytes: int, *, pinned: bool) -> Tensor:
    """Zeros, uint8 `[num_bytes]`, in physical memory from now on; `pinned`: which the device copies by itself.

    (PyTorch's own pinned memory takes the next power of two.)
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise StartupError(f"the host has no {num_bytes / 1e9:.1f} GB for its cache of pages: {error}") from error
    with suppress(OSError):  # a kernel without huge pages: then pinning takes longer, and nothing else changes
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8).zero_()
    if pinned:
        runtime = cast("Any", torch.cuda.cudart())
        code = int(runtime.cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
        if code:
            raise StartupError(f"{num_bytes / 1e9:.1f} GB of the host's memory cannot be pinned: CUDA error {code}")
        # At the end of the process the driver does it.
        weakref.finalize(tensor, runtime.cudaHostUnregister, tensor.data_ptr()).atexit = False
    return tensor
