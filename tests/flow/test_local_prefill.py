"""A decode worker computes prompts itself where ingest chose so, beside what runs there, as right as handed over."""

import asyncio
import random
from dataclasses import replace

import httpx
import pytest

from services.ingest import placer
from shared.blocks import token_ids
from shared.engine.fake import END_AT, fake_answer, fake_engine
from shared.observe.metrics import LocalPrefill
from shared.policy.placement import Chosen, Rules
from shared.request import Event, FinishReason, SamplingParams
from shared.state.port import Role
from shared.wire.to_worker import LocalWork
from shared.wire.topics import PREFILL
from tests.flow.test_handover import all_credits_are_back, num_made, slow_engine, told_to_decode, until
from tests.flow.test_takeover import PROMPT, cuts, of_kind, placement, quiet, scenario
from tests.flow.test_takeover import num_made as num_told
from tests.flow.test_takeover import until as until_then
from tests.flow.test_whole import a_body, a_system, answer

NUM_NEW = 12


def expected(prompt=PROMPT, num_new=NUM_NEW, *, ignore_eos=True):
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=ignore_eos)
    return fake_answer(token_ids(prompt), len(prompt), sampling)


@pytest.fixture
def chooses_local(monkeypatch):
    """Ingest lets the decode worker that it chose compute the prompt too, where this tells so of the request."""
    place = placer.place
    wanted = [lambda request: True]

    def place_locally(request, *others, **options):
        decision = place(request, *others, **options)
        if isinstance(decision, Chosen) and wanted[0](request):
            return replace(decision, prefill=decision.decode, num_prefill_pages=0)
        return decision

    monkeypatch.setattr(placer, "place", place_locally)
    return wanted


@pytest.mark.usefixtures("chooses_local")
async def test_one_worker_tells_the_whole_answer():
    async with a_system(decodes=1) as system:
        job = await system.submit(a_body(PROMPT, NUM_NEW))
        state = await system.ended(job)
        assert answer(state) == expected()
        choice = state.choice(0)
        assert choice.placement.prefill == choice.placement.decode
        assert choice.num_cached_tokens == 0
        stamps = choice.stamps
        assert stamps[Event.PLACED] <= stamps[Event.PREFILLING] <= stamps[Event.FIRST_TOKEN] <= stamps[Event.FINISHED]
        assert stamps[Event.DECODING] == stamps[Event.FIRST_TOKEN]
        assert Event.TRANSFERRING not in stamps
        assert (await system.result(job)).status == "completed"
        assert [type(message) for message in told_to_decode(system)] == [LocalWork]
        assert not any(system.log.records(PREFILL.name, slot) for slot in range(PREFILL.num_partitions))
        assert system.num_local_prefills(LocalPrefill.CHOSEN) == 1
        assert system.num_local_prefills(LocalPrefill.PULL_FAILED) == 0
        await system.quiet()
        await all_credits_are_back(system)
        again = await system.ended(await system.submit(a_body(PROMPT, NUM_NEW)))
        assert answer(again) == expected()
        assert again.choice(0).num_cached_tokens == len(PROMPT) // 64 * 64


@pytest.mark.usefixtures("chooses_local")
@pytest.mark.parametrize(
    ("prompt", "num_new"),
    [(PROMPT, 1), (PROMPT, 2), ([*PROMPT, END_AT, 0], NUM_NEW), ([*PROMPT, END_AT, 1], NUM_NEW)],
    ids=["max_tokens 1", "max_tokens 2", "EOS at once", "EOS as second"],
)
async def test_short_answers(prompt, num_new):
    async with a_system() as system:
        job = await system.submit({**a_body(prompt, num_new), "ignore_eos": False})
        state = await system.ended(job)
        assert answer(state) == expected(prompt, num_new, ignore_eos=False)
        assert (Event.DECODING in state.choice(0).stamps) == (len(answer(state)) > 1)
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.parametrize("place_of_stop", [0, 5])
async def test_stop_strings_and_log_probabilities_are_as_handed_over(chooses_local, place_of_stop):
    async with a_system() as system:
        stop = system.tokeniser.decode(expected()[place_of_stop : place_of_stop + 1]).strip()
        states = []
        for is_local in (True, False):
            chooses_local[0] = lambda _, is_local=is_local: is_local
            states.append(await system.ended(await system.submit(a_body(PROMPT, NUM_NEW, stop=[stop], logprobs=2))))
        local, handed_over = (state.choice(0) for state in states)
        assert local.placement.prefill == local.placement.decode != handed_over.placement.prefill
        assert list(local.ids) == expected()[: place_of_stop + 1]
        assert local.end == handed_over.end
        assert (local.end.finish, local.end.stop_reason) == (FinishReason.STOP, stop)
        assert local.logprobs == handed_over.logprobs
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.usefixtures("chooses_local")
async def test_what_the_engine_refuses_fails_alone():
    async with a_system(decodes=1) as system:
        engine = system.workers[-1].engine
        add = engine.add

        def add_but(request):
            if request.ids[0] == 5:
                raise ValueError("not with me")
            add(request)

        engine.add = add_but
        refused, fine = await system.submit(a_body([5, *PROMPT])), await system.submit(a_body(PROMPT, NUM_NEW))
        end = (await system.ended(refused)).choice(0).end
        assert (end.finish, end.error.message) == (FinishReason.FAILED, "not with me")
        assert answer(await system.ended(fine)) == expected()
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.usefixtures("chooses_local")
@pytest.mark.parametrize("moment", ["computing", "decoding"])
async def test_a_cancelled_request_leaves_nothing_behind(moment):
    async with a_system(make_engine=slow_engine) as system, httpx.AsyncClient(timeout=20) as client:
        job = await system.submit(a_body(PROMPT, 60))
        await until(lambda: system.folded(job) is not None if moment == "computing" else num_made(system, job) > 2)
        assert (await client.delete(f"{system.edges[0].url}/v1/requests/{job}")).status_code == 200
        assert (await system.result(job)).status == "cancelled"
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.usefixtures("chooses_local")
@pytest.mark.parametrize("drain_s", [0.0, 5.0])
@pytest.mark.parametrize("moment", ["computing", "decoding"])
async def test_a_worker_that_leaves_loses_no_request(moment, drain_s):
    async with a_system(make_engine=slow_engine, drain_s=drain_s, decodes=1) as system:
        job = await system.submit(a_body(PROMPT, 60))
        await until(lambda: system.folded(job) is not None if moment == "computing" else num_made(system, job) > 2)
        leaving = system.workers[-1]
        await (await system.start_worker(Role.DECODE)).until_ready()
        await leaving.leave()
        state = await system.ended(job)
        assert answer(state) == expected(num_new=60)
        assert state.choice(0).epoch == (1 if drain_s else 2)
        await system.quiet()
        await all_credits_are_back(system)


@pytest.mark.usefixtures("chooses_local")
@pytest.mark.parametrize("moment", ["computing", "decoding"])
def test_a_killed_worker_s_request_goes_on_at_another(moment):
    async def work(world):
        job = await world.submit(a_body(PROMPT, 60))
        await until_then(lambda: placement(world, job) if moment == "computing" else num_told(world, job) > 2)
        assert num_told(world, job) == 0 or moment == "decoding"
        world.kill(of_kind(world, placement(world, job).decode.incarnation))
        state = await world.ended(job)
        assert answer(state) == expected(num_new=60)
        (cut,) = cuts(world, job)
        assert cut.lost is not None
        assert state.choice(0).placement.prefill == state.choice(0).placement.decode
        await quiet(world)

    scenario(work)


async def test_beside_prompts_that_are_handed_over_with_few_pages(chooses_local):
    """Preempted, cancelled, aborted: every answer that is told is right, and nothing is left behind."""
    rng = random.Random(1)
    chooses_local[0] = lambda request: request.num_tokens % 2
    async with (
        a_system(make_engine=lambda: fake_engine(num_pages=12, max_batch_tokens=64), decodes=2) as system,
        httpx.AsyncClient(timeout=30) as client,
    ):
        jobs, cancelled = {}, set()
        for _ in range(24):
            prompt = [rng.randrange(3, 900) for _ in range(rng.choice((1, 63, 64, 201, 400)))]
            num_new = rng.choice((1, 2, 12, 200))
            jobs[await system.submit(a_body(prompt, num_new))] = prompt, num_new
            if rng.random() < 0.2:
                job = rng.choice(sorted(jobs))
                await client.delete(f"{system.edges[0].url}/v1/requests/{job}")
                cancelled.add(job)
            await asyncio.sleep(rng.choice((0.0, 0.01)))
        for job, (prompt, num_new) in jobs.items():
            state = await system.ended(job, timeout_s=60)
            if job not in cancelled:
                assert answer(state) == expected(prompt, num_new)
        assert 0 < system.num_local_prefills(LocalPrefill.CHOSEN) < len(jobs)
        await system.quiet()
        await all_credits_are_back(system)


async def test_where_nothing_runs_a_decode_worker_computes_prompts_itself_and_people_are_told_up_to_which_length():
    async with a_system(rules=Rules(ttft_goal_s=2.0, tpot_goal_s=0.1), decodes=1) as system:
        service = system.ingests[0].service
        assert service._placer.local_threshold() is None, "nobody knows how long answers are"
        state = await system.ended(await system.submit(a_body(PROMPT, NUM_NEW)))
        assert answer(state) == expected()
        assert state.choice(0).placement.prefill == state.choice(0).placement.decode
        await all_credits_are_back(system)
        await service._cluster.refresh()
        await service._tell_threshold()
        assert service._metrics.local_threshold._value.get() == 64 * 64, "as much as its pages hold"
        await system.quiet()
