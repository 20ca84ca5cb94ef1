"""The harness itself: paths that can be cut, plans that a seed repeats, ends that are explained."""

import asyncio
import signal
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path as File
from types import SimpleNamespace

import pytest

from tests.faults.cluster.faults import WEIGHTS, Fault, Kind, draw_plans, unexplained_ends
from tests.faults.cluster.proxy import HOST, Path, Proxy
from tests.faults.cluster.seats import Life

SILENCE_S = 0.2
IN_TIME_S = 5.0


@asynccontextmanager
async def echo_behind_proxy():
    async def echo(reader, writer):
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(echo, HOST, 0) as server:
        proxy = Proxy(server.sockets[0].getsockname()[1])
        await proxy.open()
        try:
            yield proxy
        finally:
            await proxy.close()


@asynccontextmanager
async def connection(proxy):
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def echoed(reader, writer, data):
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), IN_TIME_S)


async def test_proxy_carries_much_and_what_comes_first():
    async with echo_behind_proxy() as proxy, connection(proxy) as (reader, writer):
        assert await echoed(reader, writer, b"first") == b"first"
        much = bytes(range(256)) * 2**14
        assert await echoed(reader, writer, much) == much


async def test_reset_breaks_what_is_open_and_refuses_what_comes():
    async with echo_behind_proxy() as proxy, connection(proxy) as (reader, writer):
        await echoed(reader, writer, b"a")
        proxy.cut(Path.RESET)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(_end(reader), IN_TIME_S)
        async with connection(proxy) as (again, _):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(_end(again), IN_TIME_S)
        proxy.restore()
        async with connection(proxy) as (later_reader, later_writer):
            assert await echoed(later_reader, later_writer, b"b") == b"b"


async def _end(reader):
    if not await reader.read(1):
        raise ConnectionResetError


async def test_frozen_is_silence_and_then_all_that_was_said():
    async with echo_behind_proxy() as proxy, connection(proxy) as (reader, writer):
        await echoed(reader, writer, b"a")
        proxy.cut(Path.FROZEN)
        writer.write(b"b")
        async with connection(proxy) as (new_reader, new_writer):
            new_writer.write(b"c")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), SILENCE_S)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(new_reader.read(1), SILENCE_S)
            proxy.restore()
            assert await asyncio.wait_for(reader.readexactly(1), IN_TIME_S) == b"b"
            assert await asyncio.wait_for(new_reader.readexactly(1), IN_TIME_S) == b"c"


async def test_the_end_of_one_end_is_the_end_of_the_other():
    async with echo_behind_proxy() as proxy:
        async with connection(proxy) as (reader, writer):
            await echoed(reader, writer, b"a")
            assert len(proxy.pairs) == 1
        async with asyncio.timeout(IN_TIME_S):
            while proxy.pairs or proxy.ends:
                await asyncio.sleep(0.01)


def test_a_seed_repeats_its_plans_and_they_have_every_kind():
    plans = draw_plans(1, 1000, 30.0)
    assert plans == draw_plans(1, 1000, 30.0)
    assert plans != draw_plans(2, 1000, 30.0)
    assert sum(plan.wait_s for plan in plans) == pytest.approx(30 * 60)
    assert Counter(plan.kind for plan in plans).keys() == WEIGHTS.keys()
    assert any(plan.wait_s == 0 for plan in plans)


def life(tmp_path, *, status, wanted_end=None, line=""):
    log = File(tmp_path / "decode-0.0.log")
    log.write_text(line)
    return Life(0, 1, log, started_s=0.0, ended_s=100.0, status=status, wanted_end=wanted_end)


LEASE_LOST = '{"level": "error", "errors": ["slot 1 is no longer ours: its lease of 2000 ms ran out"]}\n'


@pytest.mark.parametrize(
    ("end", "faults", "is_explained"),
    [
        ({"status": -9, "wanted_end": signal.SIGKILL}, [], True),
        ({"status": 0, "wanted_end": signal.SIGTERM}, [], True),
        ({"status": 1, "wanted_end": signal.SIGTERM}, [], False),
        ({"status": -11}, [], False),
        ({"status": 1, "line": LEASE_LOST}, [], False),
        ({"status": 1, "line": LEASE_LOST}, [Fault(0, Kind.PAUSE, "decode-0", 95.0, 98.0)], True),
        ({"status": 1, "line": LEASE_LOST}, [Fault(0, Kind.PAUSE, "decode-1", 95.0, 98.0)], False),
        ({"status": 1, "line": LEASE_LOST}, [Fault(0, Kind.CUT_REDIS, "decode-0", 50.0, 55.0)], False),
        ({"status": 1, "line": LEASE_LOST}, [Fault(0, Kind.REDIS_FLUSH, "redis", 98.0, 98.0)], True),
        ({"status": 1}, [Fault(0, Kind.PAUSE, "decode-0", 95.0, 98.0)], False),
    ],
)
def test_which_ends_are_explained(tmp_path, end, faults, is_explained):
    seat = SimpleNamespace(name="decode-0", lives=[life(tmp_path, **end)])
    server = SimpleNamespace(lost=[])
    cluster = SimpleNamespace(redis=server, brokers=[server], seats={"decode-0": seat})
    assert (unexplained_ends(cluster, faults) == []) == is_explained
