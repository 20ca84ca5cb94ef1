"""Buffers that UCX sends from and receives into, allocated once, and the copies between them and the pages."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch

from shared.errors import StartupError
from shared.kv.copy import gather_pages, scatter_pages
from shared.kv.paged_cache import PagedCache

MESSAGE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Default size of a staging buffer, the largest message, by the kind of device. Between GPUs a message costs about a
millisecond beside its bytes: 512 MiB between two H200s ran at 42 GB/s in messages of 64 MiB, at 98 in two of 256."""

NUM_BUFFERS = 2
"""Default number of staging buffers each way: one is copied while the other is on the wire."""

T = TypeVar("T")


def staging_bytes(device_type: str) -> int:
    """What a `Staging` of default size allocates on a device of this kind."""
    return 2 * NUM_BUFFERS * MESSAGE_BYTES[device_type]


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


class BufferPool:
    """`num_buffers` buffers of `buffer_bytes`, lent in the order of asking."""

    def __init__(self, num_buffers: int, buffer_bytes: int, device: torch.device) -> None:
        self._free: asyncio.Queue[torch.Tensor] = asyncio.Queue()
        for _ in range(num_buffers):
            self._free.put_nowait(torch.zeros(buffer_bytes, dtype=torch.uint8, device=device))

    @property
    def num_free(self) -> int:
        return self._free.qsize()

    @asynccontextmanager
    async def lease(self) -> AsyncGenerator[torch.Tensor]:
        """Wait for a buffer: uint8 `[buffer_bytes]`. Nothing may touch it after the block."""
        buffer = await self._free.get()
        try:
            yield buffer
        finally:
            self._free.put_nowait(buffer)


class Staging:
    """One cache's buffers for sending and receiving. The two kinds are apart so that two workers that pull from each
    other cannot wait for each other's buffers.

    Attributes:
        cache: whose pages travel.
        message_bytes: size of a buffer.
        outgoing, incoming: the buffers.
    """

    def __init__(
        self,
        cache: PagedCache,
        environ: Mapping[str, str],
        *,
        message_bytes: int | None = None,
        num_buffers: int = NUM_BUFFERS,
    ) -> None:
        """`num_buffers` are for sending and as many for receiving; None takes the device's `MESSAGE_BYTES`.

        Raises StartupError.
        """
        message_bytes = MESSAGE_BYTES[cache.device.type] if message_bytes is None else message_bytes
        if message_bytes < cache.layout.page_bytes:
            raise StartupError(
                f"staging buffers of {message_bytes} bytes hold no page of {cache.layout.page_bytes} bytes"
            )
        self._stream: torch.cuda.Stream | None = None
        if cache.device.type == "cuda":
            check_allocator(environ)
            self._stream = torch.cuda.Stream(cache.device)
        self.cache = cache
        self.message_bytes = message_bytes
        self.outgoing = BufferPool(num_buffers, message_bytes, cache.device)
        self.incoming = BufferPool(num_buffers, message_bytes, cache.device)

    async def gather(self, pages: Sequence[int], out: torch.Tensor) -> None:
        """`gather_pages` beside the event loop. The pages must have been written by work that has completed."""
        await to_completion(self._copied(gather_pages, self.cache, pages, out))

    async def scatter(self, source: torch.Tensor, pages: Sequence[int]) -> None:
        """`scatter_pages` beside the event loop; afterwards every stream sees the pages."""
        await to_completion(self._copied(scatter_pages, self.cache, source, pages))

    async def _copied(self, copy: Callable[..., None], *arguments: Any) -> None:
        """UCX and the engine know nothing of our stream, so the copy has ended when this returns."""
        if self._stream is None:
            await asyncio.to_thread(copy, *arguments)
            return
        with torch.cuda.stream(self._stream):
            copy(*arguments)
            done = torch.cuda.Event()
            done.record()
        # Asked between the loop's turns: a thread that waits for it is woken as late as the copy is long.
        while not done.query():  # noqa: ASYNC110 - CUDA tells of an event only when asked
            await asyncio.sleep(0)
