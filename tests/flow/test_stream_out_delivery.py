import asyncio
import json

import pytest

from services.stream_out.takeover import Done, TakeOver
from shared.bus.sending import Unsent
from shared.policy.limits import TenantLimits
from shared.request import FinishReason, PlacementId, RequestId, keyed_request_id, partition_of
from shared.state.port import RequestHint
from shared.wire.to_ingest import HEADER_EDGE, HEADER_IDEMPOTENCY_KEY, RESUME_DECODER
from shared.wire.to_stream_out import Attach, Cut, Detach, Open
from tests.flow.edges import CHAT, COMPLETION, DECODE, IDS, PREFILL, TEXT, run_virtually, scenario, texts, world

STREAM = CHAT | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}


async def whole_stream(world, edge):
    """A finished stream of two choices, some of its records making several events and some none."""
    exchange = edge.call("POST", "/v1/chat/completions", STREAM)
    job = await world.job()
    job.open()
    job.serve(IDS[:6], choice=1, step=2, finish=FinishReason.LENGTH)
    job.serve(IDS)
    await exchange.done()
    return job, exchange.events


@pytest.mark.parametrize("other", [False, True])
def test_a_resumed_stream_has_exactly_the_remaining_events(other):
    async def live():
        async with world() as made:
            a = await made.owner("a")
            job, events = await whole_stream(made, a)
            edge = await made.node("b") if other else a
            if other:
                await asyncio.sleep(10)
            for num_seen in range(len(events)):
                headers = {"last_event_id": events[num_seen - 1][0]} if num_seen else {}
                resumed = await edge.call("GET", f"/v1/requests/{job.id}/events", **headers).done()
                assert events[:num_seen] + resumed.events == events
            by_query = edge.call("GET", f"/v1/requests/{job.id}/events?last_event_id={events[3][0]}")
            assert (await by_query.done()).events == events[4:]
            posted = edge.call("POST", "/v1/chat/completions", STREAM, last_event_id=events[3][0])
            assert (await posted.done()).events == events[4:]
            wrong = edge.call("POST", "/v1/chat/completions", STREAM | {"n": 1}, last_event_id=events[3][0])
            assert (await wrong.done()).status == 409

    run_virtually(live())


@scenario
async def test_a_stream_cut_in_the_middle_goes_on_at_another_edge(world):
    a, b = await world.node("a"), await world.node("b")
    await asyncio.sleep(5)
    await world.ready(a)
    await world.ready(b)
    assert len(a.edge.owned_partitions) == len(b.edge.owned_partitions) == 8
    exchange = a.call("POST", "/v1/chat/completions", STREAM | {"n": 1})
    job = await world.job()
    assert partition_of(job.id) in a.edge.owned_partitions
    job.open()
    job.serve(IDS[:4], finish=None)
    seen = (await exchange.events_until(4))[:4]
    exchange.leave()
    resumed = b.call("GET", f"/v1/requests/{job.id}/events", last_event_id=seen[-1][0])
    await asyncio.sleep(30)
    job.serve(IDS, start=4)
    await resumed.done()
    assert texts(seen + resumed.events) == TEXT
    assert len(world.story(job.id, Attach)) == 1
    assert not world.story(job.id, Cut)
    assert [result.status for result in world.results()] == ["completed"]


@scenario
async def test_an_edge_dies_in_mid_stream(world):
    a, b = await world.node("a"), await world.node("b")
    await asyncio.sleep(5)
    exchange = a.call("POST", "/v1/chat/completions", STREAM | {"n": 1})
    job = await world.job()
    done = a.call("POST", "/v1/chat/completions", CHAT)
    other_job = await world.job()
    other_job.open()
    other_job.serve()
    await done.done()
    job.open()
    job.serve(IDS[:4], finish=None)
    seen = (await exchange.events_until(4))[:4]
    a.kill()
    job.serve(IDS[:6], start=4, finish=None)
    await asyncio.sleep(1)
    resumed = b.call("GET", f"/v1/requests/{job.id}/events", last_event_id=seen[-1][0])
    await asyncio.sleep(20)
    assert len(b.edge.owned_partitions) == 16
    job.serve(IDS, start=6)
    await resumed.done()
    assert texts(seen + resumed.events) == TEXT
    assert (await world.result(job.id)).status == "completed"
    await asyncio.sleep(20)
    assert sorted(result.request_id for result in world.results()) == sorted([job.id, other_job.id])


@scenario
async def test_what_the_dead_owner_left_undone_is_done_once(world):
    """It dies with requests finished, vacated and running in its partitions; some of them without any commit."""
    a = await world.owner("a")
    jobs = []
    for _ in range(4):
        a.call("POST", "/v1/completions", COMPLETION, idempotency_key=f"k{len(jobs)}")
        jobs.append(await world.job())
        jobs[-1].open()
    finished, written, vacated, running = jobs
    written.serve()
    await world.result(written.id)
    a.kill()
    finished.serve()
    vacated.frame(0, IDS[:3])
    world.write(Cut(vacated.id, 0, 2, "drain"))
    b = await world.node("b")
    await world.result(finished.id)
    await asyncio.sleep(5)
    assert len(b.edge.owned_partitions) == 16
    assert sorted(result.request_id for result in world.results()) == sorted([finished.id, written.id])
    records = world.log.records("ingest-resume", partition_of(vacated.id))
    resume = RESUME_DECODER.decode(records[0].value)
    assert len(records) == 1
    assert (resume.request_id, resume.choice, resume.epoch) == (vacated.id, 0, 2)
    assert resume.accepted_ids == IDS[:3]
    assert resume.job == vacated.view.job
    running.serve()
    vacated.open(epoch=2)
    vacated.serve(IDS, start=3, epoch=2)
    await world.result(running.id)
    result = await world.result(vacated.id)
    assert result.response["choices"][0]["text"] == TEXT


@scenario
async def test_a_restart_from_the_commit_writes_no_second_result(world):
    a = await world.owner("a")
    jobs = []
    for index in range(12):
        exchange = a.call("POST", "/v1/completions", COMPLETION, idempotency_key=f"k{index}")
        jobs.append(await world.job())
        jobs[-1].open()
        if index % 3:
            jobs[-1].serve()
            await exchange.done()
    await asyncio.sleep(3)
    commits = {p: world.log.committed("stream-out", "stream-out", p) for p in range(16)}
    for job in jobs[::3]:
        first = min(
            record.offset
            for record in world.log.records("stream-out", partition_of(job.id))
            if job.id in record.value.decode()
        )
        assert commits[partition_of(job.id)].offset <= first
    assert any(commit and commit.offset for commit in commits.values())
    a.kill()
    b = await world.node("b")
    await asyncio.sleep(5)
    assert len(b.edge.owned_partitions) == 16
    assert len(world.results()) == 8
    # A late copy of an open that is below the commit: its request must not begin again.
    jobs[1].open()
    await asyncio.sleep(1)
    assert world.stops()
    for job in jobs[::3]:
        job.serve()
        await world.result(job.id)
    await asyncio.sleep(3)
    b.kill()
    await world.node("c")
    await asyncio.sleep(5)
    jobs[1].open()
    jobs[1].serve()
    await asyncio.sleep(1)
    assert len(world.results()) == 12


@scenario
async def test_an_old_request_keeps_what_came_behind_it_from_being_done_twice(world):
    """The commit stands still before a long request, while others behind it end and are forgotten."""
    a = await world.owner("a")
    long_one = None
    num_behind = 0
    index = 0
    while num_behind < 3:
        index += 1
        exchange = a.call("POST", "/v1/completions", COMPLETION, idempotency_key=f"k{index}")
        job = await world.job()
        job.open()
        if long_one is None:
            long_one = job
            continue
        num_behind += partition_of(job.id) == partition_of(long_one.id)
        job.serve()
        await exchange.done()
    await asyncio.sleep(300)
    num_results = len(world.results())
    assert num_results == index - 1
    a.kill()
    await world.node("b")
    await asyncio.sleep(5)
    long_one.serve()
    await world.result(long_one.id)
    assert len(world.results()) == num_results + 1


@scenario
async def test_a_request_is_found_elsewhere_from_frames_before_its_open_on(world):
    a = await world.owner("a")
    for note in (True, False):
        exchange = a.call("POST", "/v1/completions", COMPLETION | {"stream": True})
        job = await world.job()
        job.frame(0, IDS[:2])
        job.open(note=note)
        job.serve(IDS[:6], start=2, finish=None)
        await exchange.events_until(2)
        if note:
            job.serve(IDS, start=6)
            await exchange.done()
            await asyncio.sleep(10)
        b = await world.node(f"b{note}")
        resumed = b.call("GET", f"/v1/requests/{job.id}/events")
        await resumed.events_until(2)
        if not note:
            job.serve(IDS, start=6)
        assert (await resumed.done()).events == (await exchange.done()).events


async def ended(world, edge):
    """A job under the key "k", and its exchange."""
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key="k")
    job = await world.job()
    job.open()
    job.serve()
    return job, await exchange.done()


async def assert_found(edge, job, exchange):
    resumed = edge.call("GET", f"/v1/requests/{job.id}/events")
    again = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key="k")
    assert (await resumed.done()).events == exchange.events
    assert (await again.done()).events == exchange.events


@scenario
async def test_what_ended_is_found_by_every_edge_though_the_store_lost_its_memory_or_is_away(world):
    a, b = await world.owner("a"), await world.node("b")
    await asyncio.sleep(5)
    job, exchange = await ended(world, a)
    world.store.flush()
    await asyncio.sleep(5)
    for edge in (a, b):
        await assert_found(edge, job, exchange)
    world.store.away = True
    for edge in (a, b):
        await assert_found(edge, job, exchange)
    world.store.away = False
    await asyncio.sleep(100)
    (owner,) = [edge for edge in (a, b) if partition_of(job.id) in edge.edge.owned_partitions]
    assert job.id not in owner.edge._partitions[partition_of(job.id)].log.stories
    await assert_found(owner, job, exchange)
    assert len(world.results()) == 1


@scenario
async def test_what_ended_is_found_by_a_new_owner_though_the_store_lost_its_memory(world):
    a = await world.owner("a")
    job, exchange = await ended(world, a)
    await asyncio.sleep(2)
    a.kill()
    world.store.flush()
    b = await world.owner("b")
    await asyncio.sleep(5)
    await assert_found(b, job, exchange)
    assert len(world.results()) == 1


@scenario
async def test_an_edge_that_stood_still_reads_on_before_it_says_that_there_is_no_such_request(world):
    a = await world.owner("a")
    posted = a.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key="k")
    job = await world.job()
    posted.leave()
    await posted.done()

    async def nothing(timeout_s):
        await asyncio.sleep(timeout_s)
        return ()

    read, a.edge._reader.read = a.edge._reader.read, nothing
    await asyncio.sleep(1)
    job.open(note=False)
    world.store.flush()
    resumed = a.call("GET", f"/v1/requests/{job.id}/events")
    await asyncio.sleep(1)
    assert resumed.status is None
    a.edge._reader.read = read
    job.serve()
    assert texts((await resumed.done()).events) == TEXT


@pytest.mark.parametrize("found_elsewhere", [False, True])
def test_nobody_waits_for_ever_for_a_request_that_the_log_does_not_tell_of(found_elsewhere):
    async def live():
        async with world() as made:
            a = await made.owner("a")
            name = RequestId("req-ghost")
            await a.state.take_place("default", name, TenantLimits(), num_tokens=3, keep_ms=3_600_000)
            stream = a.call("GET", f"/v1/requests/{name}/events")
            await asyncio.sleep(30)
            assert stream.status == 200
            assert not stream.task.done()
            if found_elsewhere:
                await a.state.note_request(name, RequestHint(partition_of(name), 0), keep_ms=60_000)
            else:
                await a.state.leave_place(name, num_tokens=0)
            await asyncio.sleep(15)
            assert stream.task.done()
            assert not stream.body.endswith(b"data: [DONE]\n\n")

    run_virtually(live())


@scenario
async def test_a_client_whose_reader_died_of_a_defect_is_cut_off_and_not_kept_waiting(world):
    a = await world.owner("a")
    exchange = a.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key="k")
    job = await world.job()
    job.open()
    b = await world.node("b", keep_alive_s=1e6)
    job.serve(IDS[:6], finish=None)
    resumed = b.call("GET", f"/v1/requests/{job.id}/events")
    await resumed.events_until(2)

    def take(log, record):
        raise RuntimeError("a defect")

    fine, b.edge.following._take = b.edge.following._take, take
    job.serve(IDS[:7], start=6, finish=None)
    await resumed.done()
    assert not resumed.body.endswith(b"data: [DONE]\n\n")
    assert (await b.call("GET", f"/v1/requests/{job.id}").done()).status == 503
    b.edge.following._take = fine
    job.serve(IDS, start=7)
    again = b.call("GET", f"/v1/requests/{job.id}/events")
    assert (await again.done()).events == (await exchange.done()).events


def test_so_many_requests_of_other_edges_are_followed_and_the_next_is_asked_to_come_back(monkeypatch):
    monkeypatch.setattr("services.stream_out.following.MAX_READERS", 2)

    @scenario
    async def live(world):
        a = await world.owner("a")
        exchange = a.call("POST", "/v1/completions", COMPLETION | {"stream": True})
        job = await world.job()
        job.open()
        b = await world.node("b")
        first, second = (b.call("GET", f"/v1/requests/{job.id}/events") for _ in range(2))
        job.serve(IDS[:6], finish=None)
        for resumed in (first, second):
            await resumed.events_until(2)
        refused = await b.call("GET", f"/v1/requests/{job.id}").done()
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        first.leave()
        await asyncio.sleep(1)
        assert (await b.call("GET", f"/v1/requests/{job.id}").done()).status == 200
        job.serve(IDS, start=6)
        assert (await second.done()).events == (await exchange.done()).events

    live()


@scenario
async def test_clients_of_a_lost_partition_are_served_on(world):
    """Twelve requests at an edge that gives half of its partitions to a second one, and gets them back."""
    a = await world.owner("a")
    exchanges = []
    jobs = []
    for _ in range(12):
        exchanges.append(a.call("POST", "/v1/completions", COMPLETION | {"stream": len(jobs) % 2 == 0}))
        jobs.append(await world.job())
        jobs[-1].open()
        jobs[-1].serve(IDS[:3], finish=None)
    b = await world.node("b")
    await asyncio.sleep(5)
    assert len(a.edge.owned_partitions) == 8
    for job in jobs[:6]:
        job.serve(IDS, start=3)
    for exchange in exchanges[:6]:
        await exchange.done()
    b.kill()
    for job in jobs[6:9]:
        job.serve(IDS, start=3)
    await asyncio.sleep(5)
    assert len(a.edge.owned_partitions) == 16
    for job in jobs[9:]:
        job.serve(IDS, start=3)
    for exchange in exchanges:
        await exchange.done()
    for exchange in exchanges[::2]:
        assert texts(exchange.events) == TEXT
        assert exchange.events[-1][1] == "[DONE]"
    for exchange in exchanges[1::2]:
        assert json.loads(exchange.body)["choices"][0]["text"] == TEXT
    await asyncio.sleep(3)
    assert sorted(result.request_id for result in world.results()) == sorted(job.id for job in jobs)
    assert not any(world.story(job.id, Cut) for job in jobs)


@scenario
async def test_a_take_over_begins_where_the_oldest_local_client_needs_it(world):
    """The request ended and its result stands, all below the commit, before this edge has read its end."""
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    job.open()
    job.serve(IDS[:3], finish=None)
    await exchange.events_until(1)
    partition = partition_of(job.id)
    end = world.log.end_offset("stream-out", partition)
    edge.edge._prepared.append(TakeOver(partition, end, end, {job.id: Done(0, None)}, 1))
    await asyncio.sleep(1)
    assert edge.edge._partitions[partition].log.start == 0
    job.serve(IDS, start=3)
    await exchange.done()
    assert texts(exchange.events) == TEXT
    await asyncio.sleep(1)
    assert not world.results()


@scenario
async def test_a_take_over_misses_nothing_of_a_request_that_a_local_client_waits_for(world):
    """The edge read nothing for a while; meanwhile the request was served whole, and another owner committed."""
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION)
    job = await world.job()
    edge.bus.can_read = False
    job.open()
    job.serve()
    partition = partition_of(job.id)
    end = world.log.end_offset("stream-out", partition)
    edge.edge._prepared.append(TakeOver(partition, end, end, {job.id: Done(0, None)}, 1))
    await asyncio.sleep(1)
    edge.bus.can_read = True
    assert (await exchange.json())["choices"][0]["text"] == TEXT
    assert not world.results()


@scenario
async def test_what_is_read_of_requests_below_the_commit_is_nobodys_duty(world):
    """A local client needs old records; those of an ended request tell only its end, or what came behind that."""
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    partition = partition_of(job.id)
    job.open()
    job.serve(IDS[:3], finish=None)
    await exchange.events_until(1)
    others = [name for number in range(200) if partition_of(name := RequestId(f"other{number}")) == partition][:2]
    await asyncio.sleep(1)
    edge.bus.can_read = False
    world.write(Cut(others[0], 0, 2, "deadline", FinishReason.EXPIRED))
    for epoch in (1, 2):
        placement = PlacementId(f"p{epoch}")
        world.write(Open(others[1], 0, epoch, placement, PREFILL, DECODE, job.view if epoch == 1 else None))
        world.write(Cut(others[1], 0, epoch + 1, "drain"))
    end = world.log.end_offset("stream-out", partition)
    edge.edge._prepared.append(TakeOver(partition, end, end, {}, 0))
    await asyncio.sleep(0.5)
    edge.bus.can_read = True
    await asyncio.sleep(2)
    world.write(Cut(others[1], 0, 4, "drain"))
    job.serve(IDS, start=3)
    await exchange.done()
    assert texts(exchange.events) == TEXT
    await asyncio.sleep(10)
    assert not world.results()
    assert not world.log.records("ingest-resume", partition)
    assert world.log.committed("stream-out", "stream-out", partition).offset >= end
    assert not edge.edge._partitions[partition].log.fold.requests


@scenario
async def test_a_partition_that_is_read_for_a_client_alone_keeps_nothing_else(world):
    first = await world.owner("a")
    exchange = first.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    job.open()
    await world.node("b")
    await asyncio.sleep(5)
    partition = partition_of(job.id)
    if partition in first.edge.owned_partitions:
        first.edge._leased -= {partition}
        first.edge._partitions[partition].owner = None
        first.state.cut_off = True
    names = [name for number in range(200) if partition_of(name := RequestId(f"other{number}")) == partition]
    for name in names:
        world.write(Open(name, 0, 1, PlacementId(name), PREFILL, DECODE, job.view))
        world.write(Cut(name, 0, 2, "deadline", FinishReason.EXPIRED))
    await asyncio.sleep(2)
    assert list(first.edge._partitions[partition].log.stories) == [job.id]
    job.serve()
    await exchange.done()
    assert texts(exchange.events) == TEXT


@scenario
async def test_who_comes_back_before_the_open_and_leaves_again_leaves_nothing(world):
    first, second = await world.owner("a"), await world.owner("b")
    first.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    await asyncio.sleep(0.1)
    for node in (first, second):
        await asyncio.sleep(0.5)
        num_tasks = len(asyncio.all_tasks())
        for _ in range(5):
            again = node.call("GET", f"/v1/requests/{job.id}/events")
            await asyncio.sleep(0.1)
            again.leave()
            await again.done()
        await asyncio.sleep(0.5)
        assert len(asyncio.all_tasks()) <= num_tasks + 1
    job.open()
    job.serve()
    await world.result(job.id)


@scenario
async def test_delete_before_the_open_at_work_and_after(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION)
    job = await world.job()
    await asyncio.sleep(0.1)
    deleted = edge.call("DELETE", f"/v1/requests/{job.id}")
    assert await deleted.json() == {"id": job.id, "status": "cancelled"}
    assert (await exchange.done()).status == 499
    job.open()
    await asyncio.sleep(1)
    assert set(world.stops()) == {
        ("prefill", PREFILL.slot),
        ("decode", PREFILL.slot),
        ("prefill", DECODE.slot),
        ("decode", DECODE.slot),
    }
    assert (await world.result(job.id)).error.message == "the request was cancelled: client asked"

    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True, "n": 2})
    job = await world.job()
    job.open()
    job.serve(IDS[:3], finish=None)
    job.serve(choice=1)
    await exchange.events_until(2)
    assert (await edge.call("DELETE", f"/v1/requests/{job.id}").json())["status"] == "cancelled"
    await exchange.done()
    assert json.loads(exchange.events[-1][1])["error"]["code"] == "request_cancelled"
    assert (await world.result(job.id)).status == "cancelled"

    exchange = edge.call("POST", "/v1/completions", COMPLETION)
    job = await world.job()
    job.open()
    job.serve()
    await exchange.done()
    assert (await edge.call("DELETE", f"/v1/requests/{job.id}").json())["status"] == "completed"
    assert len(world.results()) == 3


@scenario
async def test_a_cancel_that_lost_its_race_looks_again(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    await asyncio.sleep(0.1)
    # Written before the edge can have read it: the drain's cut wins the epoch that the cancel aims at.
    world.write(Cut(job.id, 0, 2, "drain"))
    deleted = edge.call("DELETE", f"/v1/requests/{job.id}")
    assert (await deleted.json())["status"] == "cancelled"
    cuts = [(cut.epoch, cut.outcome) for cut in world.story(job.id, Cut)]
    assert cuts[0] == (2, None)
    assert cuts[-1] == (3, FinishReason.CANCELLED), cuts


@scenario
async def test_a_client_that_is_gone_is_waited_for_and_then_cancelled(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    await asyncio.sleep(0.1)
    exchange.leave()
    await exchange.task
    await asyncio.sleep(20)
    assert not world.story(job.id, Cut)
    job.open()
    await asyncio.sleep(4)
    assert len(world.story(job.id, Detach)) == 1
    assert not world.story(job.id, Cut)
    await asyncio.sleep(2.5)
    cut = world.story(job.id, Cut)[0]
    assert (cut.outcome, cut.reason) == (FinishReason.CANCELLED, "client gone")
    assert (await world.result(job.id)).status == "cancelled"
    job.frame(0, IDS[:1])
    await asyncio.sleep(1)
    assert ("decode", DECODE.slot) in world.stops()
    assert edge.metric("baton_cuts_written_total", reason="client gone") == 1


@scenario
async def test_a_client_of_a_dead_edge_is_not_attached(world):
    a, b = await world.node("a"), await world.node("b")
    await asyncio.sleep(5)
    a.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    job = await world.job()
    job.open()
    await asyncio.sleep(0.5)
    a.kill()
    result = await world.result(job.id)
    assert result.status == "cancelled"
    assert len(b.edge.owned_partitions) == 16


@scenario
async def test_keyed_requests_and_kafka_jobs_need_nobody(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    assert HEADER_EDGE not in job.headers
    assert job.headers[HEADER_IDEMPOTENCY_KEY] == b"k"
    job.open()
    exchange.leave()
    await asyncio.sleep(60)
    job.serve()
    assert (await world.result(job.id)).status == "completed"


@scenario
async def test_a_passed_deadline_ends_the_request(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"n": 2}, x_baton_timeout_s="20")
    job = await world.job()
    job.open()
    job.serve(choice=1)
    await asyncio.sleep(19)
    assert not exchange.task.done()
    await exchange.done()
    assert exchange.status == 504
    assert [cut.choice for cut in world.story(job.id, Cut)] == [0]
    assert (await world.result(job.id)).status == "expired"


@scenario
async def test_a_deadline_passes_for_the_blind_too(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION, x_baton_timeout_s="20")
    job = await world.job()
    job.open()
    world.store.away = True
    await asyncio.sleep(19)
    assert not world.story(job.id, Cut)
    await asyncio.sleep(4)
    assert (await world.result(job.id)).status == "expired"


@scenario
async def test_a_key_meets_the_running_request_and_refuses_another_body(world):
    a, b = await world.node("a"), await world.node("b")
    await asyncio.sleep(5)
    for key in ("k1", "k2", "k3", "k4"):
        first = a.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key=key)
        job = await world.job()
        assert job.id == keyed_request_id("default", key)
        job.open()
        job.serve(IDS[:3], finish=None)
        await first.events_until(2)
        again = b.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key=key)
        other = b.call("POST", "/v1/completions", COMPLETION | {"n": 2}, idempotency_key=key)
        assert (await other.done()).status == 409
        assert (await other.json())["error"]["code"] == "idempotency_conflict"
        job.serve(IDS, start=3)
        assert (await first.done()).events == (await again.done()).events
        late = a.call("POST", "/v1/completions", COMPLETION | {"stream": True}, idempotency_key=key)
        assert (await late.done()).events == first.events
    assert sum(world.log.end_offset("ingest", p) for p in range(16)) == 4
    other_tenant = a.call("POST", "/v1/completions", COMPLETION, idempotency_key="k1", x_baton_tenant="t")
    assert (await world.job()).id == keyed_request_id("t", "k1")
    other_tenant.leave()


@scenario
async def test_void_frames_are_answered_by_one_stop_for_a_while(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    job.serve()
    await exchange.done()
    for _ in range(50):
        job.frame(0, IDS[:1], epoch=7)
    await asyncio.sleep(1)
    assert sorted(world.stops()) == [("decode", DECODE.slot), ("prefill", DECODE.slot)]
    await asyncio.sleep(10)
    job.frame(0, IDS[:1], epoch=7)
    await asyncio.sleep(1)
    assert len(world.stops()) == 4
    assert edge.metric("baton_stops_total") == 2


@scenario
async def test_a_record_that_nobody_understands_is_skipped(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION)
    job = await world.job()
    job.open()
    world.log.append("stream-out", partition_of(job.id), [Unsent(b"{}", None, (), 2, None)])
    job.serve()
    assert (await exchange.done()).status == 200
    assert edge.metric("baton_undecodable_records_total") == 1


@scenario
async def test_an_edge_that_leaves_hands_over_at_once(world):
    a = await world.owner("a")
    exchange = a.call("POST", "/v1/completions", COMPLETION, idempotency_key="k")
    job = await world.job()
    job.open()
    await asyncio.sleep(0.1)
    exchange.task.cancel()
    await asyncio.gather(exchange.task, return_exceptions=True)
    await world.close()
    b = await world.node("b")
    await asyncio.sleep(1)
    assert len(b.edge.owned_partitions) == 16
    job.serve()
    assert (await world.result(job.id)).status == "completed"


@scenario
async def test_a_stranger_on_results_keeps_no_edge_from_its_partitions(world):
    for partition in range(16):
        world.log.append("results", partition, [Unsent(b"?", b"\xff", (), 2, None)])
    a = await world.owner("a")
    assert len(a.edge.owned_partitions) == 16


@scenario
async def test_what_is_taken_over_and_not_read_yet_is_not_committed(world):
    a = await world.node("a")
    while not a.edge._prepared:
        await asyncio.sleep(0)
    a.bus.can_read = False
    await asyncio.sleep(3)
    a.bus.can_read = True
    await world.ready(a)
    assert len(a.edge.owned_partitions) == 16
