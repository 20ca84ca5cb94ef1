"""Partitions that come and go under a reader that never stops reading."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import structlog

from services.ingest.partitions import GROUP, Partitions
from shared.bus.memory import MemoryBus, MemoryLog
from shared.request import NUM_REQUEST_PARTITIONS, Incarnation
from shared.state import keys
from shared.state.memory import MemoryState, MemoryStore
from tests.virtual_loop import run_virtually

TOPICS = ("jobs", "resumes")
SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


class World:
    """One process's partitions of two topics, and all records that it takes in hand."""

    def __init__(self) -> None:
        clock_s = asyncio.get_running_loop().time
        self.log = MemoryLog(clock=clock_s, random=Random(1))
        self.bus = MemoryBus(self.log, client_id="ingest")
        self.state = MemoryState(MemoryStore(clock=clock_s))
        self.taken = []
        self.lost = []

    async def append(self, topic, partition, count):
        async with MemoryBus(self.log, client_id="application").producer() as producer:
            for _ in range(count):
                await producer.send(topic, partition, b"job")

    async def rival_comes(self):
        await self._lease(Incarnation("rival"))

    async def rival_goes(self):
        await self.state.leave_group(GROUP, Incarnation("rival"))

    async def _lease(self, member):
        await self.state.lease_partitions(GROUP, member, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=keys.LEASE_MS)

    @asynccontextmanager
    async def reading(self):
        async with AsyncExitStack() as stack:
            readers = {topic: await stack.enter_async_context(self.bus.reader(topic, group="g")) for topic in TOPICS}
            partitions = Partitions(
                self.state, Incarnation("me"), readers, self.lost.append, SILENT, asyncio.get_running_loop().time
            )
            tasks = [asyncio.create_task(self._read(partitions, reader)) for reader in readers.values()]
            try:
                yield partitions
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, partitions, reader):
        while True:
            for record in await reader.read(1.0):
                in_hand = partitions.begin(record)
                if in_hand is not None:
                    self.taken.append((record.topic, record.partition, record.offset))
                    partitions.end(in_hand)


def test_every_record_that_waits_is_taken_in_hand():
    async def scene():
        world = World()
        for partition in range(NUM_REQUEST_PARTITIONS):
            for topic in TOPICS:
                await world.append(topic, partition, 2)
        async with world.reading() as partitions:
            await partitions.renew()
            await asyncio.sleep(1)
            assert len(world.taken) == len(set(world.taken)) == 2 * 2 * NUM_REQUEST_PARTITIONS
            await partitions.commit()
        for topic in TOPICS:
            assert [world.log.committed("g", topic, p).offset for p in range(NUM_REQUEST_PARTITIONS)] == [2] * 16

    run_virtually(scene())


def test_nothing_is_passed_over_while_a_partition_is_lost_and_comes_back_through_an_outage():
    async def scene():
        world = World()
        async with world.reading() as partitions:
            await partitions.renew()
            await world.rival_comes()
            await partitions.renew()
            await world.rival_comes()
            await partitions.renew()
            lost = set(range(NUM_REQUEST_PARTITIONS)) - partitions.owned
            assert lost
            for partition in lost:
                await world.append("jobs", partition, 1)
            await asyncio.sleep(0.1)
            await world.rival_goes()
            world.bus.can_read = False
            renewing = asyncio.create_task(partitions.renew())  # the commits cannot be asked for
            await asyncio.sleep(10)
            world.bus.can_read = True
            await renewing
            await partitions.renew()
            await asyncio.sleep(1)
            await partitions.commit()
            assert {partition for _, partition, _ in world.taken} == lost

    run_virtually(scene())


def test_a_partition_that_is_owned_and_not_read_yet_is_not_committed():
    async def scene():
        world = World()
        async with world.reading() as partitions:
            committing = asyncio.create_task(commit_often(partitions))
            await partitions.renew()
            await world.append("jobs", 3, 1)
            await asyncio.sleep(1)
            await committing
            await partitions.commit()
            assert world.log.committed("g", "jobs", 3).offset == 1

    async def commit_often(partitions):
        for _ in range(1000):
            await partitions.commit()
            await asyncio.sleep(0)

    run_virtually(scene())
