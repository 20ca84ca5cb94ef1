"""Two ends of hand-overs, as the suites of `Transfer` use them."""

import asyncio
from contextlib import asynccontextmanager

import torch

from shared.blocks import PAGE_TOKENS
from tests.contract.transfer_worlds import SECRET, a_cache

TIMEOUT_S = 20.0


class Ends:
    """Collects how offers ended."""

    def __init__(self):
        self.outcomes = {}
        self._changed = asyncio.Event()

    def of(self, key):
        def on_end(outcome):
            assert key not in self.outcomes, "an offer ends once"
            self.outcomes[key] = outcome
            self._changed.set()

        return on_end

    async def wait(self, key):
        async with asyncio.timeout(TIMEOUT_S):
            while key not in self.outcomes:
                self._changed.clear()
                await self._changed.wait()
        return self.outcomes[key]


class Pair:
    """A source with random pages and a puller with empty ones."""

    def __init__(self, world, source, source_cache, puller, puller_cache):
        self.world = world
        self.source = source
        self.source_cache = source_cache
        self.puller = puller
        self.puller_cache = puller_cache
        self.ends = Ends()
        self.offered = []

    def offer(self, key="k", pages=(3, 4, 5, 20, 7), *, hold_s=60.0, puller="puller", num_tokens=None, **options):
        self.offered.append(key)
        return self.source.offer(
            key,
            pages,
            num_tokens=num_tokens or len(pages) * PAGE_TOKENS,
            secret=SECRET,
            puller=puller,
            hold_s=hold_s,
            on_end=self.ends.of(key),
            **options,
        )

    async def pull(self, ticket, want=(0,), into=(0,), timeout_s=TIMEOUT_S):
        return await self.puller.pull(ticket, want=want, into=into, timeout_s=timeout_s)

    def check_arrived(self, offered, want, into):
        """The wanted pages are there and all others are untouched."""
        expected = torch.zeros_like(self.puller_cache.pages)
        for index, page in zip(want, into, strict=True):
            expected[page] = self.source_cache.pages[offered[index]]
        assert torch.equal(self.puller_cache.pages, expected)


@asynccontextmanager
async def a_pair(world, num_pages=32, layout=None, **options):
    source_cache, puller_cache = a_cache(num_pages, seed=1, layout=layout), a_cache(num_pages, layout=layout)
    async with (
        world,
        world.transfer(source_cache, "source", **options) as source,
        world.transfer(puller_cache, "puller", **options) as puller,
    ):
        pair = Pair(world, source, source_cache, puller, puller_cache)
        yield pair
        for key in pair.offered:
            await pair.ends.wait(key)
        assert source.num_offers == 0
        await world.check_nothing_leaked()
