import asyncio
from random import Random
from unittest.mock import patch

import structlog

from services.ingest.ended import OLD_AFTER_S, EndedJobs
from services.ingest.jobs import Job
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.sending import Unsent
from shared.bus.to_end import read_to_end
from shared.request import Priority, RequestId, partition_of
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
        self.ended = EndedJobs(
            MemoryBus(self.log, client_id="ingest"), clock_s=self.clock_s, log=structlog.testing.CapturingLogger()
        )
        self.ended.follows.set()

    def result(self, name):
        """It is written; who follows may see it."""
        self.log.append(RESULTS.name, PARTITION, [Unsent(b"{}", name.encode(), (), 2, None)])
        return self.log.records(RESULTS.name, PARTITION)[-1]

    def held(self, name, accepted_s, unsure_since_s=None, priority=Priority.STANDARD):
        position = LogPosition(PARTITION, 0)
        job = Job(name, position, b"", "default", accepted_s, accepted_s + 600, None, None, priority)
        self.ended.hold(job, unsure_since_s)
        return job


def virtual(test):
    async def live():
        await test(World())

    return lambda: run_virtually(live())


@virtual
async def test_a_result_that_comes_ends_the_job_that_is_in_hand_and_no_later_one_of_that_name(world):
    job = world.held(NAMES[0], world.clock_s())
    world.ended.see(world.result(NAMES[1]))
    assert not world.ended.has_seen(job)
    await asyncio.sleep(1)
    result = world.result(NAMES[0])
    world.ended.see(result)
    assert world.ended.has_seen(job)
    assert await world.ended.has(job)
    world.ended.let_go(job.request_id)
    await asyncio.sleep(1)
    again = world.held(NAMES[0], world.clock_s())
    world.ended.see(result)
    assert not world.ended.has_seen(again)


@virtual
async def test_nothing_is_remembered_of_what_is_not_in_hand(world):
    job = world.held(NAMES[0], 1.0, 1.0)
    assert world.held(NAMES[0], 1.0, 1.0) == job
    world.ended.let_go(job.request_id)
    assert not world.ended.has_seen(job)
    world.ended.let_go(job.request_id)
    world.ended.see(world.result(NAMES[0]))
    assert not world.ended._held
    assert not any(world.ended._unsure.values())


@virtual
async def test_who_knows_all_since_the_job_came_reads_no_results(world):
    job = world.held(NAMES[0], world.clock_s())
    await asyncio.sleep(3600)
    world.log.away = True
    assert not await world.ended.has(job)


@virtual
async def test_what_others_had_in_hand_is_looked_for_among_the_results_since_then(world):
    began_s = world.clock_s()
    world.result(NAMES[0])
    await asyncio.sleep(1)
    world.result(NAMES[1])
    await asyncio.sleep(OLD_AFTER_S)
    jobs = [world.held(name, began_s, began_s) for name in NAMES[:3]]
    assert [await world.ended.has(job) for job in jobs] == [True, True, False]


@virtual
async def test_all_that_are_in_hand_are_looked_for_at_once_and_once(world):
    began_s = world.clock_s()
    for name in NAMES[:4]:
        world.result(name)
    await asyncio.sleep(OLD_AFTER_S)
    jobs = [world.held(name, began_s, began_s) for name in NAMES[:5]]
    assert not await world.ended.has(jobs[4])
    world.log.away = True
    assert [await world.ended.has(job) for job in jobs] == [True, True, True, True, False]


@virtual
async def test_nobody_waits_until_the_results_since_a_batch_job_were_read(world):
    batch = world.held(NAMES[0], 1.0, 1.0, Priority.BATCH)
    urgent = world.held(NAMES[1], world.clock_s() - OLD_AFTER_S, world.clock_s() - OLD_AFTER_S)
    read = []
    read_since = world.ended._read

    async def note(partition, since_s, until_s):
        read.append(since_s)
        await read_since(partition, since_s, until_s)

    world.ended._read = note
    await world.ended.has(urgent)
    assert read == [urgent.accepted_s]
    await world.ended.has(batch)
    assert read == [urgent.accepted_s, batch.accepted_s]


@virtual
async def test_what_came_while_a_job_was_in_hand_is_not_read_again(world):
    """It was seen when it came; the job may have been put down for hours."""
    began_s = world.clock_s()
    world.result(NAMES[0])
    jobs = [world.held(name, began_s, began_s) for name in NAMES[:2]]
    world.result(NAMES[1])
    await asyncio.sleep(3600)
    world.result(NAMES[2])
    with patch("services.ingest.ended.read_to_end", wraps=read_to_end) as reading:
        assert [await world.ended.has(job) for job in jobs] == [True, True]
    (_, starts, _, ends) = reading.call_args.args
    assert (starts, ends) == ({PARTITION: 0}, {PARTITION: 2})


@virtual
async def test_a_young_job_is_not_looked_for(world):
    world.result(NAMES[0])
    world.log.away = True
    came_s = world.clock_s() - OLD_AFTER_S + 1
    assert not await world.ended.has(world.held(NAMES[0], came_s, came_s))


@virtual
async def test_of_a_young_job_that_waits_it_is_known_a_little_later(world):
    came_s = world.clock_s() - 1
    world.result(NAMES[0])
    await asyncio.sleep(1)
    job = world.held(NAMES[0], came_s, came_s)
    assert not await world.ended.has(job)
    await world.ended.look_back()
    assert world.ended.has_seen(job)
    world.log.away = True
    await world.ended.look_back()


@virtual
async def test_it_waits_for_a_log_that_is_away_and_until_results_are_followed(world):
    began_s = world.clock_s()
    world.result(NAMES[0])
    await asyncio.sleep(OLD_AFTER_S)
    world.log.away = True
    world.ended.follows.clear()
    asking = asyncio.create_task(world.ended.has(world.held(NAMES[0], began_s, began_s)))
    await asyncio.sleep(20)
    assert not asking.done()
    world.log.away = False
    await asyncio.sleep(20)
    assert not asking.done()
    world.ended.follows.set()
    assert await asking
