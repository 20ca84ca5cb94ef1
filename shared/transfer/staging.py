"""Memory that UCX sends from and receives into, allocated once, and the copies between it and the pages."""

import asyncio
from bisect import insort
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

import torch

from shared.blocks import PAGE_TOKENS
from shared.errors import StartupError
from shared.kv.copy import PageCopier
from shared.kv.copy_kernels import Queued
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes

ARENA_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Default size of an arena, by the kind of device. Between GPUs a message costs about as much time as 20 MiB more of
it, so that parts should be large; on the CPU the link, not the message, is what takes long."""

NUM_LANES = 3
"""Parts of one link on their way at once: one is packed while two are on the wire, of which the second waits there.
With more, the wire stands still while the first parts of eight pulls are packed."""

LARGEST_PART_SHARE = 1 / (NUM_LANES + 1)
"""Of an arena: room for the parts that one link has on their way at once, and one of another link."""

ALIGNMENT = 512
"""Bytes, of what an arena lends."""

NUM_QUICK_LOOKS = 200
SLOW_LOOK_S = 1e-3
"""How often a copy on the GPU is asked whether it has ended: at every turn of the event loop as long as a copy takes
that has the GPU to itself; less often if it stands behind a prefill, whose thread needs the interpreter too."""

T = TypeVar("T")


def staging_bytes(device_type: str) -> int:
    """What a `Staging` of default size allocates on a device of this kind."""
    return 2 * ARENA_BYTES[device_type]


async def to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its very end; if the caller is cancelled meanwhile, that is raised afterwards.

    For what must not be left running behind the caller's back: a copy in a thread, a receive into a buffer.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it as forgotten
    raise cancellation


def check_allocator(environ: Mapping[str, str]) -> None:
    """Refuse an allocator whose memory UCX cannot export. Raises StartupError."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower():
            raise StartupError(
                f"{name} asks for expandable_segments: such memory cannot be shared between processes and KV would "
                f"travel by TCP; unset it"
            )


class Arena:
    """Memory lent in pieces of any size; used on one event loop.

    Who asks first is served first, also where a later and smaller wish would fit: so nobody waits for ever.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.zeros(_aligned(num_bytes), dtype=torch.uint8, device=device)
        self._lent: list[range] = []  # in order of place
        self._wishes: deque[tuple[int, asyncio.Future[range]]] = deque()

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    @property
    def num_free_bytes(self) -> int:
        return self.num_bytes - sum(map(len, self._lent))

    @asynccontextmanager
    async def lease(self, num_bytes: int) -> AsyncGenerator[torch.Tensor]:
        """Wait for a piece: uint8 `[num_bytes]`, contiguous, at a multiple of `ALIGNMENT` in the arena.

        Nothing may touch it after the block.

        Raises:
            ValueError: less than a byte, or more than the whole arena.
        """
        place = await self._take(num_bytes)
        try:
            yield self._memory[place.start : place.start + num_bytes]
        finally:
            self._give_back(place)

    async def _take(self, num_bytes: int) -> range:
        if not 1 <= num_bytes <= self.num_bytes:
            raise ValueError(f"{num_bytes} bytes are wanted of an arena of {self.num_bytes}")
        if not self._wishes and (place := self._find(_aligned(num_bytes))) is not None:
            insort(self._lent, place, key=_start)
            return place
        granted: asyncio.Future[range] = asyncio.get_running_loop().create_future()
        self._wishes.append((_aligned(num_bytes), granted))
        self._grant()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._grant()  # it may have stood in the way of others
            else:
                self._give_back(granted.result())
            raise

    def _give_back(self, place: range) -> None:
        self._lent.remove(place)
        self._grant()

    def _grant(self) -> None:
        """Fulfil the oldest wishes, up to the first that does not fit."""
        while self._wishes:
            num_bytes, granted = self._wishes[0]
            if not granted.done():
                place = self._find(num_bytes)
                if place is None:
                    return
                insort(self._lent, place, key=_start)
                granted.set_result(place)
            self._wishes.popleft()

    def _find(self, num_bytes: int) -> range | None:
        """The first gap of that size."""
        start = 0
        for place in (*self._lent, range(self.num_bytes, self.num_bytes)):
            if start + num_bytes <= place.start:
                return range(start, start + num_bytes)
            start = place.stop
        return None


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _start(place: range) -> int:
    return place.start


class Staging:
    """One cache's memory for sending and receiving, and its copies. The two arenas are apart so that two workers that
    pull from each other cannot wait for each other's memory.

    Attributes:
        cache: whose pages travel.
        outgoing, incoming: the arenas.
        max_part_bytes: the largest part that this worker sends or receives.
    """

    def __init__(self, cache: PagedCache, environ: Mapping[str, str], *, arena_bytes: int | None = None) -> None:
        """`arena_bytes`: of each of the two arenas; None takes the device's `ARENA_BYTES`.

        Raises StartupError.
        """
        arena_bytes = ARENA_BYTES[cache.device.type] if arena_bytes is None else arena_bytes
        max_part_bytes = int(arena_bytes * LARGEST_PART_SHARE)
        layer_bytes = packed_bytes(cache.layout, WireFormat.NATIVE, 1, 1)
        if max_part_bytes < layer_bytes:
            raise StartupError(
                f"parts of {max_part_bytes} bytes, for which a staging arena of {arena_bytes} has room, hold no layer "
                f"of a page, {layer_bytes} bytes"
            )
        self._stream: torch.cuda.Stream | None = None
        if cache.device.type == "cuda":
            check_allocator(environ)
            self._stream = torch.cuda.Stream(cache.device)
        self.cache = cache
        self.max_part_bytes = max_part_bytes
        self.outgoing = Arena(arena_bytes, cache.device)
        self.incoming = Arena(arena_bytes, cache.device)
        smallest_bytes = min(packed_bytes(cache.layout, fmt, 1, 1) for fmt in WireFormat)
        self._copier = PageCopier(cache, min(cache.num_pages, max_part_bytes // smallest_bytes), self._stream)

    async def warm_up(self) -> None:
        """Do all that only the first copies need: load kernels, allocate. Page 0 is brought to itself."""
        await self._copied(self._copier.warm_up)
        layer = LayerSpan(0, 1)
        async with self.outgoing.lease(packed_bytes(self.cache.layout, WireFormat.NATIVE, 1, 1)) as part:
            await self.pack((0,), layer, WireFormat.NATIVE, part)
            await self.unpack(part, (0,), layer, WireFormat.NATIVE)

    async def pack(
        self,
        pages: Sequence[int],
        layers: LayerSpan,
        fmt: WireFormat,
        out: torch.Tensor,
        *,
        last_tokens: int = PAGE_TOKENS,
    ) -> None:
        """`PageCopier.pack` beside the event loop. What is packed must have been written by work that has completed."""
        await self._copied(self._copier.pack, pages, layers, fmt, out, last_tokens=last_tokens)

    async def unpack(self, source: torch.Tensor, pages: Sequence[int], layers: LayerSpan, fmt: WireFormat) -> None:
        """`PageCopier.unpack` beside the event loop; afterwards every stream sees the pages."""
        await self._copied(self._copier.unpack, source, pages, layers, fmt)

    async def clear(self, space: torch.Tensor) -> None:
        """Fill leased memory with zeros, beside the event loop."""
        await self._copied(self._clear, space)

    def _clear(self, space: torch.Tensor) -> Queued | None:
        with torch.cuda.stream(self._stream):
            space.zero_()
            return None if self._stream is None else self._stream.record_event()

    async def _copied(self, copy: Callable[..., Queued | None], *arguments: Any, **named: Any) -> None:
        """UCX and the engine know nothing of our stream, so the copy has ended when this returns, cancelled or not."""
        if self._stream is None:
            await to_completion(asyncio.to_thread(copy, *arguments, **named))
            return
        queued = copy(*arguments, **named)
        # Asked between the loop's turns: a thread that waits for it is woken as late as the copy is long.
        cancellation: asyncio.CancelledError | None = None
        for look in count():
            if queued is None or queued.query():
                break
            try:
                await asyncio.sleep(0 if look < NUM_QUICK_LOOKS else SLOW_LOOK_S)
            except asyncio.CancelledError as error:
                cancellation = error
        if cancellation is not None:
            raise cancellation
