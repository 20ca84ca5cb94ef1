"""What clients may do: how many connect, the size of a request's head, of all that one sends, its pace, reading too.

uvicorn with httptools sets none of these limits itself: a head that never ends would grow for ever.
"""

import asyncio
import json
import re
import resource
import sys
from typing import Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers."""

MAX_HEADERS: Final = 128

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""One request with its body, as it comes over the wire. Routes have closer limits and answer; beyond this one the
connection is closed."""

HEAD_TIMEOUT_S: Final = 10.0
"""From the first byte of a request, or from the connection's begin, to the end of its headers."""

LINGER_S: Final = 5.0
"""A client that was answered before its request was complete may go on sending for so long, so that it reads the
answer."""

STALL_TIMEOUT_S: Final = 60.0
MIN_READ_BYTES: Final = 16 * 1024
"""A client that does not read so many bytes in that time, of those that wait for it, is hung up on: it would hold its
place for ever."""

UPGRADE_PATTERN: Final = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class _HeadTooLarge(Exception):
    """Leaves the parser from within a callback."""


def max_connections() -> int:
    """Half of the files that this process may have open: the other half is for Kafka, Redis and what it reads."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if num_files == resource.RLIM_INFINITY else num_files // 2


def _without_upgrade(data: bytes) -> bytes:
    """The same with an offer of another protocol made meaningless: the parser drops the body of a request with one.

    Java's own client offers HTTP/2 with its first request. An offer that comes in two parts is not seen.
    """
    end_of_head = data.find(b"\r\n\r\n")
    head, rest = (data, b"") if end_of_head < 0 else (data[:end_of_head], data[end_of_head:])
    return UPGRADE_PATTERN.sub(b"\r\nx-offer:", head) + rest if UPGRADE_PATTERN.search(head) else data


class BoundedHttp(HttpToolsProtocol):
    """One connection, closed where the client passes a limit."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType] - handed on as they came
        self._in_head = True
        self._is_head_too_large = False
        self._num_bytes = 0
        self._num_head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            transport.abort()
        else:
            self._wait_at_most(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._watch_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(_without_upgrade(data) if self._in_head else data)
        if self.transport.is_closing():
            return
        if not self._in_head and self._num_bytes > MAX_MESSAGE_BYTES:
            self.transport.close()
        elif self._in_head and self._num_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._in_head and self._num_bytes:
            self._wait_at_most(HEAD_TIMEOUT_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for what follows a body in chunks, which counts as part of the head."""
        self._num_head_bytes += len(name) + len(value)
        if len(self.headers) >= MAX_HEADERS or self._num_head_bytes + len(self.url) > MAX_HEAD_BYTES:
            self._is_head_too_large = True
            raise _HeadTooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait_no_more()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._num_bytes = 0
        self._wait_no_more()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()
        if not self._in_head and not self.transport.is_closing():
            self._wait_at_most(LINGER_S)

    def pause_writing(self) -> None:
        """The buffer is full: what is sent next waits for the client to read."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._watch_no_more()
        super().resume_writing()

    def _watch_reader(self) -> None:
        self._watch_no_more()
        num_unread = self.transport.get_write_buffer_size()
        if num_unread:
            self._stalled = self.loop.call_later(STALL_TIMEOUT_S, self._check_reader, num_unread)

    def _check_reader(self, num_unread_before: int) -> None:
        num_unread = self.transport.get_write_buffer_size()
        if num_unread and num_unread > num_unread_before - MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()

    def _watch_no_more(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or more headers than `on_header` took."""
        if self._is_head_too_large:
            self._refuse_head()
        else:
            self._refuse(400, msg)

    def _refuse_head(self) -> None:
        self._refuse(431, f"request line and headers may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers")

    def _refuse(self, status: int, message: str) -> None:
        """Answer in OpenAI's shape, unless an answer is under way, and close."""
        if not self._is_answering:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is not None and cycle.response_started and not cycle.response_complete

    def _wait_at_most(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._give_up, seconds)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, seconds: float) -> None:
        self._timer = None
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and not cycle.response_complete:
            self._wait_at_most(seconds)  # the answer to the request before comes first
        elif not self.transport.is_closing():
            self.transport.close()
