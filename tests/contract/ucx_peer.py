"""A worker's transfer end in a process of its own, told what to do by JSON lines; tests kill and stop it."""

import asyncio
import json
import sys

from pydantic import TypeAdapter

from shared.request import Incarnation
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.codec import encode
from shared.wire.to_worker import KvTicket
from tests.contract.transfer_worlds import SECRET, a_cache, a_layout, arena_bytes

NUM_PAGES = 96
PAGES_PER_PART = 16
SEED = 7


def a_large_cache(*, seed=None):
    """96 pages of 1 MiB."""
    return a_cache(NUM_PAGES, seed=seed, layout=a_layout(num_layers=1024))


def say(**fields):
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def main():
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    cache = a_large_cache(seed=SEED)
    staging = Staging(cache, {}, arena_bytes=arena_bytes(PAGES_PER_PART * cache.layout.page_bytes))
    async with (
        UcxContext() as context,
        UcxTransfer(context, staging, incarnation=Incarnation("peer"), clock=loop.time) as transfer,
    ):
        say(event="ready")
        while line := await commands.readline():
            command = json.loads(line)
            if command["do"] == "offer":
                ticket = transfer.offer(
                    "k",
                    range(NUM_PAGES),
                    num_tokens=64 * NUM_PAGES,
                    secret=SECRET,
                    puller="here",
                    hold_s=60.0,
                    on_end=lambda outcome: say(event="ended", outcome=outcome),
                )
                say(event="offered", ticket=json.loads(encode(ticket)))
            else:
                pages = range(NUM_PAGES)
                ticket = TypeAdapter(KvTicket).validate_python(command["ticket"])
                await transfer.pull(ticket, want=pages, into=pages, timeout_s=30.0)
                say(event="pulled", sum=float(cache.pages.double().sum()))


if __name__ == "__main__":
    asyncio.run(main())
