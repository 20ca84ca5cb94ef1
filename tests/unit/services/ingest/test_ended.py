import asyncio
from random import Random

import structlog

from services.ingest.ended import OLD_AFTER_S, EndedJobs
from services.ingest.jobs import Job
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.sending import Unsent
from shared.request import RequestId, partition_of
from shared.wire.to_ingest import LogPosition
from shared.wire.topics import RESULTS
from tests.virtual_loop import run_virtually

PARTITION = 3
NAMES = [name for name in (RequestId(f"r{number}") for number in range(400)) if partition_of(name) == PARTITION]


class World:
    def __init__(self):
        loop = asyncio.get_running_loop()
        self.clock_s = lambda: 1e9 + loop.time()
        self.log = MemoryLog(clock=self.clock_s, random=Random(1))
        self.bus = MemoryBus(self.log, client_id="ingest")
        self.ended = EndedJobs(self.bus, clock_s=self.clock_s, log=structlog.testing.CapturingLogger())

    def result(self, name):
        self.log.append(RESULTS.name, PARTITION, [Unsent(b"{}", name.encode(), (), 2, None)])

    def job(self, name, accepted_s):
        return Job(name, LogPosition(PARTITION, 0), b"", "default", accepted_s, accepted_s + 600, None, None)


def virtual(test):
    async def live():
        await test(World())

    return lambda: run_virtually(live())


@virtual
async def test_an_old_job_is_looked_for_among_the_results_since_it_came(world):
    began_s = world.clock_s()
    world.result(NAMES[0])
    await asyncio.sleep(1)
    world.result(NAMES[1])
    await asyncio.sleep(OLD_AFTER_S)
    assert await world.ended.has(world.job(NAMES[1], began_s + 0.5))
    assert not await world.ended.has(world.job(NAMES[0], began_s + 0.5)), "of an earlier request of that name"
    assert await world.ended.has(world.job(NAMES[0], began_s)), "a job that came earlier needs more of the results"
    assert not await world.ended.has(world.job(NAMES[2], began_s))


@virtual
async def test_a_young_job_is_not_looked_for(world):
    world.result(NAMES[0])
    world.log.away = True
    assert not await world.ended.has(world.job(NAMES[0], world.clock_s() - OLD_AFTER_S + 1))


@virtual
async def test_results_that_came_meanwhile_are_read_on(world):
    began_s = world.clock_s()
    await asyncio.sleep(OLD_AFTER_S)
    assert not await world.ended.has(world.job(NAMES[0], began_s))
    world.result(NAMES[0])
    await asyncio.sleep(OLD_AFTER_S + 1)
    assert await world.ended.has(world.job(NAMES[0], began_s))


@virtual
async def test_it_waits_for_a_log_that_is_away(world):
    began_s = world.clock_s()
    world.result(NAMES[0])
    await asyncio.sleep(OLD_AFTER_S)
    world.log.away = True
    asking = asyncio.create_task(world.ended.has(world.job(NAMES[0], began_s)))
    await asyncio.sleep(20)
    assert not asking.done()
    world.log.away = False
    assert await asking
