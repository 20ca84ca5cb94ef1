import asyncio
import random

import structlog

from services.ingest.results import NUM_READ_BACK, RETRY_S, follow_results
from shared.bus.memory import MemoryBus, MemoryLog
from shared.bus.sending import Unsent
from shared.wire.topics import RESULTS
from tests.virtual_loop import run_virtually

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


def write(log, partition, *keys):
    log.append(RESULTS.name, partition, [Unsent(b"{}", key, (), 2, None) for key in keys])


def test_the_last_results_of_each_partition_are_seen_and_all_that_come():
    async def scene():
        log, seen, begun = MemoryLog(clock=lambda: 0.0, random=random.Random(1)), [], asyncio.Event()
        write(log, 3, *(b"%d" % number for number in range(NUM_READ_BACK + 7)))
        write(log, 5, b"only one")
        log.away = True
        bus = MemoryBus(log, client_id="ingest")
        following = asyncio.create_task(follow_results(bus, lambda record: seen.append(record.key), begun, SILENT))
        await asyncio.sleep(10 * RETRY_S)
        assert not begun.is_set()
        log.away = False
        await asyncio.sleep(10)
        assert begun.is_set()
        assert sorted(seen) == sorted([b"only one", *(b"%d" % number for number in range(7, NUM_READ_BACK + 7))])
        write(log, 9, b"new")
        await asyncio.sleep(1)
        assert seen[-1] == b"new"
        following.cancel()

    run_virtually(scene())
