"""One host's end of a transfer, told what to do by JSON lines: `python -m tests.e2e.link_peer ADDRESS`."""

import asyncio
import hashlib
import json
import sys

import torch
from pydantic import TypeAdapter

from infra.two_hosts import LINK_DEVICE
from shared.errors import KvTransferFailed
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.codec import encode
from shared.wire.to_worker import KvTicket

LAYOUT = KvLayout(model_fingerprint="m", num_layers=4, num_kv_heads=2, head_dim=32, dtype="float32")
"""Pages of 128 KiB."""

NUM_PAGES = 96
ALL_PAGES = range(NUM_PAGES)
PULLER = Incarnation("puller")
SECRET = bytes(range(16))
HOLD_S = 60.0
PEER_TIMEOUT_S = 1.0


def pages_of(seed: int) -> torch.Tensor:
    """What the source offers after `{"do": "offer", "seed": seed}`."""
    shape = PagedCache(LAYOUT, NUM_PAGES, torch.device("cpu")).pages.shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def digest(pages: torch.Tensor) -> str:
    return hashlib.sha256(pages.numpy().tobytes()).hexdigest()


def say(**fields):
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def ticket_of(command):
    return TypeAdapter(KvTicket).validate_python(command["ticket"])


async def offer(transfer, cache, command):
    cache.pages.copy_(pages_of(command["seed"]))
    ticket = transfer.offer(
        f"offer {command['seed']}",
        ALL_PAGES,
        num_tokens=64 * NUM_PAGES,
        secret=SECRET,
        puller=PULLER,
        hold_s=HOLD_S,
        on_end=lambda outcome: say(event="ended", outcome=outcome),
    )
    say(event="offered", ticket=json.loads(encode(ticket)))


async def connect(transfer, _, command):
    ticket = ticket_of(command)
    report = await transfer.connect(ticket.address, ticket.source)
    say(event="connected", transport=report.transport, bytes_per_s=report.speed.bytes_per_s)


async def pull(transfer, cache, command):
    cache.pages.zero_()
    try:
        await transfer.pull(ticket_of(command), want=ALL_PAGES, into=ALL_PAGES, timeout_s=command["timeout_s"])
    except KvTransferFailed as failure:
        say(event="failed", reason=str(failure))
    else:
        say(event="pulled", digest=digest(cache.pages))


async def main(host):
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    cache = PagedCache(LAYOUT, NUM_PAGES, torch.device("cpu"))
    async with (
        UcxContext(LINK_DEVICE) as context,
        UcxTransfer(
            context,
            Staging(cache, {}),
            incarnation=PULLER,
            clock=loop.time,
            host=host,
            peer_timeout_s=PEER_TIMEOUT_S,
        ) as transfer,
    ):
        say(event="ready")
        while line := await commands.readline():
            command = json.loads(line)
            await {"offer": offer, "connect": connect, "pull": pull}[command["do"]](transfer, cache, command)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
