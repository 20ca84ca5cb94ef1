"""One connection between two workers: a stream of control messages and a UCX endpoint, cut together."""

# ucxx has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
from contextlib import suppress
from typing import Any

import torch
import ucxx
from ucxx.exceptions import UCXError
from ucxx.types import Tag

from shared.errors import KvTransferFailed
from shared.transfer.control import MAX_CONTROL_BYTES, ControlMessage, read_frame, to_frame
from shared.transfer.staging import to_completion

CLOSE_TIMEOUT_NS = 10**9
"""How long UCX may take, in each of two steps, to close an endpoint."""

UCX_ERRORS = (UCXError, AttributeError)
"""What a request raises when it ends badly; the second because ucxx takes a closing endpoint apart under its feet."""

VOID = torch.zeros(1, dtype=torch.uint8)
"""What is sent in place of pages that are no longer held."""


class Link:
    """One connection. Once cut it stays cut."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._endpoint: Any = None
        self._cutting: asyncio.Task[None] | None = None

    @property
    def is_cut(self) -> bool:
        return self._cutting is not None

    async def open_endpoint(self, ucx_address: bytes) -> None:
        """Make the UCX endpoint to the peer. Raises KvTransferFailed."""
        try:
            self._endpoint = await ucxx.create_endpoint_from_worker_address(
                ucxx.get_ucx_address_from_buffer(ucx_address)
            )
        except (*UCX_ERRORS, ValueError) as error:
            raise KvTransferFailed(f"no UCX endpoint to the peer: {error}") from error

    @property
    def has_endpoint(self) -> bool:
        return self._endpoint is not None

    def post(self, message: ControlMessage) -> None:
        """Send a control message; does not wait.

        Raises:
            KvTransferFailed: the link is cut, or the peer does not read.
            ValueError: the message is too long.
        """
        frame = to_frame(message)
        if self.is_cut:
            raise KvTransferFailed("the connection is cut")
        if self._writer.transport.get_write_buffer_size() > MAX_CONTROL_BYTES:
            raise KvTransferFailed("the peer does not read its control messages")
        self._writer.write(frame)

    async def read(self) -> bytes:
        """The next control message, encoded.

        Raises:
            KvTransferFailed: the stream ended.
            UndecodableMessage: the message is too long.
        """
        try:
            return await read_frame(self._reader)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise KvTransferFailed("the peer closed the connection") from error

    async def send(self, tag: int, part: torch.Tensor) -> None:
        """Send bytes by UCX; waits to the end of the send, cancelled or not.

        Raises KvTransferFailed if the send failed or the link was cut before its end.
        """
        await to_completion(self._send(tag, part))

    async def _send(self, tag: int, part: torch.Tensor) -> None:
        if self.is_cut:
            raise KvTransferFailed("the connection is cut")
        try:
            await self._endpoint.send(_exported(part), tag=Tag(tag), force_tag=True)
        except UCX_ERRORS as error:
            raise KvTransferFailed(f"UCX could not send: {error}") from error
        if self.is_cut:  # ucxx reports a cancelled send as a success
            raise KvTransferFailed("the connection was cut during a send")

    async def post_receive(self, tag: int, part: torch.Tensor) -> asyncio.Task[None]:
        """Begin to receive into `part`, which UCX may write to until the returned task is done.

        The task must not be cancelled; cutting the link ends it.
        """
        arrival = asyncio.create_task(self._receive(tag, part))
        await asyncio.sleep(0)  # lets the task post the receive, so that the message finds it waiting
        return arrival

    async def _receive(self, tag: int, part: torch.Tensor) -> None:
        if self.is_cut:
            raise KvTransferFailed("the connection is cut")
        try:
            await self._endpoint.recv(_exported(part), tag=Tag(tag), force_tag=True)
        except UCX_ERRORS as error:
            raise KvTransferFailed(f"UCX could not receive: {error}") from error

    async def cut(self) -> None:
        """End the connection; afterwards nothing is in flight on it."""
        if self._cutting is None:
            self._cutting = asyncio.create_task(self._cut())
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
