"""Raw bytes against a real socket: what no HTTP client would send."""

import asyncio
import contextlib
import json
import resource
import sys

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from shared.runtime import http_limits
from shared.runtime.http_limits import MAX_HEAD_BYTES, MAX_HEADERS
from shared.runtime.run import serve_http


async def echo(request: Request):
    return PlainTextResponse(str(len(await request.body())))


async def early(_: Request):
    return PlainTextResponse("no body wanted")


async def long(_: Request):
    return PlainTextResponse("x" * LONG)


async def slow(_: Request):
    await asyncio.sleep(0.3)
    return PlainTextResponse("slow")


@contextlib.asynccontextmanager
async def a_connection():
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/early", early, methods=["GET", "POST"]),
        Route("/slow", slow),
        Route("/long", long),
    ]
    async with serve_http(routes, host="127.0.0.1", port=0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def all_of(reader, timeout_s=10.0):
    """Everything until the server closes."""
    async with asyncio.timeout(timeout_s):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
        return b""


async def status_of(reader):
    return int((await reader.readline()).split()[1])


def error_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


LONG = 32_000_000
"""More than the buffers of both sockets hold."""

HEAD = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


async def test_an_ordinary_request_and_the_next_on_its_connection():
    async with a_connection() as (reader, writer):
        for _ in range(3):
            writer.write(HEAD + b"content-length: 3\r\n\r\nabc")
            assert await status_of(reader) == 200
            while await reader.readline() != b"\r\n":
                pass
            assert await reader.readexactly(1) == b"3"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /early?" + b"x" * MAX_HEAD_BYTES,
        HEAD + b"x-long: " + b"y" * (MAX_HEAD_BYTES + 1),
        HEAD + b"x-long: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"x-many: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    ],
    ids=["url without end", "header without end", "long header", "many headers"],
)
async def test_a_head_over_the_limit_is_refused(head):
    async with a_connection() as (reader, writer):
        writer.write(head)
        status, error = error_of(await all_of(reader))
        assert status == 431
        assert str(MAX_HEAD_BYTES) in error["message"]
        assert error["type"] == "invalid_request_error"


async def test_headers_up_to_the_limit_are_taken():
    async with a_connection() as (reader, writer):
        writer.write(b"GET /early HTTP/1.1\r\nhost: x\r\n" + b"x-many: y\r\n" * (MAX_HEADERS - 1) + b"\r\n")
        assert await status_of(reader) == 200


async def test_headers_behind_the_body_count_too():
    async with a_connection() as (reader, writer):
        writer.write(
            HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"x-many: y\r\n" * MAX_HEADERS + b"\r\n"
        )
        assert await all_of(reader) != b""  # refused or cut, and not kept


@pytest.mark.parametrize("rubbish", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n"])
async def test_what_is_no_http_gets_an_error(rubbish):
    async with a_connection() as (reader, writer):
        writer.write(rubbish)
        status, error = error_of(await all_of(reader))
        assert status == 400
        assert "HTTP" in error["message"]


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
    ],
)
async def test_two_meanings_of_a_length_are_refused(lengths):
    async with a_connection() as (reader, writer):
        writer.write(HEAD + lengths + b"\r\nabcd")
        assert error_of(await all_of(reader))[0] == 400


@pytest.mark.parametrize("begun", [b"", b"GET /early HT"])
async def test_who_does_not_come_to_the_point_is_cut_off(monkeypatch, begun):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.1)
    async with a_connection() as (reader, writer):
        writer.write(begun)
        assert await all_of(reader) == b""


async def test_an_answer_under_way_is_not_cut_by_what_comes_behind_its_request(monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.1)
    async with a_connection() as (reader, writer):
        writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"GET /ear")
        assert (await all_of(reader)).endswith(b"slow")


async def test_who_goes_on_sending_behind_its_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_limits, "LINGER_S", 0.1)
    async with a_connection() as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert b"no body wanted" in await all_of(reader)


async def test_a_request_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_limits, "MAX_MESSAGE_BYTES", 100_000)
    async with a_connection() as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n")
        assert await status_of(reader) == 200
        writer.write(b"x" * 200_000)
        await all_of(reader, timeout_s=http_limits.LINGER_S / 2)


async def test_an_offer_of_http_2_costs_a_request_nothing():
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    async with a_connection() as (reader, writer):
        for body in (b"abcde", b"\r\nUpgrade: h2c\r\n"):
            writer.write(HEAD + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert await status_of(reader) == 200
            while await reader.readline() != b"\r\n":
                pass
            assert int(await reader.readexactly(len(str(len(body))))) == len(body)


async def test_no_websocket_is_opened():
    async with a_connection() as (reader, writer):
        writer.write(b"GET /early HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        assert await status_of(reader) == 200


@pytest.mark.parametrize("keeps", [b"", b"connection: close\r\n"])
async def test_who_does_not_read_its_answer_is_cut_off(monkeypatch, keeps):
    monkeypatch.setattr(http_limits, "STALL_TIMEOUT_S", 0.2)
    async with a_connection() as (reader, writer):
        writer.write(b"GET /long HTTP/1.1\r\nhost: x\r\n" + keeps + b"\r\n")
        await asyncio.sleep(2)
        assert len(await all_of(reader)) < LONG


async def test_who_reads_slowly_gets_all(monkeypatch):
    monkeypatch.setattr(http_limits, "STALL_TIMEOUT_S", 0.2)
    async with a_connection() as (reader, writer):
        writer.write(b"GET /long HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        num_read = 0
        while part := await reader.read(2_000_000):
            num_read += len(part)
            await asyncio.sleep(0.005)
        assert num_read > LONG


async def test_strangers_do_not_take_the_files_that_the_process_needs_itself(monkeypatch):
    monkeypatch.setattr(http_limits, "max_connections", lambda: 3)
    async with serve_http([Route("/early", early)], host="127.0.0.1", port=0) as port:
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await all_of(reader) == b"", "one too many"
        writer.close()
        for reader, writer in connections:
            writer.write(b"GET /early HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert await status_of(reader) == 200
            await all_of(reader)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /early HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await status_of(reader) == 200
        writer.close()


@pytest.mark.parametrize(("num_files", "num_connections"), [(1024, 512), (resource.RLIM_INFINITY, sys.maxsize)])
def test_half_of_the_files_are_for_connections(monkeypatch, num_files, num_connections):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (num_files, num_files))
    assert http_limits.max_connections() == num_connections
