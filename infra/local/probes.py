"""Quick looks at whether a server answers."""

import asyncio
import contextlib

PROBE_TIMEOUT_S = 2.0


async def http_ready(host: str, port: int) -> bool:
    """Whether GET /ready answers 200."""
    line = await first_line(host, port, f"GET /ready HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    return line.startswith(b"HTTP/") and b" 200" in line


async def redis_ready(host: str, port: int) -> bool:
    """Whether PING answers; a server that is still loading its data says so instead."""
    return await first_line(host, port, b"PING\r\n") == b"+PONG\r\n"


async def accepts_connections(host: str, port: int) -> bool:
    """Whether somebody listens."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), PROBE_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def first_line(host: str, port: int, question: bytes) -> bytes:
    """First line of the answer to `question`, empty where none comes."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(question)
                return await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return b""
