"""Whoever dies, and whenever: the request goes on behind what was accepted, and its answer is what it would have been.

In virtual time, each service in a process of its own that is killed or stopped as the kernel does it.
"""

import asyncio
import functools
import random

import orjson
import pytest

from shared.bus.memory import Fate
from shared.bus.sending import Unsent
from shared.engine.fake import fake_engine
from shared.request import FinishReason, RequestId, partition_of
from shared.state.keys import LEASE_MS
from shared.wire.codec import encode
from shared.wire.to_ingest import HEADER_DEADLINE
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut
from shared.wire.to_worker import TO_DECODE_DECODER, DecodeWork, FirstToken
from shared.wire.topics import DEAD_LETTER, DECODE, STREAM_OUT
from tests.flow.test_whole import a_body
from tests.sim.clients import Client, Manners
from tests.sim.processes import run_processes
from tests.sim.world import Toolbox, World

PROMPT = list(range(10, 410))
NUM_NEW = 24
LEASE_S = LEASE_MS / 1000
COUNTS = {"ingest": 1, "edge": 1, "prefill": 2, "decode": 2}


@functools.cache
def tools():
    return Toolbox()


def scenario(work, **counts):
    """The result of `work`, in a world with so many of each."""
    processes = []

    async def live():
        world = World(0, tools())
        world.processes = processes
        world.make_engine = lambda: fake_engine(max_batch_tokens=64)
        for kind, count in {**COUNTS, **counts}.items():
            for _ in range(count):
                world.start_host(kind)
        await world.ready()
        await asyncio.sleep(2 * LEASE_S)
        result = await work(world)
        assert not world.journal.errors
        return result

    async def told():
        """A failure too is told behind the end of all processes."""
        try:
            return await live(), None
        except BaseException as error:  # noqa: BLE001 - raised again below
            return None, error

    result, error = run_processes(told(), processes)
    if error is not None:
        raise error
    return result


def of_kind(world, incarnation):
    return next(host for host in world.hosts if host.incarnation == incarnation)


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def placement(world, job, choice=0):
    state = world.folded(job)
    return None if state is None else state.choice(choice).placement


def num_made(world, job):
    state = world.folded(job)
    return 0 if state is None else len(state.choice(0).ids)


def told_to_decode(world, kind):
    return [
        message
        for slot in range(DECODE.num_partitions)
        for record in world.log.records(DECODE.name, slot)
        if isinstance(message := TO_DECODE_DECODER.decode(record.value), kind)
    ]


def cuts(world, job):
    messages = [STREAM_OUT_DECODER.decode(r.value) for r in world.log.records(STREAM_OUT.name, partition_of(job))]
    return [message for message in messages if isinstance(message, Cut) and message.request_id == job]


async def quiet(world):
    """Nothing is kept of what is over, by those who live."""
    hosts = world.running("prefill", "decode")
    await until(lambda: all(h.engine.stats().num_free_pages == h.engine.stats().num_pages for h in hosts))
    for host in hosts:
        host.engine.check()
    await until(lambda: not any(credits_of(world, host) for host in hosts))


def credits_of(world, host):
    traces = world.store.traces(host.incarnation)
    return traces.credits if traces is not None else {}


# The phases of a request's life: how it is brought into each of them


async def before_prefill(world, job_body):
    for host in world.running("prefill"):
        host.process.stop()
    job = await world.submit(job_body, request_id="job")
    await until(lambda: placement(world, job))
    return job


async def prefilling(world, job_body):
    job = await world.submit(job_body, request_id="job")
    await until(lambda: told_to_decode(world, DecodeWork))
    assert num_made(world, job) == 0
    return job


async def before_the_token_is_handed_on(world, job_body):
    world.log.fate = lambda append: Fate(delay_s=0.3 if append.topic == DECODE.name else 0.0)
    job = await world.submit(job_body, request_id="job")
    await until(lambda: num_made(world, job) == 1)
    world.log.fate = lambda _: Fate()
    assert not told_to_decode(world, FirstToken)
    return job


async def transferring(world, job_body):
    for host in world.running("decode"):
        host.process.stop()
    job = await world.submit(job_body, request_id="job")
    await until(lambda: told_to_decode(world, FirstToken))
    return job


async def decoding(world, job_body):
    job = await world.submit(job_body, request_id="job")
    await until(lambda: num_made(world, job) >= 7)
    return job


PHASES = [before_prefill, prefilling, before_the_token_is_handed_on, transferring, decoding]
VICTIMS = [("prefill",), ("decode",), ("prefill", "decode")]


def strike(world, job, victims):
    """SIGKILL of those who serve the request; who was stopped for the phase and lives goes on."""
    placed = placement(world, job)
    names = {"prefill": placed.prefill.incarnation, "decode": placed.decode.incarnation}
    for victim in victims:
        world.kill(of_kind(world, names[victim]) if victim in names else world.any(victim))
    for host in world.running():
        host.process.go_on()
    for victim in victims:
        if victim not in names:
            world.start_host(victim)


def bodies():
    """Each with something that a placement must go on with rightly."""
    common = {"prompt": PROMPT, "num_new": NUM_NEW}
    return {
        "greedy": a_body(**common),
        "sampled": a_body(**common, temperature=0.8, seed=7, top_p=0.9),
        "logprobs": a_body(**common, logprobs=2),
        "penalties": a_body(**common, repetition_penalty=1.2, presence_penalty=0.5),
        "min_tokens": a_body([*PROMPT, 998, 15], NUM_NEW, ignore_eos=False, min_tokens=12),
        "choices": a_body(**common, n=2, temperature=0.5, seed=3),
        "stop": a_body(**common, stop=text_between(5, 10)),
    }


@functools.cache
def undisturbed(name):
    """The answer's choices where nothing happens to it."""

    async def work(world):
        job = await world.submit(bodies()[name], request_id="job")
        return (await world.result(job)).response["choices"]

    return scenario(work)


@functools.cache
def text_between(first, last):
    """What tokens [first, last) of the greedy answer say; to stop there, a placement must know what was said before."""

    async def work(world):
        job = await world.submit(a_body(PROMPT, NUM_NEW), request_id="job")
        return list((await world.ended(job)).choice(0).ids)

    return tools().tokeniser.decode(scenario(work)[first:last])


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_a_worker_dies_in_any_phase(phase, victims):
    async def work(world):
        job = await phase(world, bodies()["sampled"])
        killed_s = world.clock_s()
        # Decode has the first token and can compute the rest, whatever it had pulled.
        needed = not (phase in (transferring, decoding) and victims == ("prefill",))
        strike(world, job, victims)
        result = await world.result(job, 60)
        assert result.response["choices"] == undisturbed("sampled")
        reasons = [cut.reason for cut in cuts(world, job)]
        # Leases of two that die at once end one after the other: between, a choice may be placed on the second.
        assert set(reasons) == ({"worker lost"} if needed else set())
        assert len(reasons) <= len(victims)
        if needed:
            assert world.clock_s() - killed_s < LEASE_S + 1 + 2 * NUM_NEW * 0.05
        await quiet(world)

    undisturbed("sampled")
    scenario(work)


@pytest.mark.parametrize("name", bodies())
def test_every_kind_of_answer_goes_on_exactly(name):
    async def work(world):
        job = await decoding(world, bodies()[name])
        strike(world, job, ("decode",))
        assert (await world.result(job, 60)).response["choices"] == undisturbed(name)
        state = world.folded(job)
        assert state.choice(0).epoch == 2
        await quiet(world)

    undisturbed(name)
    scenario(work)


@pytest.mark.parametrize("other", ["edge", "ingest"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_who_takes_over_dies_with_the_worker(phase, other):
    async def work(world):
        job = await phase(world, bodies()["stop"])
        strike(world, job, ("prefill", "decode", other))
        assert (await world.result(job, 60)).response["choices"] == undisturbed("stop")
        await quiet(world)

    undisturbed("stop")
    scenario(work)


@pytest.mark.parametrize("name", ["greedy", "stop", "choices"])
def test_a_client_sees_one_unbroken_stream(name):
    async def work(world):
        client = Client(world, {"n": 1, **bodies()[name], "stream": True}, Manners(), random.Random(1))
        task = asyncio.ensure_future(client.run())
        await until(lambda: client.captures)
        (capture,) = client.captures.values()
        await until(lambda: num_made(world, capture.request_id) >= 7)
        strike(world, capture.request_id, ("prefill", "decode"))
        await task
        assert list(client.captures) == [capture.request_id]
        assert not capture.was_alone
        assert capture.ended
        expected = undisturbed(name)
        assert [capture.text(index) for index in range(len(expected))] == [choice["text"] for choice in expected]
        await quiet(world)

    undisturbed(name)
    scenario(work)


def test_a_request_that_workers_die_of_ends_with_a_letter():
    async def work(world):
        job = await world.submit(a_body(PROMPT, NUM_NEW), request_id="job")
        for epoch in (1, 2, 3):
            await until(lambda epoch=epoch: (placed := placement(world, job)) and placed.epoch == epoch)
            strike(world, job, ("prefill",))
            world.start_host("prefill")
        result = await world.result(job, 60)
        assert (result.status, result.error.code) == ("failed", "workers_lost")
        (letter,) = [r for p in range(DEAD_LETTER.num_partitions) for r in world.log.records(DEAD_LETTER.name, p)]
        headers = dict(letter.headers)
        assert orjson.loads(letter.value) == a_body(PROMPT, NUM_NEW)
        assert letter.key == b"job"
        assert headers["source-topic"] == b"ingest"
        assert [loss["epoch"] for loss in orjson.loads(headers["history"])] == [1, 2, 3]
        assert [cut.outcome for cut in cuts(world, job)] == [None, None, None, FinishReason.FAILED]
        await quiet(world)

    scenario(work)


def test_losses_with_progress_between_them_end_nothing():
    async def work(world):
        job = await world.submit(a_body(PROMPT, 60), request_id="job")
        for epoch in range(1, 6):
            made = num_made(world, job)
            await until(lambda epoch=epoch: (placed := placement(world, job)) and placed.epoch == epoch)
            await until(lambda made=made: num_made(world, job) > made + 3)
            strike(world, job, ("decode",))
            world.start_host("decode")
        assert (await world.result(job, 60)).status == "completed"
        await quiet(world)

    scenario(work)


def test_one_choice_that_workers_die_of_ends_its_request():
    async def work(world):
        job = await world.submit(a_body(PROMPT, 400, n=2), request_id="job")
        for epoch in (1, 2, 3):
            await until(lambda epoch=epoch: (placed := placement(world, job, 1)) and placed.epoch == epoch)
            state = world.folded(job)
            for worker in {state.choice(index).placement.prefill for index in (0, 1) if state.choice(index).placement}:
                world.kill(of_kind(world, worker.incarnation))
                world.start_host("prefill")
        result = await world.result(job, 90)
        assert (result.status, result.error.code) == ("failed", "workers_lost")
        await quiet(world)

    scenario(work)


def test_a_worker_that_wakes_after_its_lease_harms_nothing():
    """It goes on with what it had, and sends it: all of it is void."""

    async def work(world):
        job = await decoding(world, bodies()["greedy"])
        sleeper = of_kind(world, placement(world, job).decode.incarnation)
        sleeper.process.stop()
        await until(lambda: (placed := placement(world, job)) and placed.epoch == 2)
        sleeper.process.go_on()
        assert (await world.result(job, 60)).response["choices"] == undisturbed("greedy")
        await until(lambda: not sleeper.live)  # it finds its lease lost
        await quiet(world)

    undisturbed("greedy")
    scenario(work)


def test_an_edge_that_slept_longer_than_its_lease_harms_nothing():
    async def work(world):
        jobs = [await world.submit(bodies()["greedy"], request_id=f"job-{n}") for n in range(12)]
        await until(lambda: all(num_made(world, job) >= 3 for job in jobs[:4]))
        sleeper = world.running("edge")[0]
        sleeper.process.stop()
        world.kill(world.running("decode")[0])
        world.start_host("decode")
        await asyncio.sleep(3 * LEASE_S)
        sleeper.process.go_on()
        for job in jobs:
            records = world.log.records
            await until(lambda job=job: world.folded(job) is not None and world.folded(job).finished, 120)
            assert [answer_of(world, job)] == [tokens_of("greedy")], records
        await asyncio.sleep(5 * LEASE_S)
        by_request = {}
        for result in world.results():
            by_request.setdefault(result.request_id, []).append(encode(result))
        assert {job: len(set(copies)) for job, copies in by_request.items()} == dict.fromkeys(jobs, 1)
        await quiet(world)

    tokens_of("greedy")
    scenario(work, edge=2)


def answer_of(world, job):
    return list(world.folded(job).choice(0).ids)


@functools.cache
def tokens_of(name):
    async def work(world):
        job = await world.submit(bodies()[name], request_id="job")
        return list((await world.ended(job)).choice(0).ids)

    return scenario(work)


def test_an_ingest_that_slept_longer_than_its_lease_harms_nothing():
    async def work(world):
        sleeper = world.running("ingest")[0]
        jobs = [await world.submit(bodies()["greedy"], request_id=f"job-{n}") for n in range(24)]
        await until(lambda: any(placement(world, job) for job in jobs))
        sleeper.process.stop()
        await asyncio.sleep(3 * LEASE_S)
        sleeper.process.go_on()
        for job in jobs:
            assert list((await world.ended(job, 120)).choice(0).ids) == tokens_of("greedy")
            await world.result(job)
        await quiet(world)

    tokens_of("greedy")
    scenario(work, ingest=2)


def test_nobody_is_given_up_by_who_could_not_see():
    """The store is away, then emptied; the log is away: workers are as they were, and nothing is cut."""

    async def work(world):
        job = await world.submit(a_body(PROMPT, 600), request_id="job")
        await until(lambda: num_made(world, job) >= 3)
        world.store.away = True
        await asyncio.sleep(0.4 * LEASE_S)
        world.store.away = False
        await asyncio.sleep(3 * LEASE_S)
        world.log.away = True
        await asyncio.sleep(4 * LEASE_S)
        world.log.away = False
        await asyncio.sleep(4 * LEASE_S)
        assert not cuts(world, job)
        assert (await world.result(job, 400)).status == "completed"

    scenario(work)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_a_cancel_is_effective_within_a_step(phase):
    async def work(world):
        job = await phase(world, a_body(PROMPT, 400))
        for host in world.running():
            host.process.go_on()
        epoch = world.folded(job).choice(0).epoch
        cut = encode(Cut(job, 0, epoch + 1, "client asked", FinishReason.CANCELLED))
        world.log.append(STREAM_OUT.name, partition_of(job), [Unsent(cut, None, (), len(cut), None)])
        cut_s = world.clock_s()
        made = num_made(world, job)
        assert (await world.result(job)).status == "cancelled"
        await quiet(world)
        assert world.clock_s() - cut_s < 1.0
        assert num_made(world, job) == made

    scenario(work)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_a_deadline_is_kept_by_the_workers_themselves(phase):
    """Nobody owns the request any more, and nobody tells them to stop."""

    async def work(world):
        deadline_s = world.clock_s() + 4.0
        submit = world.submit

        async def with_deadline(body, request_id):
            header = HEADER_DEADLINE, str(int(deadline_s * 1000)).encode()
            return await submit(body, request_id=request_id, headers=[header])

        world.submit = with_deadline
        job = await phase(world, a_body(PROMPT, 3000))
        for edge in world.running("edge"):
            world.kill(edge)
        for host in world.running():
            host.process.go_on()
        await asyncio.sleep(deadline_s - world.clock_s() + 1.0)
        await quiet(world)
        assert not world.folded(job).finished
        world.start_host("edge")
        assert (await world.result(job, 60)).status == "expired"

    scenario(work)


def test_an_id_is_a_request_for_ever():
    """A job twice, the second while a loss is made good: one answer."""

    async def work(world):
        job = await decoding(world, bodies()["greedy"])
        strike(world, job, ("decode",))
        await world.submit(bodies()["sampled"], request_id="job")
        assert (await world.result(RequestId("job"), 60)).response["choices"] == undisturbed("greedy")
        await quiet(world)

    undisturbed("greedy")
    scenario(work)
