"""Clients do what people would: against an edge that plays a part on each connection."""

import asyncio
import itertools
import random
from contextlib import asynccontextmanager, suppress

import pytest

from tests.faults.capture import Manner, Outcome, read_captures, write_captures
from tests.faults.clients import Clients, Mix, Want, draw_wants

EVENTS = [f'id: r1:{k}.0\ndata: {{"k":{k}}}\n\n'.encode() for k in range(4)]
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nx-request-id: r1\r\ntransfer-encoding: chunked\r\n\r\n"


class Edge:
    """Each connection gets the next part; the last one is played again and again."""

    def __init__(self, *parts):
        self._parts = itertools.chain(parts, itertools.repeat(parts[-1]))
        self.heads = []
        self.bodies = []
        self.serving = set()

    async def serve(self, reader, writer):
        self.serving.add(asyncio.current_task())
        try:
            await self._play(reader, writer)
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def _play(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        num_bytes = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(num_bytes))
        await next(self._parts)(writer)
        await writer.drain()


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def streams(*pieces, ends=True):
    """Pieces of a stream, then its end, or a break."""

    async def play(writer):
        writer.write(HEAD + b"".join(map(chunk, pieces)) + (chunk(b"") if ends else b""))

    return play


async def hangs(writer):
    writer.write(HEAD + chunk(EVENTS[0]))
    await asyncio.sleep(60.0)


async def breaks(writer):
    writer.transport.abort()


def answers(status, body=b"{}", **headers):
    async def play(writer):
        lines = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode().replace(b"_", b"-") + body)

    return play


@asynccontextmanager
async def edge_of(*parts):
    edge = Edge(*parts)
    server = await asyncio.start_server(edge.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield edge, Clients([f"http://127.0.0.1:{port}"], None, random.Random(1), silence_s=0.2, whole_patience_s=0.2)
    finally:
        server.close()
        for task in edge.serving:
            task.cancel()
        await asyncio.gather(*edge.serving, return_exceptions=True)
        await server.wait_closed()


def want(manner=Manner.STREAM, **changes):
    return Want("c1", 0.0, manner, "/v1/completions", {"prompt": "x"}, timeout_s=5.0, **changes)


def ids_of(capture):
    return [event.id for event in capture.events]


@pytest.mark.parametrize("first", [streams(*EVENTS[:2], ends=False), streams(*EVENTS[:2])])
async def test_a_broken_stream_is_resumed_behind_its_last_event(first):
    async with edge_of(first, streams(b": keep-alive\n\n", *EVENTS[2:], DONE)) as (edge, clients):
        capture = await clients.run(want())
    assert (capture.outcome, ids_of(capture)) == (Outcome.DONE, ["r1:0.0", "r1:1.0", "r1:2.0", "r1:3.0"])
    assert "last-event-id: r1:1.0" in edge.heads[1]
    assert capture.num_resumes == 1


async def test_a_silent_stream_is_resumed():
    async with edge_of(hangs, streams(*EVENTS[1:], DONE)) as (edge, clients):
        capture = await clients.run(want())
    assert (capture.outcome, len(capture.events)) == (Outcome.DONE, 4)
    assert "last-event-id: r1:0.0" in edge.heads[1]


async def test_a_stream_without_events_is_resumed_by_its_id():
    async with edge_of(streams(ends=False), streams(*EVENTS, DONE)) as (edge, clients):
        capture = await clients.run(want())
    assert (capture.outcome, len(capture.events)) == (Outcome.DONE, 4)
    assert edge.heads[1].startswith("get /v1/requests/r1/events ")


async def test_a_refusal_is_waited_out():
    async with edge_of(answers(503, retry_after="0"), streams(*EVENTS, DONE)) as (edge, clients):
        capture = await clients.run(want())
    assert (capture.outcome, len(edge.heads)) == (Outcome.DONE, 2)
    assert edge.bodies[0] == edge.bodies[1] != b""


async def test_a_refusal_ends_it_for_who_does_not_wait():
    async with edge_of(answers(429, retry_after="3")) as (_, clients):
        clients.waits_out_refusals = False
        capture = await clients.run(want())
    assert (capture.outcome, capture.status, capture.retry_after_s) == (Outcome.REFUSED, 429, 3.0)


async def test_who_has_neither_id_nor_key_lost_track():
    async with edge_of(breaks) as (_, clients):
        capture = await clients.run(want())
    assert capture.outcome is Outcome.LOST_TRACK


@pytest.mark.parametrize("first", [breaks, hangs])
async def test_who_has_a_key_asks_again(first):
    async with edge_of(first, answers(200, b'{"whole":1}', x_request_id="r1")) as (edge, clients):
        capture = await clients.run(want(Manner.WHOLE, key="k"))
    assert (capture.outcome, capture.answer, capture.request_id) == (Outcome.DONE, '{"whole":1}', "r1")
    assert all("idempotency-key: k" in head for head in edge.heads)


async def test_errors_and_what_is_unknown():
    error = b'data: {"error": {}}\n\n'
    async with edge_of(streams(EVENTS[0], error.replace(b'": ', b'":'))) as (_, clients):
        assert (await clients.run(want())).outcome is Outcome.ERROR
    async with edge_of(answers(400)) as (_, clients):
        capture = await clients.run(want())
        assert (capture.outcome, capture.status) == (Outcome.ERROR, 400)
    async with edge_of(streams(EVENTS[0], ends=False), answers(404)) as (_, clients):
        assert (await clients.run(want())).outcome is Outcome.UNKNOWN


async def test_leaving_and_deleting():
    async with edge_of(streams(*EVENTS, DONE)) as (_, clients):
        capture = await clients.run(want(leave_after=2))
        assert (capture.outcome, len(capture.events)) == (Outcome.LEFT, 2)
        assert capture.left_s is not None
    async with edge_of(streams(*EVENTS, DONE), answers(200)) as (edge, clients):
        capture = await clients.run(want(delete_after=2))
        assert capture.outcome is Outcome.DONE
        assert edge.heads[1].startswith("delete /v1/requests/r1 ")
        assert capture.delete_asked_s is not None


async def test_captures_can_be_kept(tmp_path):
    async with edge_of(streams(*EVENTS[:2], ends=False), streams(*EVENTS[2:], DONE)) as (_, clients):
        await clients.run(want())
    write_captures(tmp_path / "captures", clients.captures)
    assert read_captures(tmp_path / "captures") == clients.captures


def test_a_seed_gives_the_same_load_and_all_kinds_of_clients():
    mix = Mix("fake", rate_per_s=10.0)
    wants = list(itertools.islice(draw_wants(mix, 1), 300))
    assert wants == list(itertools.islice(draw_wants(mix, 1), 300))
    assert wants != list(itertools.islice(draw_wants(mix, 2), 300))
    assert {want.manner for want in wants} == set(Manner)
    for has in ("key", "delete_after", "leave_after"):
        assert any(getattr(want, has) is not None for want in wants)
    for field in ("n", "logprobs", "stop", "messages", "seed", "stream"):
        assert any(field in want.body for want in wants)
    assert 20.0 < wants[-1].at_s < 40.0
