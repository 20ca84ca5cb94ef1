"""What an owner says of workers, with the workers' side written by hand."""

import asyncio
from dataclasses import replace

from shared.request import FinishReason, Incarnation, WorkerRef
from shared.state.keys import LEASE_MS
from shared.wire.to_ingest import RESUME_DECODER
from shared.wire.to_stream_out import Cut, ErrorBody
from tests.flow.edges import COMPLETION, DECODE, IDS, PREFILL, scenario

LEASE_S = LEASE_MS / 1000


def without(world, ref):
    return [worker for worker in world.workers if worker.card.incarnation != ref.incarnation]


def resumes(world):
    return [RESUME_DECODER.decode(record.value) for p in range(16) for record in world.log.records("ingest-resume", p)]


@scenario
async def test_a_lost_worker_is_cut_and_the_choice_goes_to_be_placed_again(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    job.frame(0, IDS[:3])
    await asyncio.sleep(3)
    assert not world.story(job.id, Cut)
    world.workers = without(world, DECODE)
    await asyncio.sleep(0.6)
    assert [(cut.epoch, cut.outcome, cut.lost) for cut in world.story(job.id, Cut)] == [(2, None, DECODE)]
    (resume,) = resumes(world)
    assert (resume.epoch, list(resume.accepted_ids)) == (2, list(IDS[:3]))
    assert edge.metric("baton_placements_lost_total", lost="decode") == 1
    lines = [entry for entry in edge.log.entries if entry["event"] == "worker lost"]
    assert [(line["incarnation"], line["num_placements"]) for line in lines] == [(DECODE.incarnation, 1)]


@scenario
async def test_a_worker_that_cannot_be_read_lives(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    world.workers, world.unreadable = [], frozenset({PREFILL.incarnation, DECODE.incarnation})
    await asyncio.sleep(10)
    assert not world.story(job.id, Cut)


@scenario
async def test_prefill_may_go_once_decode_has_begun(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    job.frame(0, IDS[:2])
    await asyncio.sleep(1)
    world.workers = without(world, PREFILL)
    await asyncio.sleep(10)
    assert not world.story(job.id, Cut)


@scenario
async def test_a_worker_that_starts_and_gets_work_while_an_owner_looks_lives(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    before, world.workers = world.workers, without(world, DECODE)
    await asyncio.sleep(3)
    up_ms, asked = edge.state.up_ms, asyncio.Event()

    async def slow_up_ms(*, lease_ms):
        asked.set()
        await asyncio.sleep(0.3)
        return await up_ms(lease_ms=lease_ms)

    edge.state.up_ms = slow_up_ms
    await asked.wait()
    world.workers = before
    job.open()
    await asyncio.sleep(5)
    assert not world.story(job.id, Cut)


@scenario
async def test_a_worker_that_the_log_does_not_answer_is_lost(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    await asyncio.sleep(3)
    edge.bus.can_read = False
    await asyncio.sleep(0.9 * LEASE_S)
    world.workers = [replace(each, load=replace(each.load, log_away=True)) for each in world.workers]
    await asyncio.sleep(4 * LEASE_S)
    edge.bus.can_read = True
    await asyncio.sleep(0.9 * LEASE_S)
    assert not world.story(job.id, Cut)
    await asyncio.sleep(LEASE_S)
    assert [cut.lost for cut in world.story(job.id, Cut)] == [PREFILL]


@scenario
async def test_who_was_blind_waits_a_lease(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    await asyncio.sleep(3)
    world.store.away = True
    await asyncio.sleep(0.6)
    world.workers = []
    world.store.away = False
    await asyncio.sleep(0.6 * LEASE_S)
    assert not world.story(job.id, Cut)
    await asyncio.sleep(LEASE_S)
    assert world.story(job.id, Cut)


@scenario
async def test_stops_that_the_owner_before_did_not_send_are_sent(world):
    first = await world.owner("a")
    first.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    await asyncio.sleep(1)
    first.kill()
    world.write(Cut(job.id, 0, 2, "drain"))
    await world.owner("b")
    await asyncio.sleep(5)
    assert sorted(world.stops()) == [
        (topic, slot) for topic in ("decode", "prefill") for slot in sorted((PREFILL.slot, DECODE.slot))
    ]
    assert [resume.epoch for resume in resumes(world)] == [2]


@scenario
async def test_three_losses_that_a_new_owner_finds_end_the_request_with_a_letter(world):
    first = await world.owner("a")
    first.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    first.kill()
    for epoch in (1, 2, 3):
        job.open(epoch=epoch)
        world.write(Cut(job.id, 0, epoch + 1, "worker lost", lost=WorkerRef(epoch, Incarnation(f"d{epoch}"))))
    second = await world.owner("b")
    result = await world.result(job.id)
    assert (result.status, result.error.code) == ("failed", "workers_lost")
    assert not resumes(world)
    (letter,) = [record for p in range(16) for record in world.log.records("dead-letter", p)]
    assert (letter.key.decode(), letter.value) == (job.id, job.record.value)
    assert b'"d2"' in dict(letter.headers)["history"]
    assert second.metric("baton_dead_letters_total") == 1


@scenario
async def test_who_cancels_behind_the_third_loss_leaves_no_letter(world):
    first = await world.owner("a")
    first.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    first.kill()
    for epoch in (1, 2, 3):
        job.open(epoch=epoch)
        world.write(Cut(job.id, 0, epoch + 1, "worker lost", lost=WorkerRef(epoch, Incarnation(f"d{epoch}"))))
    world.write(Cut(job.id, 0, 5, "client asked", FinishReason.CANCELLED))
    await world.owner("b")
    assert (await world.result(job.id)).status == "cancelled"
    assert not any(world.log.records("dead-letter", p) for p in range(16))


@scenario
async def test_a_job_answered_with_503_does_not_run_on(world):
    edge = await world.owner("a")
    edge.bus.can_send = False
    exchange = await edge.call("POST", "/v1/completions", COMPLETION).done()
    assert exchange.status == 503
    edge.bus.can_send = True
    job = await world.job()
    job.open()
    job.frame(0, IDS[:1])
    assert (await world.result(job.id)).status == "cancelled"


@scenario
async def test_a_job_answered_with_503_and_refused_is_over(world):
    edge = await world.owner("a")
    edge.bus.can_send = False
    await edge.call("POST", "/v1/completions", COMPLETION).done()
    edge.bus.can_send = True
    job = await world.job()
    job.refuse(ErrorBody("no", "invalid_request_error", 400))
    assert (await world.result(job.id)).status == "rejected"
    await asyncio.sleep(1)
    assert [cut.outcome for cut in world.story(job.id, Cut)] == [FinishReason.REJECTED]
    assert not edge.edge._background


@scenario
async def test_void_work_of_a_request_that_ended_before_the_take_over_is_stopped_when_it_shows(world):
    first = await world.owner("a")
    first.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    job.serve()
    await world.result(job.id)
    first.kill()
    await world.owner("b")
    await asyncio.sleep(5)
    assert not world.stops()
    job.frame(len(IDS), IDS[:1])
    await asyncio.sleep(1)
    assert {slot for _, slot in world.stops()} == {DECODE.slot}
