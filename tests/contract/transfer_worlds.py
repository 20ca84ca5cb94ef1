"""Where the contract of `Transfer` is tried out: on the twin, and on real UCX."""

import asyncio
from contextlib import asynccontextmanager
from math import ceil

import torch

from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.local import LocalNetwork, LocalTransfer
from shared.transfer.staging import LARGEST_PART_SHARE, Staging
from shared.transfer.ucx import UcxContext, UcxTransfer

SECRET = bytes(range(16))


def a_layout(model_fingerprint="m", num_layers=1) -> KvLayout:
    """Pages of 1 KiB a layer."""
    return KvLayout(
        model_fingerprint=model_fingerprint, num_layers=num_layers, num_kv_heads=1, head_dim=2, dtype="float32"
    )


def a_cache(num_pages=32, *, seed=None, layout=None) -> PagedCache:
    """A cache of zeros, or of random numbers."""
    cache = PagedCache(layout or a_layout(), num_pages, torch.device("cpu"))
    if seed is not None:
        cache.pages.copy_(torch.rand(cache.pages.shape, generator=torch.Generator().manual_seed(seed)))
    return cache


def arena_bytes(part_bytes: int) -> int:
    """Of arenas whose largest part has `part_bytes`."""
    return ceil(part_bytes / LARGEST_PART_SHARE)


class LocalWorld:
    """Workers on one `LocalNetwork`."""

    def __init__(self):
        self.network = LocalNetwork()
        self._count = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def transfer(self, cache, incarnation, *, pages_per_part=4, address=None):
        self._count += 1
        return LocalTransfer(
            self.network,
            cache,
            address=address or f"worker-{self._count}:1",
            incarnation=Incarnation(incarnation),
            clock=asyncio.get_running_loop().time,
            max_part_bytes=pages_per_part * cache.layout.page_bytes,
        )

    @asynccontextmanager
    async def held_back(self, source):
        """Inside, messages of `source` do not arrive; those asked for inside arrive soon after."""
        self.network.delay_s = 0.3
        yield
        self.network.delay_s = 0.0

    async def check_nothing_leaked(self):
        assert not self.network.links


class UcxWorld:
    """Workers in this process that share its UCX context and reach each other by TCP and UCX."""

    def __init__(self):
        self._context = UcxContext()
        self._stagings = {}

    async def __aenter__(self):
        await self._context.__aenter__()
        return self

    async def __aexit__(self, *error):
        await self._context.__aexit__(*error)

    def transfer(self, cache, incarnation, *, pages_per_part=4, address="127.0.0.1:0"):
        staging = Staging(cache, {}, arena_bytes=arena_bytes(pages_per_part * cache.layout.page_bytes))
        transfer = UcxTransfer(
            self._context,
            staging,
            incarnation=Incarnation(incarnation),
            clock=asyncio.get_running_loop().time,
            port=int(address.rpartition(":")[2]),
        )
        self._stagings[transfer] = staging
        return transfer

    @asynccontextmanager
    async def held_back(self, source):
        """As `LocalWorld.held_back`: the source finds no buffer to send from."""
        outgoing = self._stagings[source].outgoing
        async with outgoing.lease(outgoing.num_bytes):
            yield

    async def check_nothing_leaked(self):
        async with asyncio.timeout(10):
            while not all(map(is_whole, self._stagings.values())):
                await asyncio.sleep(0.001)
        for transfer in self._stagings:
            for connection in transfer._puller._connections.values():
                assert not connection.pulls
                assert not connection.probes


def is_whole(staging) -> bool:
    """Whether nothing of its arenas is lent."""
    return all(arena.num_free_bytes == arena.num_bytes for arena in (staging.outgoing, staging.incoming))
