"""Server-sent events: framing, and ids that any edge can go on from."""

from typing import NamedTuple

from shared.errors import InvalidRequest
from shared.request import REQUEST_ID_PATTERN, RequestId

MEDIA_TYPE = "text/event-stream"

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, proxies see that the connection lives."""

DONE_DATA = "[DONE]"
DONE = f"data: {DONE_DATA}\n\n".encode()
"""Ends a stream that ended well. It has no id, so whoever resumes behind the last event gets it again."""


class Cursor(NamedTuple):
    """A place in a request's events: the `k`-th made of the record at `offset`."""

    offset: int
    k: int


BEFORE_ALL = Cursor(-1, 0)
"""Behind it comes every event."""


def format_event(request_id: RequestId, cursor: Cursor, body: bytes) -> bytes:
    """One event; `body` is JSON on one line."""
    return b"id: %s:%d.%d\ndata: %s\n\n" % (request_id.encode(), cursor.offset, cursor.k, body)


def parse_event_id(text: str) -> tuple[RequestId, Cursor]:
    """The request and the place that an event's id names. Raises InvalidRequest."""
    name, _, place = text.partition(":")
    offset, _, k = place.partition(".")
    if not (REQUEST_ID_PATTERN.fullmatch(name) and _is_number(offset) and _is_number(k)):
        raise InvalidRequest("Last-Event-ID must be the id of an event of this stream", param="Last-Event-ID")
    return RequestId(name), Cursor(int(offset), int(k))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20
