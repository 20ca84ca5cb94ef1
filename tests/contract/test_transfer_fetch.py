"""Fetches: pages that a peer happens to have, the twin's and the real one's."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch

from shared.blocks import BlockHash, BlockKey, name_of
from shared.errors import KvTransferFailed, LayoutMismatch
from shared.transfer.port import Fetched, Refusal
from tests.contract.transfer_lender import Shelf, some_keys
from tests.contract.transfer_pair import TIMEOUT_S
from tests.contract.transfer_worlds import LocalWorld, UcxWorld, a_cache, a_layout

PAGES = (3, 4, 5, 20, 7)


@pytest.fixture(params=[LocalWorld, UcxWorld], ids=["local", "ucx"])
def world(request):
    return request.param()


@dataclass
class Fetching:
    """A peer with blocks of a prompt in `PAGES`, and a worker without."""

    world: object
    source: object
    source_cache: object
    puller: object
    puller_cache: object
    shelf: Shelf
    keys: list = field(default_factory=lambda: some_keys(len(PAGES)))

    async def fetch(self, keys=None, into=(9, 1, 8, 2, 6), *, incarnation="source", timeout_s=TIMEOUT_S):
        keys = self.keys if keys is None else keys
        return await self.puller.fetch(self.source.address, incarnation, keys, into[: len(keys)], timeout_s=timeout_s)

    def check_arrived(self, num_pages, into=(9, 1, 8, 2, 6)):
        expected = torch.zeros_like(self.puller_cache.pages)
        for index in range(num_pages):
            expected[into[index]] = self.source_cache.pages[PAGES[index]]
        assert torch.equal(self.puller_cache.pages, expected)


@asynccontextmanager
async def a_peer(world, *, num_held=5, lends=True, **options):
    source_cache, puller_cache = a_cache(seed=1), a_cache()
    shelf = Shelf(zip(some_keys(num_held), PAGES, strict=False))
    async with (
        world,
        world.transfer(source_cache, "source", **options) as source,
        world.transfer(puller_cache, "puller", **options) as puller,
    ):
        if lends:
            source.lend_from(shelf)
        yield Fetching(world, source, source_cache, puller, puller_cache, shelf)
        await shelf.all_given_back()
        assert source.num_offers == 0
        await world.check_nothing_leaked()


@pytest.mark.parametrize("pages_per_part", [1, 2, 8])
async def test_what_the_peer_has_arrives(world, pages_per_part):
    async with a_peer(world, pages_per_part=pages_per_part) as peer:
        assert await peer.fetch() == Fetched(5, 5 * peer.source_cache.layout.page_bytes)
        peer.check_arrived(5)
        assert await peer.fetch() == Fetched(5, 5 * peer.source_cache.layout.page_bytes)


@pytest.mark.parametrize("num_held", [0, 1, 3])
async def test_only_the_run_that_it_still_has_comes(world, num_held):
    async with a_peer(world, num_held=num_held) as peer:
        assert (await peer.fetch()).num_pages == num_held
        peer.check_arrived(num_held)


async def test_what_was_evicted_in_the_middle_ends_the_run(world):
    async with a_peer(world) as peer:
        del peer.shelf.pages[peer.keys[2]]
        assert (await peer.fetch()).num_pages == 2
        peer.check_arrived(2)


async def test_a_run_may_begin_in_the_middle_of_a_prompt(world):
    async with a_peer(world) as peer:
        assert (await peer.fetch(peer.keys[3:], into=(0, 2))).num_pages == 2
        assert torch.equal(peer.puller_cache.pages[[0, 2]], peer.source_cache.pages[[20, 7]])


async def test_who_lends_nothing_has_nothing(world):
    async with a_peer(world, lends=False) as peer:
        assert await peer.fetch() == Fetched(0, 0)
        peer.check_arrived(0)


def forged(key):
    """The name is right, and the rest guessed."""
    return BlockKey(BlockHash(name_of(key) + bytes(16)))


@pytest.mark.parametrize("index", [0, 2, 4])
async def test_who_knows_only_the_name_of_a_block_gets_none(world, index):
    async with a_peer(world) as peer:
        keys = [forged(key) if at == index else key for at, key in enumerate(peer.keys)]
        with pytest.raises(KvTransferFailed, match="does not show that it knows"):
            await peer.fetch(keys)
        peer.check_arrived(0)
        assert peer.source.refusals == {Refusal.UNPROVEN_BLOCKS: 1}
        assert (await peer.fetch()).num_pages == 5


async def test_a_block_that_the_peer_has_not_need_not_be_proven(world):
    async with a_peer(world, num_held=2) as peer:
        assert (await peer.fetch([*peer.keys[:2], *map(forged, peer.keys[2:])])).num_pages == 2


async def test_one_block_twice_is_refused(world):
    async with a_peer(world) as peer:
        with pytest.raises(KvTransferFailed, match="named twice"):
            await peer.fetch([*peer.keys[:2], peer.keys[0]])
        assert peer.shelf.num_loans == 0


async def test_another_start_of_the_peer_is_not_asked(world):
    async with a_peer(world) as peer:
        with pytest.raises(KvTransferFailed, match="restarted"):
            await peer.fetch(incarnation="an-earlier-start")


async def test_pages_that_are_laid_out_otherwise_do_not_come(world):
    other = a_cache(layout=a_layout(num_layers=2))
    async with a_peer(world) as peer, world.transfer(other, "other") as puller:
        with pytest.raises(LayoutMismatch):
            await puller.fetch(peer.source.address, "source", peer.keys, range(5), timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("keys", "into"), [((), ()), (some_keys(2), (1,)), (some_keys(2), (1, 1)), (some_keys(1), (32,))]
)
async def test_arguments_that_can_never_work(world, keys, into):
    async with a_peer(world) as peer:
        with pytest.raises(ValueError, match=r"wanted|twice|outside"):
            await peer.puller.fetch(peer.source.address, "source", keys, into, timeout_s=TIMEOUT_S)


async def test_a_peer_that_answers_late_is_given_up_and_gives_back(world):
    async with a_peer(world) as peer:
        peer.shelf.open.clear()
        with pytest.raises(KvTransferFailed, match="within"):
            await peer.fetch(timeout_s=0.05)
        peer.shelf.open.set()
        assert (await peer.fetch()).num_pages == 5
        peer.check_arrived(5)


async def test_a_fetch_given_up_in_its_middle_leaves_nothing_behind(world):
    async with a_peer(world, pages_per_part=1) as peer:
        await peer.fetch(peer.keys[:1], into=(0,))
        async with peer.world.held_back(peer.source):
            task = asyncio.create_task(peer.fetch(peer.keys[1:]))
            while not peer.shelf.loans:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            before = peer.puller_cache.pages.clone()
        await peer.shelf.all_given_back()
        assert torch.equal(peer.puller_cache.pages, before)


@pytest.mark.parametrize("late", [True, False], ids=["while it looks", "while it sends"])
async def test_a_source_that_closes_gives_back_what_it_lent(world, late):
    source_cache, puller_cache = a_cache(seed=1), a_cache()
    shelf = Shelf(zip(some_keys(5), PAGES, strict=True))
    async with world, world.transfer(puller_cache, "puller") as puller:
        async with world.transfer(source_cache, "source") as source:
            source.lend_from(shelf)
            if late:
                shelf.open.clear()
            async with world.held_back(source):
                fetch = asyncio.create_task(
                    puller.fetch(source.address, "source", some_keys(5), range(5), timeout_s=TIMEOUT_S)
                )
                while not (late or shelf.loans):
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)
        shelf.open.set()
        with pytest.raises(KvTransferFailed):
            await fetch
        await shelf.all_given_back()
        await world.check_nothing_leaked()


async def test_fetches_run_beside_one_another_in_both_directions(world):
    cache_a, cache_b = a_cache(seed=1), a_cache(seed=2)
    keys_a, keys_b = some_keys(8, "a"), some_keys(8, "b")
    shelves = Shelf(zip(keys_a, range(8), strict=True)), Shelf(zip(keys_b, range(8), strict=True))
    async with (
        world,
        world.transfer(cache_a, "a", pages_per_part=1) as a,
        world.transfer(cache_b, "b", pages_per_part=1) as b,
    ):
        a.lend_from(shelves[0])
        b.lend_from(shelves[1])
        fetches = [
            puller.fetch(source.address, name, [key], (8 + index,), timeout_s=TIMEOUT_S)
            for puller, source, name, keys in ((a, b, "b", keys_b), (b, a, "a", keys_a))
            for index, key in enumerate(keys)
        ]
        assert all(fetched.num_pages == 1 for fetched in await asyncio.gather(*fetches))
        assert torch.equal(cache_a.pages[8:16], cache_b.pages[:8])
        assert torch.equal(cache_b.pages[8:16], cache_a.pages[:8])
        for shelf in shelves:
            await shelf.all_given_back()
        await world.check_nothing_leaked()
