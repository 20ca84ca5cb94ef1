"""HTTP/1.1 as far as a load needs it: one exchange a connection, and little work for each piece that comes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Broken(Exception):
    """The exchange has no end: no connection, a reset, a silence that was too long, or not what HTTP says."""


class NotConnected(Broken):
    """Nobody answered: nothing was said yet."""


class Answer:
    """Status and headers (names in lower case) of an answer, and its body as it comes."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: Mapping[str, str], silence_s: float) -> None:
        self._reader = reader
        self._silence_s = silence_s
        self.status = status
        self.headers = headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Broken if it does not come to its end."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            num_bytes = int(self.headers.get("content-length", "0"))
            yield await _in_time(self._reader.readexactly(num_bytes), self._silence_s)
            return
        while True:
            size = int(await _in_time(self._reader.readuntil(b"\r\n"), self._silence_s), 16)
            piece = await _in_time(self._reader.readexactly(size + 2), self._silence_s)
            if size == 0:
                return
            yield piece[:-2]

    async def body(self) -> bytes:
        """The whole body. Raises Broken."""
        return b"".join([piece async for piece in self.pieces()])


@asynccontextmanager
async def exchange(
    address: str,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    silence_s: float,
) -> AsyncIterator[Answer]:
    """One request and its answer; leaving the context closes the connection. Raises Broken.

    Args:
        address: "http://host:port".
        silence_s: a wait for the connection, or for the next bytes, that is longer breaks the exchange.
    """
    url = urlsplit(address)
    lines = [f"{method} {path} HTTP/1.1", f"host: {url.netloc}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    opening = asyncio.open_connection(url.hostname, url.port, limit=2**22)
    try:
        reader, writer = await _in_time(opening, silence_s)
    except Broken as broken:
        raise NotConnected(str(broken)) from broken
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = (await _in_time(reader.readuntil(b"\r\n\r\n"), silence_s)).decode("latin-1")
        status, _, rest = head.partition("\r\n")
        named = dict(line.split(":", 1) for line in rest.split("\r\n") if line)
        found = {name.lower(): value.strip() for name, value in named.items()}
        yield Answer(reader, int(status.split(" ", 2)[1]), found, silence_s)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _in_time(work, silence_s):
    try:
        async with asyncio.timeout(silence_s):
            return await work
    except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
