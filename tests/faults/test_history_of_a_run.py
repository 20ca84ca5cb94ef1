"""Clients of every kind against the whole system on the twins; the history that is left has nothing wrong."""

import asyncio
import random

from services.ingest.admission import ModelFacts
from shared.bus.memory import MemoryBus
from shared.engine.fake import FAKE_VOCAB_SIZE, fake_engine
from tests.fake_tokeniser import fake_tokeniser
from tests.faults.clients import Clients, Mix, draw_wants
from tests.faults.history import Report, Rules, check
from tests.faults.topics import read_history, until_all_ended
from tests.flow.system import System

MIX = Mix("fake", rate_per_s=40.0, max_tokens=(2, 30), timeout_s=30.0, tight_s=(0.2, 0.4))
GRACE_S = 5.0


async def run(*, salted: bool, with_kills: bool) -> Report:
    system = System(make_engine=lambda: fake_engine(salted=salted, num_pages=128), grace_s=GRACE_S)
    try:
        await system.start(ingests=2, prefills=1, decodes=2, edges=3)
        async with MemoryBus(system.log, client_id="clients").producer() as producer, asyncio.TaskGroup() as tasks:
            edges = [edge.url for edge in system.edges]
            clients = Clients(edges, producer, random.Random(1), clock_s=system.clock_s)
            tasks.create_task(clients.run_all(draw_wants(MIX, 3), until_s=2.0))
            await asyncio.sleep(1.0)
            if with_kills:
                await system.edges[0].kill()
                await system.workers.pop().kill()
        await system.quiet()
        bus = MemoryBus(system.log, client_id="history")
        assert not await until_all_ended(bus, 20.0, poll_s=0.2)
        history = await read_history(bus, clients.captures)
    finally:
        await system.close()
    return check(history, Rules(fake_tokeniser(), ModelFacts("fake", 4096, FAKE_VOCAB_SIZE), salted, GRACE_S))


async def test_a_run_of_engines_without_salt_has_no_findings():
    report = await run(salted=False, with_kills=False)
    assert report.findings == []
    assert report.numbers["requests"] > 40


async def test_a_salted_run_in_which_an_edge_and_a_decode_worker_are_killed_has_no_findings():
    report = await run(salted=True, with_kills=True)
    assert report.findings == []
    assert report.numbers["streams_resumed"] > 0
    assert max(report.numbers["choices_by_placements"]) > 1
