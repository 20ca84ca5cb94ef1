"""What UCX says of its choice is what we take for the transport of a link, by UCX between processes."""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager

TIMEOUT_S = 60.0


class Peer:
    """A process that runs `ucx_transport_peer`."""

    def __init__(self, process):
        self._process = process

    async def start(self):
        self.address = (await self._process.stdout.readline()).decode().strip()

    async def do(self, what, peer):
        """Send to, or receive from, another process; the transports that it then tells of its endpoints."""
        self._process.stdin.write(json.dumps({"do": what, "peer": peer.address}).encode() + b"\n")
        return json.loads(await self._process.stdout.readline())


@asynccontextmanager
async def peers(*transports, any_transport):
    """A process for each UCX_TLS."""
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as lifetime:
        started = []
        for allowed in transports:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.contract.ucx_transport_peer", *(["any"] if any_transport else [])),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"UCX_TLS": allowed, "UCX_WARN_UNUSED_ENV_VARS": "n"},
            )
            lifetime.push_async_callback(process.wait)
            lifetime.callback(process.stdin.close)
            started.append(Peer(process))
        for peer in started:
            await peer.start()
        yield started


async def received(receiver, sender):
    told, _ = await asyncio.gather(receiver.do("receive", sender), sender.do("send", receiver))
    return told


def test_endpoints_that_notice_a_dead_peer_use_tcp_though_shared_memory_is_allowed():
    async def check():
        async with peers("tcp,sysv,cma", "tcp,sysv,cma", any_transport=False) as (receiver, sender):
            assert await received(receiver, sender) == ["tcp"]

    asyncio.run(check())


def test_each_endpoint_of_a_process_tells_of_its_own_transport():
    async def check():
        async with peers("tcp,sysv,cma", "tcp", "tcp,sysv,cma", any_transport=True) as (receiver, by_tcp, by_memory):
            assert await received(receiver, by_tcp) == ["tcp"]
            assert await received(receiver, by_memory) == ["tcp", "cma"]

    asyncio.run(check())
