"""A request passes from prefill to decode while its prompt is computed: at every stage of that, everything may end."""

import asyncio
import random
import time
from dataclasses import dataclass

import httpx
import pytest

from shared.blocks import pages_for, token_ids
from shared.engine.fake import END_AT, fake_answer, fake_engine
from shared.observe.metrics import LocalPrefill
from shared.request import FinishReason, SamplingParams
from shared.state.port import Role
from shared.wire.to_worker import TO_DECODE_DECODER, DecodeWork, FirstToken, Stop
from shared.wire.topics import DECODE
from shared.worker.peers import Peers
from tests.flow.test_whole import a_body, a_system, answer

PROMPT = list(range(10, 410))
NUM_NEW = 12


def expected(prompt=PROMPT, num_new=NUM_NEW, *, ignore_eos=True):
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=ignore_eos)
    return fake_answer(token_ids(prompt), len(prompt), sampling)


def slow_engine(step_s=0.02):
    """Steps of 64 tokens that take a while: prefill of PROMPT takes seven."""
    engine = fake_engine(max_batch_tokens=64)
    step = engine.step

    def slow_step():
        time.sleep(step_s)
        return step()

    engine.step = slow_step
    return engine


async def until(condition, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0)


def told_to_decode(system):
    """All messages to decode workers, in the order of each slot."""
    return [
        TO_DECODE_DECODER.decode(record.value)
        for slot in range(DECODE.num_partitions)
        for record in system.log.records(DECODE.name, slot)
    ]


def num_made(system, job):
    state = system.folded(job)
    return 0 if state is None else len(state.choice(0).ids)


async def all_credits_are_back(system):
    state = system.workers[0].service._parts.state
    async with asyncio.timeout(10):
        while any(worker.num_credits for worker in await state.workers(num_slots=64)):
            await asyncio.sleep(0.01)


async def test_the_pull_begins_while_prefill_computes():
    async with a_system(make_engine=slow_engine) as system:
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        await until(lambda: system.network.links)
        assert num_made(system, job) == 0
        assert [type(message) for message in told_to_decode(system)] == [DecodeWork]
        assert answer(await system.ended(job)) == expected()
        work, token = told_to_decode(system)
        assert list(work.ids) == PROMPT
        assert (token.placement, token.token_id) == (work.assignment.placement, expected()[0])
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 0
        await system.quiet()
        await all_credits_are_back(system)


async def test_most_kv_has_arrived_when_the_first_token_is_made():
    async with a_system(make_engine=slow_engine, decodes=1) as system:
        arrived = []
        copier = system.workers[-1].transfer.copier
        unpack = copier.unpack

        def unpack_and_tell(source, pages, *rest):
            arrived.append((len(pages), num_made(system, job)))
            unpack(source, pages, *rest)

        copier.unpack = unpack_and_tell
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        assert answer(await system.ended(job)) == expected()
        num_pages = pages_for(len(PROMPT))
        assert sum(count for count, _ in arrived) == num_pages
        assert sum(count for count, made in arrived if not made) > num_pages / 2
        await system.quiet()


@pytest.mark.parametrize(
    ("prompt", "num_new", "told"),
    [
        (PROMPT, 1, [Stop]),
        (PROMPT, 2, [DecodeWork, FirstToken]),
        ([*PROMPT, END_AT, 0], NUM_NEW, [DecodeWork, Stop, Stop]),
        ([*PROMPT, END_AT, 1], NUM_NEW, [DecodeWork, FirstToken]),
    ],
    ids=["max_tokens 1", "max_tokens 2", "EOS at once", "EOS as second"],
)
async def test_short_answers(prompt, num_new, told):
    async with a_system() as system:
        job = await system.submit({**a_body(prompt, num_new), "ignore_eos": False})
        assert answer(await system.ended(job)) == expected(prompt, num_new, ignore_eos=False)
        await system.quiet()
        await all_credits_are_back(system)
        assert (await system.result(job)).status == "completed"
        assert [type(message) for message in told_to_decode(system)] == told, "by prefill, and at its end by the owner"
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 0


async def test_a_stop_string_in_the_first_token_ends_it_at_both_workers():
    async with a_system() as system:
        first = system.tokeniser.decode(expected()[:1]).strip()
        job = await system.submit(a_body(PROMPT, NUM_NEW, stop=[first]))
        state = await system.ended(job)
        assert (answer(state), state.choice(0).end.finish) == (expected()[:1], FinishReason.STOP)
        await system.quiet()
        await all_credits_are_back(system)
        await system.result(job)
        assert [type(message) for message in told_to_decode(system)] == [DecodeWork, Stop, Stop]


@pytest.mark.parametrize("when", ["while prefill computes", "behind the first token"])
async def test_a_pull_that_breaks_off_is_made_good_by_decode(when):
    async with a_system(make_engine=slow_engine) as system:
        if when == "behind the first token":
            system.network.delay_s = 1.0
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        await until(lambda: system.network.links)
        if when == "behind the first token":
            await until(lambda: num_made(system, job) == 1)
        (link,) = system.network.links
        system.network.cut(link.source.address)
        system.network.delay_s = 0.0
        assert answer(await system.ended(job)) == expected()
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 1
        await system.quiet()
        await all_credits_are_back(system)


async def test_a_pull_that_lasts_too_long_behind_the_first_token_is_made_good_by_decode():
    async with a_system(hold_s=0.5) as system:
        system.network.delay_s = 1000.0
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        assert answer(await system.ended(job)) == expected()
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 1
        await system.quiet()
        await all_credits_are_back(system)


async def test_who_misses_a_prefill_worker_that_lives_hands_the_request_back(monkeypatch):
    """Its owner sees that worker, and would wait for it and for decode until the deadline."""
    missed = []
    monkeypatch.setattr(Peers, "is_gone", lambda self, peer, heard_s: not missed and not missed.append(peer))
    async with a_system(make_engine=slow_engine) as system:
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        state = await system.ended(job)
        assert (answer(state), state.choice(0).epoch) == (expected(), 2)
        assert missed == [state.choice(0).opens[0].prefill.incarnation]
        await system.quiet()
        await all_credits_are_back(system)


@dataclass
class Moment:
    """A stage of the hand-over that a test waits for; `delay_s` is what a message takes."""

    delay_s: float
    is_there: object


MOMENTS = {
    "placed": Moment(0.0, lambda system, job: system.folded(job) is not None),
    "computing and pulling": Moment(0.0, lambda system, _: system.network.links),
    "token there, pull under way": Moment(0.3, lambda system, job: num_made(system, job) == 1),
    "decoding": Moment(0.0, lambda system, job: num_made(system, job) > 2),
}


async def reach(system, moment):
    """A request that stands at the moment."""
    system.network.delay_s = MOMENTS[moment].delay_s
    job = await system.submit(a_body(PROMPT, 60))
    await until(lambda: MOMENTS[moment].is_there(system, job))
    return job


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_cancelled_request_leaves_nothing_behind(moment):
    async with a_system(make_engine=slow_engine) as system, httpx.AsyncClient(timeout=20) as client:
        job = await reach(system, moment)
        assert (await client.delete(f"{system.edges[0].url}/v1/requests/{job}")).status_code == 200
        assert (await system.result(job)).status == "cancelled"
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.parametrize("drain_s", [0.0, 5.0])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "placed"])
async def test_a_worker_that_leaves_loses_no_request(moment, role, drain_s):
    async with a_system(make_engine=slow_engine, drain_s=drain_s, decodes=1) as system:
        job = await reach(system, moment)
        leaving = system.workers[0 if role is Role.PREFILL else 1]
        await system.start_worker(role)
        await system.workers[-1].until_ready()
        await leaving.leave()
        system.network.delay_s = 0.0
        state = await system.ended(job)
        assert answer(state) == expected(num_new=60)
        if drain_s:
            assert state.choice(0).epoch == 1
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "placed"])
async def test_what_a_killed_worker_leaves_at_its_peer_goes_with_the_request(moment, role):
    async with a_system(make_engine=slow_engine, decodes=1) as system, httpx.AsyncClient(timeout=20) as client:
        job = await reach(system, moment)
        killed = system.workers.pop(0 if role is Role.PREFILL else 1)
        await killed.kill()
        await client.delete(f"{system.edges[0].url}/v1/requests/{job}")
        await system.result(job)
        await system.quiet()


@pytest.mark.parametrize("seed", range(3))
async def test_cuts_cancels_and_leavers_in_any_order(seed):
    """Every answer that is not cancelled is right, and nothing is left behind."""
    rng = random.Random(seed)
    engine = lambda: slow_engine(0.002)  # noqa: E731 - as `make_engine`
    async with (
        a_system(make_engine=engine, prefills=2, decodes=2, seed=seed) as system,
        httpx.AsyncClient(timeout=30) as client,
    ):
        jobs, cancelled = {}, set()
        for _ in range(40):
            prompt = [rng.randrange(3, 900) for _ in range(rng.choice((1, 63, 64, 200, 400)))]
            num_new = rng.choice((1, 2, 12))
            jobs[await system.submit(a_body(prompt, num_new))] = prompt, num_new
            system.network.delay_s = rng.choice((0.0, 0.0, 0.01))
            await asyncio.sleep(rng.choice((0.0, 0.01, 0.05)))
            match rng.randrange(4):
                case 0 if system.network.links:
                    system.network.cut(rng.choice(sorted(link.puller.address for link in system.network.links)))
                case 1:
                    job = rng.choice(sorted(jobs))
                    await client.delete(f"{system.edges[0].url}/v1/requests/{job}")
                    cancelled.add(job)
                case 2 if rng.random() < 0.3:
                    await replace_a_worker(system, rng)
        for job, (prompt, num_new) in jobs.items():
            state = await system.ended(job, timeout_s=60)
            if job not in cancelled:
                assert answer(state) == expected(prompt, num_new)
            await system.result(job)
        await system.quiet()
        await all_credits_are_back(system)


async def replace_a_worker(system, rng):
    """One worker leaves behind another that has come."""
    leaving = rng.choice(system.live_workers())
    role = leaving.service._parts.role_name
    await (await system.start_worker(role)).until_ready()
    await leaving.leave()
