import asyncio

from infra.local.probes import accepts_connections, http_ready, redis_ready


async def answers(answer: bytes, probe) -> bool:
    async def serve(reader, writer):
        await reader.readline()
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        return await probe("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_only_200_is_ready():
    assert await answers(b"HTTP/1.1 200 OK\r\n\r\n", http_ready)
    assert not await answers(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", http_ready)
    assert not await answers(b"", http_ready)


async def test_only_pong_is_ready():
    assert await answers(b"+PONG\r\n", redis_ready)
    assert not await answers(b"-LOADING data\r\n", redis_ready)


async def test_nobody_listens(unused_tcp_port):
    assert not await accepts_connections("127.0.0.1", unused_tcp_port)
    assert not await http_ready("127.0.0.1", unused_tcp_port)
