"""All services in one loop: what one process alone cannot show."""

import asyncio
import contextlib
import random

import httpx
import orjson
import pytest

from shared.blocks import token_ids
from shared.engine.fake import fake_answer, fake_engine
from shared.observe.metrics import LocalPrefill
from shared.request import FinishReason, SamplingParams
from shared.state.port import Role
from tests.flow.system import MODEL, System

PROMPT = list(range(10, 300))


@contextlib.asynccontextmanager
async def a_system(**settings):
    counts = {name: settings.pop(name) for name in ("ingests", "prefills", "decodes", "edges") if name in settings}
    system = System(**settings)
    try:
        await system.start(**counts)
        yield system
    finally:
        await system.close()


def a_body(prompt=PROMPT, num_new=20, **changes):
    return {"model": MODEL, "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, **changes}


def expected(prompt, num_new, choice=0):
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    return fake_answer(token_ids(prompt), len(prompt), sampling, choice, num_new)


def answer(state, choice=0):
    return list(state.choice(choice).ids)


async def test_a_job_and_an_http_request_get_the_same_answer():
    async with a_system() as system, httpx.AsyncClient(timeout=20) as client:
        job = await system.submit(a_body())
        response = await client.post(f"{system.edges[0].url}/v1/completions", json=a_body())
        assert answer(await system.ended(job)) == expected(PROMPT, 20)
        text = system.tokeniser.decode(expected(PROMPT, 20))
        assert response.json()["choices"][0]["text"].strip() == text.strip()
        assert (await system.result(job)).response["choices"][0]["text"].strip() == text.strip()
        await system.quiet()


async def test_kv_that_cannot_be_pulled_is_computed_where_it_is_needed():
    async with a_system() as system:
        system.network.fail_next_pull()
        state = await system.ended(await system.submit(a_body()))
        assert answer(state) == expected(PROMPT, 20)
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 1
        await system.quiet()


async def test_a_request_that_the_engine_fails_harms_no_other():
    poison = 777
    async with a_system(make_engine=lambda: fake_engine(poison_token_id=poison)) as system:
        bad = await system.submit(a_body([*PROMPT, poison]))
        good = await system.submit(a_body())
        assert (await system.ended(bad)).choice(0).end.finish is FinishReason.FAILED
        assert answer(await system.ended(good)) == expected(PROMPT, 20)
        assert (await system.result(bad)).status == "failed"
        await system.quiet()


async def test_a_worker_that_drains_hands_over_what_does_not_finish():
    async with a_system(drain_s=0.0, decodes=1) as system:
        job = await system.submit(a_body(num_new=600))
        while (state := system.folded(job)) is None or len(state.choice(0).ids) < 5:
            await asyncio.sleep(0.001)
        leaving = system.workers[-1]
        await system.start_worker(Role.DECODE)
        await leaving.leave()
        state = await system.ended(job)
        assert state.choice(0).epoch == 2
        assert answer(state) == expected(PROMPT, 600)
        assert (await system.result(job)).status == "completed"
        await system.quiet()


async def test_a_worker_that_drains_waits_for_tickets_on_their_way():
    """Placed on it and still with prefill: it has nothing of the request yet, and nobody else would ever have."""
    async with a_system(decodes=1) as system:
        job = await system.submit(a_body())
        while system.folded(job) is None:
            await asyncio.sleep(0)
        leaving = system.workers[-1]
        await system.start_worker(Role.DECODE)
        await leaving.leave()
        assert answer(await system.ended(job, 5)) == expected(PROMPT, 20)
        await system.quiet()


async def test_each_choice_is_placed_and_ended_by_itself():
    async with a_system() as system:
        state = await system.ended(await system.submit(a_body(n=4)))
        assert [answer(state, choice) for choice in range(4)] == [expected(PROMPT, 20, choice) for choice in range(4)]
        await system.quiet()


async def test_jobs_survive_their_ingest():
    """Killed at any moment, another one goes on from what stands in the log; every job ends once."""
    async with a_system(ingests=2) as system:
        jobs = []
        for _ in range(3):
            jobs += [await system.submit(a_body(PROMPT[:n], 8)) for n in range(70, 90)]
            await system.ingests[-1].kill()
            await system.start_ingest()
        for job in jobs:
            await system.ended(job)
            await system.result(job)
        await system.quiet()


async def test_more_than_fits_waits_its_turn():
    async with a_system(make_engine=lambda: fake_engine(num_pages=16)) as system:
        jobs = [await system.submit(a_body([5 + n, *PROMPT])) for n in range(40)]
        for n, job in enumerate(jobs):
            assert answer(await system.ended(job)) == expected([5 + n, *PROMPT], 20)
        await system.quiet()


@pytest.mark.parametrize(("tokens", "limit"), [(1024, "1024"), (1000, "1024")])
async def test_what_no_worker_could_hold_is_refused_with_the_limit(tokens, limit):
    async with a_system(make_engine=lambda: fake_engine(num_pages=16)) as system:
        job = await system.submit(a_body([5] * tokens, 100))
        state = await system.ended(job)
        end = state.choice(0).end
        assert (end.finish, end.error.code) == (FinishReason.REJECTED, "context_length_exceeded")
        assert limit in end.error.message
        result = await system.result(job)
        assert result.status == "rejected"
        assert result.error.param in ("prompt", "max_tokens")


async def abort_at_random(system, client, rng, number):
    """One client: submit, and cancel by one way or another after a while, or never."""
    prompt = [rng.randrange(3, 300) for _ in range(rng.choice((1, 40, 64, 65, 130, 400)))]
    body = a_body(prompt, rng.randrange(1, 60), stream=True, n=rng.choice((1, 1, 2)))
    url = system.edges[number % len(system.edges)].url
    patience_s = rng.choice((0.0, 0.01, 0.05, 0.2, 0.5))
    way = rng.choice(("delete", "disconnect", "stay"))
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        request_id = response.headers["x-request-id"]
        if way == "stay":
            async for _ in response.aiter_lines():
                pass
        else:
            await asyncio.sleep(patience_s)
    if way == "delete":
        elsewhere = rng.choice(system.edges).url
        assert (await client.delete(f"{elsewhere}/v1/requests/{request_id}")).status_code == 200
    return request_id


async def test_a_thousand_random_aborts_leave_every_page_free():
    rng = random.Random(7)
    settings = {"grace_s": 0.05, "prefills": 2, "decodes": 2, "edges": 2}
    async with a_system(make_engine=lambda: fake_engine(num_pages=96), **settings) as system:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            requests = []
            for start in range(0, 1000, 50):
                batch = [abort_at_random(system, client, rng, start + number) for number in range(50)]
                requests += await asyncio.gather(*batch)
        assert len(set(requests)) == 1000
        for request_id in requests:
            await system.result(request_id, timeout_s=30)
        await system.quiet()
        statuses = {result.status for result in system.results()}
        assert {"completed", "cancelled"} <= statuses <= {"completed", "cancelled"}
        workers = await system.workers[0].service._parts.state.workers(num_slots=64)
        assert [(worker.num_credits, worker.num_credit_pages) for worker in workers] == [(0, 0)] * 4


async def test_a_second_job_under_the_same_id_changes_nothing():
    async with a_system() as system:
        job = await system.submit(a_body(num_new=50), request_id="same")
        await system.submit(a_body(num_new=500, n=2), request_id="same")
        assert len((await system.result(job)).response["choices"]) == 1
        assert answer(system.folded(job)) == expected(PROMPT, 50)
        await system.quiet()


async def test_a_bad_job_ends_on_results_and_its_bytes_on_dead_letter():
    async with a_system() as system:
        job = await system.submit(b"{not json", request_id="bad-job")
        assert (await system.result(job)).status == "rejected"
        letters = [r for p in range(16) for r in system.log.records("dead-letter", p)]
        assert [letter.value for letter in letters] == [b"{not json"]
        good = await system.submit(orjson.dumps(a_body()))
        assert answer(await system.ended(good)) == expected(PROMPT, 20)
