"""Where a request was placed and why: told by its `open`, by ingest's log, and by every edge."""

import asyncio

import httpx
import structlog

from services.ingest.story import UNKNOWN
from shared.observe.metrics import NO_SLOT
from shared.request import WorkerRef
from shared.state.memory import Answer
from shared.state.port import Role
from tests.flow.test_whole import PROMPT, a_body, a_system


async def told(system, request_id, edge=0):
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{system.edges[edge].url}/v1/requests/{request_id}/placement")
        assert answer.status_code == 200
        return answer.json()


def slot_told(worker):
    """By its metrics, and by its name at /health."""
    slot, health = worker.service._parts.metrics.slot._value.get(), worker.service.health()
    assert (health["name"], health["slot"]) == (worker.name, None if slot == NO_SLOT else slot)
    return slot


def slots(*refs: WorkerRef):
    return [ref.slot for ref in refs]


async def test_every_edge_tells_of_each_choice_where_it_was_placed_and_why():
    async with a_system(prefills=3, decodes=3, edges=2) as system:
        with structlog.testing.capture_logs() as lines:
            system.ingests[0].service._story._log = structlog.get_logger()
            job = await system.submit(a_body(PROMPT, 8) | {"n": 2})
            state = await system.ended(job)
        for edge in range(2):
            told_here = await told(system, job, edge)
            assert (told_here["id"], told_here["object"]) == (job, "baton.placement")
            assert [(each["index"], each["epoch"]) for each in told_here["placements"]] == [(0, 1), (1, 1)]
            for each in told_here["placements"]:
                (opened,) = state.choice(each["index"]).opens
                assert [each["prefill"], each["decode"]] == slots(opened.prefill, opened.decode)
                why = each["explanation"]
                assert why == opened.explanation.members()
                assert why["reason"]
                assert why["num_considered"] >= len(why["candidates"]) > 1
                best = why["candidates"][0]
                assert [best["prefill"], best["decode"]] == [each["prefill"], each["decode"]]
                assert best["cost_s"] == min(candidate["cost_s"] for candidate in why["candidates"])
        logged = [line for line in lines if line["event"] == "placed"]
        assert [(line["request_id"], line["choice"], line["epoch"]) for line in logged] == [(job, 0, 1), (job, 1, 1)]
        for line, each in zip(logged, told_here["placements"], strict=True):
            assert [line["prefill"], line["decode"]] == [each["prefill"], each["decode"]]
            assert {name: line[name] for name in each["explanation"]} == each["explanation"]


async def test_a_choice_that_moved_has_a_placement_for_each_epoch():
    async with a_system(drain_s=0.0, decodes=1) as system:
        job = await system.submit(a_body(PROMPT, 400) | {"ignore_eos": True})
        while (state := system.folded(job)) is None or len(state.choice(0).ids) < 5:
            await asyncio.sleep(0.001)
        (first,) = (await told(system, job))["placements"]
        assert (await told(system, job))["placements"] == [first], "while it runs"
        leaving = system.workers[1]
        assert [slot_told(worker) for worker in system.workers] == [first["prefill"], first["decode"]]
        await system.start_worker(Role.DECODE)
        while len(system.ingests[0].service._cluster.view.decode) < 2:
            await asyncio.sleep(0.001)
        await leaving.leave()
        assert slot_told(leaving) == NO_SLOT
        state = await system.ended(job)
        placements = (await told(system, job))["placements"]
        assert placements[0] == first
        assert [each["epoch"] for each in placements] == [1, 2]
        assert [each["decode"] for each in placements] == slots(*(opened.decode for opened in state.choice(0).opens))


async def test_a_placement_that_was_found_says_that_nobody_knows_why():
    async with a_system() as system:
        asked = []

        def lose_the_answer_once(name):
            asked.append(name)
            return Answer.LOST if name == "place" and asked.count("place") == 1 else Answer.GIVEN

        system.store.answer = lose_the_answer_once
        job = await system.submit(a_body(PROMPT, 8))
        await system.ended(job)
        (placed,) = (await told(system, job))["placements"]
        assert placed["explanation"] == UNKNOWN.members()
