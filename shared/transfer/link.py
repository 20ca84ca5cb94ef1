"""One connection between two workers: a stream of control messages and a UCX endpoint, cut together."""

# ucxx has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import ucxx
from ucxx._lib.arr import Array
from ucxx.exceptions import UCXError
from ucxx.types import Tag

from shared.errors import KvTransferFailed
from shared.transfer.control import MAX_CONTROL_BYTES, ControlMessage, read_frame, to_frame
from shared.transfer.link_meter import LinkMeter
from shared.transfer.progress_thread import SPIN_S, ProgressThread
from shared.transfer.staging import NUM_LANES, to_completion
from shared.transfer.transport import read_transport

CLOSE_TIMEOUT_NS = 10**9
"""How long UCX may take, in each of two steps, to close an endpoint."""

UCX_ERRORS = (UCXError, AttributeError)
"""What a request raises when it ends badly; the second because ucxx takes a closing endpoint apart under its feet."""

UCS_OK = 0
"""Status of a request that has ended well."""

WATCH_S = 1e-3
"""What should take no longer is watched at every turn of the event loop, for twice as long."""

VOID = torch.zeros(1, dtype=torch.uint8)
"""What is sent in place of pages that are no longer held."""


class Link:
    """One connection. Once cut it stays cut.

    Attributes:
        meter: how fast it is.
        cut_because: why it was cut, where this end knows.
        lanes: one for each part on its way, whatever pull it is of; who asks first sends first.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        clock: Callable[[], float],
        progress: ProgressThread | None,
    ) -> None:
        """`progress`: what to hurry where bytes move fast; None on the CPU, where spinning takes from who computes."""
        self.meter = LinkMeter(clock)
        self.lanes = asyncio.Semaphore(NUM_LANES)
        self._clock = clock
        self.cut_because = "the connection is cut"
        self._reader = reader
        self._writer = writer
        self._progress = progress
        self._endpoint: Any = None
        self._cutting: asyncio.Task[None] | None = None

    @property
    def is_cut(self) -> bool:
        return self._cutting is not None

    def check(self) -> None:
        """Raises KvTransferFailed if it is cut."""
        if self.is_cut:
            raise KvTransferFailed(self.cut_because)

    async def open_endpoint(self, ucx_address: bytes) -> None:
        """Make the UCX endpoint to the peer. Raises KvTransferFailed."""
        self.check()  # what is made after the cut, nobody would close
        try:
            self._endpoint = await ucxx.create_endpoint_from_worker_address(
                ucxx.get_ucx_address_from_buffer(ucx_address)
            )
        except (*UCX_ERRORS, ValueError) as error:
            raise KvTransferFailed(f"no UCX endpoint to the peer: {error}") from error

    @property
    def has_endpoint(self) -> bool:
        return self._endpoint is not None

    def read_transport(self, device_type: str) -> str:
        """By what large messages arrive in memory of this kind of device; see `shared.transfer.transport`."""
        self.check()
        return read_transport(self._endpoint, memory="cuda" if device_type == "cuda" else "host")

    def post(self, message: ControlMessage) -> None:
        """Send a control message; does not wait.

        Raises:
            KvTransferFailed: the link is cut, or the peer does not read.
            ValueError: the message is too long.
        """
        frame = to_frame(message)
        self.check()
        if self._writer.transport.get_write_buffer_size() > MAX_CONTROL_BYTES:
            raise KvTransferFailed("the peer does not read its control messages")
        self._writer.write(frame)

    async def read(self) -> bytes:
        """The next control message, encoded.

        Raises:
            KvTransferFailed: the stream ended.
            OversizedMessage: the message is too long.
        """
        try:
            return await read_frame(self._reader)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise KvTransferFailed(self.cut_because if self.is_cut else "the peer closed the connection") from error

    async def send(self, tag: int, part: torch.Tensor) -> None:
        """Send bytes by UCX; however this ends, UCX no longer reads `part`.

        Raises KvTransferFailed if the send failed, stood still, or the link was cut before its end.
        """
        self.check()
        await self._move(self._endpoint.send, tag, part)
        self.meter.learn()

    async def receive(self, tag: int, part: torch.Tensor) -> None:
        """Receive bytes by UCX; however this ends, UCX no longer writes to `part`. Errors as of `send`."""
        self.check()
        await self._move(self._receive, tag, part)

    def hurry(self) -> None:
        """Bytes are on their way or will be at once: UCX shall not sleep meanwhile, if that is not long."""
        if self._progress is not None and self.meter.expected_s() <= SPIN_S:
            self._progress.hurry()

    async def _receive(self, buffer: Any, *, tag: Any, force_tag: bool) -> None:
        """As ucxx's `recv`, but that the end of a short one is seen at once: ucxx tells of it by way of a thread that
        needs the interpreter's lock, some 0.1 ms later."""
        if self._progress is None or self.meter.expected_s() > WATCH_S:
            await self._endpoint.recv(buffer, tag=tag, force_tag=force_tag)
            return
        endpoint = self._endpoint._ep  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - nothing public has requests
        request = endpoint.tag_recv(Array(buffer), tag)
        until_s = self._clock() + 2 * WATCH_S
        while not request.completed and self._clock() < until_s:  # noqa: ASYNC110 - ucxx has no event for it
            await asyncio.sleep(0)
        if request.status != UCS_OK:
            await request.wait()

    async def _move(self, move: Callable[..., Any], tag: int, part: torch.Tensor) -> None:
        num_bytes = part.numel()
        with self.watched(self.meter.patience_s(num_bytes)):
            self.meter.begin(num_bytes)
            self.hurry()
            try:
                await move(_exported(part), tag=Tag(tag), force_tag=True)
            except UCX_ERRORS as error:
                reason = self.cut_because if self.is_cut else f"UCX could not move bytes: {error}"
                raise KvTransferFailed(reason) from error
            except asyncio.CancelledError:
                await to_completion(self.cut())  # ucxx has no way to take back one request and say when that is done
                raise
            finally:
                self.meter.end(num_bytes)
        self.check()  # ucxx reports a send that was cut off as a success

    @contextmanager
    def watched(self, stall_s: float) -> Generator[None]:
        """Cut the link if the block takes over `stall_s` seconds."""
        watchdog = self.cut_after(stall_s)
        try:
            yield
        finally:
            watchdog.cancel()

    def cut_after(self, stall_s: float) -> asyncio.TimerHandle:
        """Cut the link in `stall_s` seconds for the peer's standing still, unless the timer is cancelled before."""
        reason = f"the peer made no progress for {stall_s:.1f} s"
        return asyncio.get_running_loop().call_later(stall_s, self.begin_cut, reason)

    def begin_cut(self, reason: str | None = None) -> None:
        """Cut, without waiting for the end of that."""
        if self._cutting is None:
            self.cut_because = reason or self.cut_because
            self._cutting = asyncio.create_task(self._cut())

    async def cut(self, reason: str | None = None) -> None:
        """End the connection; afterwards nothing is in flight on it."""
        self.begin_cut(reason)
        assert self._cutting is not None
        await asyncio.shield(self._cutting)

    async def _cut(self) -> None:
        self._writer.transport.abort()
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.abort, CLOSE_TIMEOUT_NS)
        with suppress(OSError):
            await self._writer.wait_closed()


def _exported(part: torch.Tensor) -> Any:
    """`part` as ucxx takes it; no copy."""
    return part if part.is_cuda else part.numpy()
