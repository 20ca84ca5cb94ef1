import asyncio
from types import SimpleNamespace

from shared.transfer.source import Source


async def test_a_puller_that_comes_while_the_source_closes_is_hung_up_on():
    """Its connection may have been accepted just before the listener closed; nobody would cut it any more."""
    aborted = []
    writer = SimpleNamespace(transport=SimpleNamespace(abort=lambda: aborted.append(True)))
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        source = Source(
            hello=None,
            staging=None,
            offers=None,
            clock=None,
            progress=None,
            tasks=tasks,
            peer_timeout_s=60,
            random_bytes=None,
        )
        await source.close()
        source.accept(asyncio.StreamReader(), writer)
        await asyncio.sleep(0)
        assert aborted
