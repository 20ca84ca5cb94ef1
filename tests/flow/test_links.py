"""Links between workers as a whole system makes them: who connects to whom, and what a floor does."""

import asyncio
import contextlib

import pytest

from shared.errors import StartupError
from shared.state.port import Role
from shared.worker.peers import LinkFloor
from tests.flow.system import System
from tests.flow.test_whole import a_body, a_system

SLOW_BYTES_PER_S = 1e8


def links_of(worker):
    return [link.report.incarnation for link in worker.service.peers.links()]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def slow_links(floor):
    """A system whose links carry 0.1 GB/s, and a prefill worker that stands ready."""
    system = System(floor=floor)
    system.network.bytes_per_s = SLOW_BYTES_PER_S
    try:
        prefill = await system.start_worker(Role.PREFILL)
        await prefill.until_ready()
        yield system, prefill
    finally:
        await system.close()


async def test_a_decode_worker_has_its_links_when_it_opens_and_gets_those_of_workers_that_come_later():
    async with a_system(prefills=1, decodes=0) as system:
        decode = await system.start_worker(Role.DECODE)
        await decode.until_ready()
        assert links_of(decode) == [system.workers[0].incarnation]
        later = await system.start_worker(Role.PREFILL)
        await until(lambda: later.incarnation in links_of(decode))
        others = {decode.incarnation, later.incarnation}
        await until(lambda: set(links_of(system.workers[0])) == others)  # prefixes may come from there


async def test_a_prefill_worker_that_dies_is_forgotten():
    async with a_system(prefills=2, decodes=1) as system:
        first, second, decode = system.workers
        await until(lambda: len(links_of(decode)) == 2)
        await first.kill()
        await until(lambda: links_of(decode) == [second.incarnation])
        await system.ended(await system.submit(a_body()))


async def test_a_worker_without_peers_starts_whatever_the_floor():
    system = System(floor=LinkFloor(1.0, refuse=True))
    try:
        decode = await system.start_worker(Role.DECODE)
        async with asyncio.timeout(10):
            await decode.until_ready()
    finally:
        await system.close()


async def test_a_link_below_the_floor_is_degraded_and_served():
    async with slow_links(LinkFloor(1.0)) as (system, _):
        decode = await system.start_worker(Role.DECODE)
        await decode.until_ready()
        health = decode.service.peers.health()
        assert health["status"] == "degraded"
        assert [(link["gb_per_s"], link["below_floor"]) for link in health["links"]] == [(0.1, True)]


async def test_a_worker_that_refuses_slow_links_ends_before_it_is_open_and_gives_its_slot_back():
    async with slow_links(LinkFloor(1.0, refuse=True)) as (system, prefill):
        decode = await system.start_worker(Role.DECODE)
        with pytest.raises(ExceptionGroup) as ended:
            await asyncio.wait_for(decode.task, 10)
        assert ended.group_contains(StartupError, match="0.1 GB/s by memory, under the floor of 1.0 GB/s")
        workers = await prefill.service._parts.state.workers(num_slots=8)
        assert [worker.card.incarnation for worker in workers] == [prefill.incarnation]
        system.workers.remove(decode)
