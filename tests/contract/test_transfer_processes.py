"""`UcxTransfer` between processes, with the deaths and stops that only processes have."""

import asyncio
import json
import os
import signal
import struct
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import psutil
import pytest
import torch
from pydantic import TypeAdapter

from shared.blocks import token_ids
from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer.control import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    Confirm,
    Hello,
    Knock,
    Probe,
    Pull,
    Ready,
    Speed,
    to_frame,
)
from shared.transfer.host_facts import HostFacts
from shared.transfer.port import Outcome
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.codec import encode
from shared.wire.to_worker import KvTicket
from tests.contract.transfer_worlds import SECRET, UcxWorld, a_cache, arena_bytes, is_whole
from tests.contract.ucx_peer import NUM_PAGES, PAGES_PER_PART, SEED, a_large_cache

TIMEOUT_S = 30.0


class Here:
    """This process's end."""

    def __init__(self, context, cache):
        self.cache = cache
        self.staging = Staging(cache, {}, arena_bytes=arena_bytes(PAGES_PER_PART * cache.layout.page_bytes))
        self.asked_twice = asyncio.Event()
        self._context = context
        self._new_tag = context.new_tag
        self._num_tags = 0
        context.new_tag = self._count_tag
        self.transfer = UcxTransfer(
            context,
            self.staging,
            incarnation=Incarnation("here"),
            clock=asyncio.get_running_loop().time,
        )
        self.ended = asyncio.get_running_loop().create_future()

    def _count_tag(self):
        self._num_tags += 1
        if self._num_tags == 2:
            self.asked_twice.set()
        return self._new_tag()

    def offer(self, hold_s=60.0):
        return self.transfer.offer(
            "k",
            range(NUM_PAGES),
            num_tokens=64 * NUM_PAGES,
            secret=SECRET,
            puller="peer",
            hold_s=hold_s,
            on_end=self.ended.set_result,
        )

    async def pull(self, ticket, timeout_s=TIMEOUT_S):
        await self.transfer.pull(ticket, want=range(NUM_PAGES), into=range(NUM_PAGES), timeout_s=timeout_s)

    async def is_sending(self):
        async with asyncio.timeout(TIMEOUT_S):
            while self.staging.outgoing.num_free_bytes == self.staging.outgoing.num_bytes:
                await asyncio.sleep(0)

    async def all_memory_back(self):
        async with asyncio.timeout(TIMEOUT_S):
            while not is_whole(self.staging):
                await asyncio.sleep(0.01)


class Peer:
    """The other process."""

    def __init__(self, process):
        self.process = process

    def tell(self, **command):
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def hear(self, event):
        async with asyncio.timeout(TIMEOUT_S):
            line = b""
            while not line.startswith(b"{"):  # UCX writes its warnings to stdout
                line = await self.process.stdout.readline()
                assert line, "the peer ended"
            said = json.loads(line)
        assert said["event"] == event
        return said

    def tell_to_pull(self, ticket):
        self.tell(do="pull", ticket=json.loads(encode(ticket)))

    async def ticket(self):
        self.tell(do="offer")
        return TypeAdapter(KvTicket).validate_python((await self.hear("offered"))["ticket"])


@asynccontextmanager
async def here(seed=None):
    async with UcxContext() as context:
        end = Here(context, a_large_cache(seed=seed))
        async with end.transfer:
            yield end


@asynccontextmanager
async def a_peer():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.contract.ucx_peer", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        peer = Peer(process)
        await peer.hear("ready")
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()


def addresses_listened_on(*pids):
    return [
        connection.laddr
        for pid in pids
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


async def test_pages_arrive_over_loopback_alone_and_the_process_leaves_when_its_input_ends():
    async with here() as end, a_peer() as peer:
        await end.pull(await peer.ticket())
        listening = addresses_listened_on(os.getpid(), peer.process.pid)
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert end.transfer.address in {f"{address.ip}:{address.port}" for address in listening}
        assert torch.equal(end.cache.pages, a_large_cache(seed=SEED).pages)
        assert (await peer.hear("ended"))["outcome"] == Outcome.PULLED
        peer.process.stdin.close()
        async with asyncio.timeout(TIMEOUT_S):
            assert await peer.process.wait() == 0


async def test_a_source_killed_in_the_middle_fails_the_pull_at_once():
    async with here() as end, a_peer() as peer:
        pull = asyncio.create_task(end.pull(await peer.ticket(), timeout_s=1000.0))
        await end.asked_twice.wait()
        peer.process.kill()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(KvTransferFailed):
                await pull
        await end.all_memory_back()


async def test_a_puller_killed_in_the_middle_ends_the_hold():
    async with here(seed=1) as end, a_peer() as peer:
        peer.tell_to_pull(end.offer(hold_s=1000.0))
        await end.is_sending()
        peer.process.kill()
        async with asyncio.timeout(TIMEOUT_S):
            assert await end.ended is Outcome.FAILED
        await end.all_memory_back()


async def test_a_puller_that_stands_still_is_cut_off_when_the_hold_ends():
    async with here(seed=1) as end, a_peer() as peer:
        peer.tell_to_pull(end.offer(hold_s=1.0))
        await end.is_sending()
        peer.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            assert await end.ended is Outcome.EXPIRED
        await end.all_memory_back()


async def test_a_source_that_stands_still_fails_the_pull_at_its_deadline():
    async with here() as end, a_peer() as peer:
        pull = asyncio.create_task(end.pull(await peer.ticket(), timeout_s=1.0))
        await end.asked_twice.wait()
        peer.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(KvTransferFailed, match=r"within 1\.0 s"):
                await pull
        await end.all_memory_back()


def a_hello(cache, **changes):
    fields = {
        "protocol": PROTOCOL_VERSION,
        "layout_fingerprint": cache.layout.fingerprint,
        "incarnation": Incarnation("stranger"),
        "max_part_bytes": 2**30,
        "ucx_address": b"not an address",
        "host": HostFacts("boot", "host", "pid", "ipc", "net", "cpu"),
    }
    return to_frame(Knock(Incarnation("source"))) + to_frame(Hello(**fields | changes))


def framed(body):
    return struct.pack("!I", len(body)) + body


GONE = Pull(1, "gone", SECRET, token_ids((0,)))

KNOCK = to_frame(Knock(Incarnation("source")))

NONSENSE = {
    "not a hello": lambda hello: to_frame(Confirm(1)),
    "no JSON": lambda hello: framed(b"\xff{}{"),
    "a hello without fields": lambda hello: KNOCK + framed(b'{"type":"hello"}'),
    "a knock at another's door": lambda hello: to_frame(Knock(Incarnation("sourc"))) + hello()[len(KNOCK) :],
    "two knocks": lambda hello: KNOCK + hello(),
    "too long": lambda hello: struct.pack("!I", MAX_CONTROL_BYTES + 1),
    "half a message": lambda hello: hello()[:-5],
    "two hellos": lambda hello: hello() * 2,
    "a confirmation of nothing": lambda hello: hello() + to_frame(Confirm(1)),
    "ready for nothing": lambda hello: hello() + to_frame(Ready(1, 0, 1)),
    "a number used before": lambda hello: hello() + 2 * to_frame(GONE),
    "number 0": lambda hello: hello() + to_frame(replace(GONE, pull=0)),
    "parts that hold no layer": lambda hello: hello(max_part_bytes=1),
    "a probe over the arena": lambda hello: hello() + to_frame(Probe(1, 2**40)),
    "a probe of nothing": lambda hello: hello() + to_frame(Probe(1, 0)),
    "no speed": lambda hello: hello() + to_frame(Speed(0.0, 0.0)),
    "an answer instead of a question": lambda hello: hello() + framed(b'{"type":"released","pull":1}'),
    "another protocol, and on it goes": lambda hello: hello(protocol=99) + to_frame(Confirm(1)),
}


async def test_nonsense_ends_the_connection_it_came_by_and_no_other():
    world = UcxWorld()
    cache = a_cache(seed=1)
    async with (
        world,
        world.transfer(cache, "source") as source,
        world.transfer(a_cache(), "puller") as puller,
    ):

        async def pull_something(key):
            ticket = source.offer(
                key, (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=lambda outcome: None
            )
            await puller.pull(ticket, want=(0,), into=(0,), timeout_s=TIMEOUT_S)

        await pull_something("before")
        links = set(source._source._links)
        assert len(links) == 1
        for name, nonsense in NONSENSE.items():
            host, port = source.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(nonsense(lambda **changes: a_hello(cache, **changes)))
            writer.write_eof()
            async with asyncio.timeout(TIMEOUT_S):
                with suppress(ConnectionResetError):
                    while await reader.read(2**16):
                        pass
                while set(source._source._links) != links:
                    await asyncio.sleep(0.01)
            writer.transport.abort()
            await pull_something(name)
        assert set(source._source._links) == links
