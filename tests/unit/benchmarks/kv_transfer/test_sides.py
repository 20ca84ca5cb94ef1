import asyncio
from contextlib import asynccontextmanager

import pytest
import torch

from benchmarks.kv_transfer.sides import Pages, Puller, Source, shuffled
from shared.errors import KvTransferFailed
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.local import LocalNetwork, LocalTransfer

LAYOUT = KvLayout(model_fingerprint="random", num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
NUM_PAGES = 10


@asynccontextmanager
async def both_sides(network=None):
    network = network or LocalNetwork()

    def transfer(name, pages):
        return LocalTransfer(
            network,
            pages.cache,
            address=name,
            incarnation=Incarnation(name),
            clock=asyncio.get_running_loop().time,
            max_part_bytes=4 * LAYOUT.page_bytes,
        )

    ours, theirs = (Pages(PagedCache(LAYOUT, NUM_PAGES, torch.device("cpu")), range(NUM_PAGES)) for _ in range(2))
    theirs.fill()
    async with transfer("source", theirs) as sending, transfer("puller", ours) as receiving:
        yield Source(theirs, sending), Puller(ours, receiving), theirs


def test_pages_are_shuffled_alike_by_one_seed():
    assert shuffled(range(9), 3) == shuffled(range(9), 3) != shuffled(range(9), 4)
    assert sorted(shuffled([5, 7, 9], 1)) == [5, 7, 9]


async def test_connecting_tells_what_the_link_is_and_takes():
    async with both_sides() as (source, puller, _):
        found = await puller.connect(address=await source.where())
        assert found["transport"] == "memory"
        assert found["took_ms"] > 0


async def test_pulls_are_timed_one_after_another():
    async with both_sides() as (source, puller, _):
        spans = await puller.pull(tickets=await source.offer(num_pages=3, seeds=range(4)))
        assert len(spans) == 4
        assert spans == sorted(spans)
        await asyncio.sleep(0.01)
        assert await source.withdraw() == 0


async def test_contents_that_came_are_held_against_those_sent():
    async with both_sides() as (source, puller, theirs):
        tickets = await source.offer(num_pages=4, seeds=[0, 5])
        assert await puller.pull_and_compare(tickets=tickets, seeds=[0, 5])
        theirs.cache.pages[shuffled(range(NUM_PAGES), 6)[3]] += 1
        assert not await puller.pull_and_compare(tickets=await source.offer(num_pages=4, seeds=[6]), seeds=[6])


async def test_pulls_that_begin_together_are_one_time():
    async with both_sides() as (source, puller, _):
        tickets = await source.offer(num_pages=3, seeds=range(6))
        assert len(await puller.pull_together(tickets=tickets, at_once=3)) == 2


async def test_a_stream_goes_at_its_rate_until_it_is_stopped():
    async with both_sides() as (source, puller, _):
        tickets = await source.offer(num_pages=2, seeds=range(50))
        rate = 2 * LAYOUT.page_bytes / 0.005 / 1e9
        await puller.start_stream(tickets=tickets, gb_per_s=rate, at_once=1)
        await asyncio.sleep(0.05)
        streamed = await puller.stop_stream()
        assert not streamed["ran_out"]
        assert 1 <= streamed["num_pulls"] <= 12  # one each 5 ms; a busy machine makes fewer
        await asyncio.sleep(0.01)
        assert await source.withdraw() == 50 - streamed["num_pulls"]


async def test_a_stream_without_a_rate_goes_on_to_its_end():
    async with both_sides() as (source, puller, _):
        tickets = await source.offer(num_pages=2, seeds=range(5))
        await puller.start_stream(tickets=tickets, gb_per_s=None, at_once=2)
        await asyncio.sleep(0.1)
        streamed = await puller.stop_stream()
        assert streamed["ran_out"]
        assert streamed["num_pulls"] == 5


async def test_what_a_pull_of_a_stream_raises_comes_out_when_it_is_stopped():
    network = LocalNetwork()
    async with both_sides(network) as (source, puller, _):
        network.fail_next_pull()
        await puller.start_stream(tickets=await source.offer(num_pages=2, seeds=[0]), gb_per_s=None, at_once=1)
        await asyncio.sleep(0.01)
        with pytest.raises(KvTransferFailed):
            await puller.stop_stream()
