import asyncio
import socket

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from shared.runtime import run
from shared.runtime.run import serve_http


async def test_small_writes_do_not_wait_for_an_acknowledgement():
    async def no_delay(request: Request):
        connection = request.receive.__self__.transport.get_extra_info("socket")
        return PlainTextResponse(str(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    async with (
        serve_http([Route("/", no_delay)], host="127.0.0.1", port=0) as port,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        assert (await http.get(f"http://127.0.0.1:{port}/")).text == "1"


async def test_a_connection_outlives_its_clients_wish_to_use_it_again(monkeypatch):
    assert run.KEEP_ALIVE_S > 60 > httpx.Limits().keepalive_expiry
    monkeypatch.setattr(run, "KEEP_ALIVE_S", 0.2)

    async def answer(_):
        return Response()

    async with serve_http([Route("/", answer)], host="127.0.0.1", port=0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: edge\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
