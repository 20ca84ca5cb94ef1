import asyncio
import random

import structlog

from services.ingest.again import RecordsAgain
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.sending import Unsent
from shared.wire.to_ingest import LogPosition
from tests.virtual_loop import run_virtually

TOPIC = "ingest"
SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


class CountingBus(MemoryBus):
    num_readers = 0

    def reader(self, topic, *, group):
        self.num_readers += 1
        return super().reader(topic, group=group)


class World:
    def __init__(self):
        self.log = MemoryLog(clock=lambda: 0.0, random=random.Random(1))
        self.bus = CountingBus(self.log, client_id="ingest")
        self.again = RecordsAgain(self.bus, SILENT)

    def write(self, partition, *values):
        for value in values:
            self.log.append(TOPIC, partition, [Unsent(value, b"k", (), 2, None)])

    async def at(self, partition, offset):
        record = await self.again.at(TOPIC, LogPosition(partition, offset))
        return None if record is None else record.value


def virtual(test):
    async def live():
        await test(World())

    return lambda: run_virtually(live())


@virtual
async def test_those_that_stand_together_are_read_together(world):
    world.write(3, *(b"%d" % number for number in range(50)))
    world.write(4, b"other")
    asked = (world.at(3, offset) for offset in range(10, 50))
    assert await asyncio.gather(*asked, world.at(4, 0)) == [*(b"%d" % number for number in range(10, 50)), b"other"]
    assert world.bus.num_readers == 2
    assert await world.at(3, 9) == b"9"


@virtual
async def test_what_is_gone_is_gone_and_a_log_that_is_away_is_waited_for(world):
    world.write(3, b"a", b"b")
    assert await world.at(3, 2) is None
    world.log.trim(TOPIC, 3, 1)
    assert await world.at(3, 0) is None
    world.log.away = True
    asking = asyncio.create_task(world.at(3, 1))
    await asyncio.sleep(60)
    assert not asking.done()
    world.log.away = False
    assert await asking == b"b"


@virtual
async def test_only_so_much_is_kept(world):
    world.write(3, *(bytes(2**20) for _ in range(40)))
    for offset in range(40):
        assert len(await world.at(3, offset)) == 2**20
        assert len(world.again._kept) <= 16
    world.write(4, bytes(20 * 2**20))
    assert len(await world.at(4, 0)) == 20 * 2**20, "one that is larger than all that is kept, too"
