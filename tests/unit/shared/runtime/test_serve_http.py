import socket

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

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
