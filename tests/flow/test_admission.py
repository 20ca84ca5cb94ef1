"""What edges refuse and why, on the twins in virtual time: saturation, tenants' limits, clients at once, drain."""

import asyncio
import json
from dataclasses import replace

import pytest

from services.stream_out.tenants import Tenants, key_hash
from shared.policy.admission import BacklogReport, Outlook
from shared.request import FinishReason, Incarnation
from shared.state.keys import LEASE_MS
from shared.state.memory import MemoryState
from tests.flow.edges import CHAT, COMPLETION, IDS, TEXT, scenario, texts

STREAM = {**COMPLETION, "stream": True}
PATH = "/v1/completions"


class Ingest:
    """Says the same of its line, beat by beat."""

    def __init__(self, world, *, num_waiting, placed_per_s, oldest_wait_s=0.0, name="i") -> None:
        self.report = BacklogReport(num_waiting, oldest_wait_s, placed_per_s)
        self._state = MemoryState(world.store)
        self._name = Incarnation(name)
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while True:
            await self._state.report_backlog(self._name, self.report, lease_ms=LEASE_MS)
            await asyncio.sleep(0.5)


async def beats(num=3):
    await asyncio.sleep(num * 0.5)


def tenants_file(folder, **tenants):
    path = folder / "tenants.json"
    path.write_text(json.dumps({name: {"keys": [key_hash(name)], **may} for name, may in tenants.items()}))
    return Tenants(path)


def bearer(name):
    return {"Authorization": f"Bearer {name}"}


async def code(exchange):
    await exchange.done()
    return exchange.status, json.loads(exchange.body)["error"]["code"]


@scenario
async def test_what_would_wait_too_long_is_refused_at_once(world):
    node = await world.owner("e", max_queue_s=10)
    ingest = Ingest(world, num_waiting=60, placed_per_s=5.0)
    await beats()
    refused = node.call("POST", PATH, STREAM)
    assert await code(refused) == (503, "overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert not any(world.log.records("ingest", p) for p in range(16))
    assert node.metric("baton_edge_refused_total", reason="wait") == 1

    ingest.report = BacklogReport(40, 0.0, 5.0)
    await beats()
    taken = node.call("POST", PATH, STREAM)
    short = node.call("POST", PATH, STREAM, x_baton_timeout_s="10")
    assert await code(short) == (503, "overloaded"), "half of its time is for running"
    job = await world.job()
    job.open()
    job.serve()
    assert (await taken.done()).status == 200
    ingest.task.cancel()
    await beats(6)
    assert (await code(node.call("POST", PATH, {**STREAM, "n": 0})))[0] == 400
    node.call("POST", PATH, STREAM)
    await world.job()


@scenario
async def test_a_sudden_rush_between_two_beats_is_stopped_by_what_edges_count_themselves(world):
    first, second = await world.owner("e", max_queue_s=10), await world.owner("f", max_queue_s=10)
    Ingest(world, num_waiting=0, placed_per_s=5.0)
    await beats(8)
    exchanges = [node.call("POST", PATH, STREAM) for _ in range(100) for node in (first, second)]
    await asyncio.sleep(0.2)
    assert len([each for each in exchanges if each.task.done()]) in range(120, 200)
    num_accepted = sum(len(world.log.records("ingest", p)) for p in range(16))
    assert num_accepted in range(40, 61), "5 a second for 10 s, for both together"


@scenario
async def test_who_goes_before_others_is_not_refused_for_their_line_and_batch_for_none(world):
    node = await world.owner("e", max_queue_s=10)
    ingest = Ingest(world, num_waiting=600, placed_per_s=5.0)
    ingest.report = replace(ingest.report, num_standard=580, oldest_batch_wait_s=100.0)
    await beats()
    assert await code(node.call("POST", PATH, STREAM)) == (503, "overloaded")
    for priority in ("interactive", "batch"):
        node.call("POST", PATH, STREAM, x_baton_priority=priority)
        await world.job()
    hasty = node.call("POST", PATH, STREAM, x_baton_priority="batch", x_baton_timeout_s="150")
    assert await code(hasty) == (503, "overloaded"), "the first of its class has waited for longer than it may"


@scenario
async def test_a_rush_is_stopped_by_what_decode_will_have_room_for(world):
    """No line yet, so no pace of it: 20 fit, and 5 a second come to an end."""
    node = await world.owner("e", max_queue_s=10)
    ingest = Ingest(world, num_waiting=0, placed_per_s=None)
    ingest.report = replace(ingest.report, outlook=Outlook(20.0, 5.0, 0.0, 0.03, 0.01, 100.0))
    await beats(8)
    exchanges = [node.call("POST", PATH, STREAM) for _ in range(120)]
    await asyncio.sleep(0.2)
    refused = [each for each in exchanges if each.task.done()]
    assert len(refused) in range(48, 52)
    for each in refused:
        assert await code(each) == (503, "overloaded")


@scenario
async def test_an_answer_that_decode_would_make_too_late_is_refused_at_once(world):
    node = await world.owner("e", max_queue_s=10)
    ingest = Ingest(world, num_waiting=0, placed_per_s=None)
    ingest.report = replace(ingest.report, outlook=Outlook(20.0, 5.0, 0.0, 0.03, 0.01, 100.0))
    await beats()
    late = node.call("POST", PATH, {**STREAM, "max_tokens": 90}, x_baton_timeout_s="2.5")
    assert await code(late) == (503, "overloaded")
    assert node.metric("baton_edge_refused_total", reason="run") == 1
    node.call("POST", PATH, {**STREAM, "max_tokens": 80}, x_baton_timeout_s="2.5")
    await world.job()


@scenario
async def test_while_redis_is_away_nobody_is_refused_and_health_says_so(world):
    node = await world.owner("e", max_queue_s=10)
    Ingest(world, num_waiting=600, placed_per_s=5.0)
    await beats()
    world.store.away = True
    await beats(8)
    assert node.edge.health()["status"] == "degraded"
    node.call("POST", PATH, STREAM)
    await world.job()
    assert node.metric("baton_edge_unlimited_total") >= 1


@scenario
async def test_so_many_clients_at_once_and_no_more(world):
    node = await world.owner("e", max_streams=2)
    served = [node.call("POST", PATH, STREAM), node.call("POST", PATH, COMPLETION)]
    jobs = [await world.job(), await world.job()]
    assert await code(node.call("POST", PATH, STREAM)) == (503, "overloaded")
    assert await code(node.call("GET", f"/v1/requests/{jobs[0].id}/events")) == (503, "overloaded")
    assert (await node.call("GET", f"/v1/requests/{jobs[0].id}").done()).status == 200, "it costs nothing"
    for job in jobs:
        job.open()
        job.serve()
    for exchange in served:
        assert (await exchange.done()).status == 200
    node.call("POST", PATH, STREAM)
    await world.job()


def with_keys(work):
    """A scenario with the tenants of a file."""

    def test(tmp_path):
        async def live(world):
            await work(world, tmp_path)

        scenario(live)()

    test.__name__ = work.__name__
    return test


@with_keys
async def test_only_who_has_a_key_comes_in(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={"models": ["tiny"]}, rival={})
    for method, path, body in (
        ("POST", PATH, STREAM),
        ("POST", "/v1/chat/completions", CHAT),
        ("GET", "/v1/models", b""),
        ("GET", "/v1/models/tiny", b""),
        ("GET", "/v1/requests/r", b""),
        ("DELETE", "/v1/requests/r", b""),
        ("GET", "/v1/requests/r/events", b""),
        ("GET", "/v1/requests/r/placement", b""),
    ):
        nobody = node.call(method, path, body, Authorization="Bearer stranger")
        assert await code(nobody) == (401, "invalid_api_key"), path
        assert nobody.headers["www-authenticate"] == "Bearer"
    refused = node.call("POST", PATH, STREAM, x_baton_tenant="rival", **bearer("acme"))
    assert (await refused.json())["error"]["param"] == "x-baton-tenant"
    refused = node.call("POST", PATH, {**STREAM, "model": "other"}, **bearer("acme"))
    assert await code(refused) == (403, "model_not_allowed")
    node.call("POST", PATH, STREAM, **bearer("acme"))
    assert (await world.job()).headers["tenant"] == b"acme"


@with_keys
async def test_another_tenants_request_is_not_there(world, folder):
    node, other = await world.owner("e"), await world.owner("f")
    node.edge.tenants = other.edge.tenants = tenants_file(folder, acme={}, rival={})
    stream = node.call("POST", PATH, STREAM, **bearer("acme"))
    job = await world.job()

    async def nowhere(name):
        for edge in (node, other):
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/placement")):
                gone = edge.call(method, f"/v1/requests/{job.id}{path}", **bearer(name))
                assert await code(gone) == (404, "request_not_found")
            resumed = edge.call("POST", PATH, STREAM, Last_Event_ID=f"{job.id}:0.0", **bearer(name))
            assert await code(resumed) == (404, "request_not_found")

    await beats(1)
    await nowhere("rival")
    for edge in (node, other):
        mine = await edge.call("GET", f"/v1/requests/{job.id}", **bearer("acme")).json()
        assert mine["status"] == "queued", "no record yet, and known on every edge"
    job.open()
    await beats(1)
    await nowhere("rival")
    job.serve()
    assert (await stream.done()).status == 200
    await nowhere("rival")


@with_keys
async def test_two_edges_share_a_tenants_limits_and_the_owner_gives_places_back(world, folder):
    nodes = [await world.owner("e"), await world.owner("f")]
    tenants = tenants_file(folder, acme={"max_concurrent": 2, "tokens_per_minute": 10_000}, rival={})
    for node in nodes:
        node.edge.tenants = tenants
    body = {**STREAM, "max_tokens": 1000}
    streams = [node.call("POST", PATH, body, **bearer("acme")) for node in nodes]
    jobs = [await world.job(), await world.job()]
    for node in nodes:
        refused = node.call("POST", PATH, body, **bearer("acme"))
        assert await code(refused) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["x-ratelimit-remaining-tokens"]) in range(7900, 8100)
    nodes[0].call("POST", PATH, body, **bearer("rival"))
    await world.job()

    nodes[0].kill()  # the edge that took one of them on is dead: the owner ends it all the same
    for job in jobs:
        job.open()
        job.serve()
        await world.result(job.id)
    assert (await streams[1].done()).status == 200
    again = nodes[1].call("POST", PATH, body, **bearer("acme"))
    job = await world.job()
    job.open()
    job.serve()
    assert (await again.done()).status == 200
    assert again.headers["x-ratelimit-limit-tokens"] == "10000"
    assert int(again.headers["x-ratelimit-remaining-tokens"]) > 8900, "what was not used was given back"


@with_keys
async def test_requests_that_are_refused_later_give_their_places_back(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={"max_concurrent": 1})
    for _ in range(3):
        stream = node.call("POST", PATH, STREAM, **bearer("acme"))
        job = await world.job()
        cancelled = await node.call("DELETE", f"/v1/requests/{job.id}", **bearer("acme")).json()
        assert cancelled["status"] == "cancelled"
        await stream.done()
        await world.result(job.id)


@with_keys
async def test_who_follows_one_request_many_times_does_not_take_the_places_of_others(world, folder):
    node = await world.owner("e", max_streams=8)
    node.edge.tenants = tenants_file(folder, acme={"max_concurrent": 1}, rival={})
    node.call("POST", PATH, STREAM, **bearer("acme"))
    job = await world.job()
    job.open()
    looks = [node.call("GET", f"/v1/requests/{job.id}/events", **bearer("acme")) for _ in range(10)]
    await beats(1)
    refused = [each for each in looks if each.task.done()]
    assert len(refused) == 7, "four clients for each request that may run"
    for each in refused:
        assert await code(each) == (429, "rate_limit_exceeded")
        assert each.headers["retry-after"] == "1"
    node.call("POST", PATH, STREAM, **bearer("rival"))
    await world.job()
    job.serve()
    for each in looks:
        await each.done()
    node.call("POST", PATH, STREAM, **bearer("acme"))
    await world.job()


@scenario
async def test_a_request_says_how_urgent_it_is(world):
    node = await world.owner("e")
    for priority in ("interactive", "batch"):
        node.call("POST", PATH, STREAM, x_baton_priority=priority)
        assert (await world.job()).headers["priority"] == priority.encode()
    for headers in ({}, {"x_baton_priority": "standard"}):
        node.call("POST", PATH, STREAM, **headers)
        assert "priority" not in (await world.job()).headers
    refused = node.call("POST", PATH, STREAM, x_baton_priority="urgent")
    error = (await refused.json())["error"]
    assert (refused.status, error["param"]) == (400, "x-baton-priority")
    assert "interactive, standard, batch" in error["message"]


@scenario
async def test_a_name_that_is_none_reaches_neither_log_nor_store(world):
    node = await world.owner("e")
    for name in ("two words", "", "t" * 65, "}:places:rival"):
        refused = node.call("POST", PATH, STREAM, x_baton_tenant=name)
        assert (await refused.json())["error"]["param"] == "x-baton-tenant"
        assert refused.status == 400
    assert not world.store.contents.places


@with_keys
async def test_health_says_that_a_changed_file_of_tenants_cannot_be_read(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={})
    await beats(1)
    assert (node.edge.health(), node.metric("baton_edge_tenants_outdated")) == ({}, 0)
    (folder / "tenants.json").write_text('{"acme": ')
    await beats(2)
    assert node.edge.health().keys() == {"status", "tenants"}
    assert node.metric("baton_edge_tenants_outdated") == 1


@with_keys
async def test_a_client_that_leaves_while_its_place_is_taken_keeps_none(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={"max_concurrent": 1})
    world.store.way_s = lambda: (0.02, 0.02)
    for wait_s in (0.01, 0.03):  # before the store hears of it, and before it answers
        leaves = node.call("POST", PATH, STREAM, **bearer("acme"))
        await asyncio.sleep(wait_s)
        leaves.leave()
        await beats(2)
    assert not any(world.log.records("ingest", p) for p in range(16))
    node.call("POST", PATH, STREAM, **bearer("acme"))
    await world.job()


@with_keys
async def test_a_client_that_leaves_while_its_job_is_written_leaves_nothing_running(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={"max_concurrent": 1})
    world.log.away = True
    leaves = node.call("POST", PATH, STREAM, **bearer("acme"))
    await asyncio.sleep(0.2)
    leaves.leave()
    await leaves.done()
    world.log.away = False
    job = await world.job()
    job.open()
    assert (await world.result(job.id)).status == "cancelled"
    node.call("POST", PATH, STREAM, **bearer("acme"))
    await world.job()


@with_keys
async def test_places_of_requests_that_end_while_redis_is_away_are_given_back_when_it_is_there(world, folder):
    node = await world.owner("e")
    node.edge.tenants = tenants_file(folder, acme={"max_concurrent": 3})
    for is_known in (False, True):  # by the edge, that the store is away
        for _ in range(3):
            node.call("POST", PATH, STREAM, **bearer("acme"))
        jobs = [await world.job() for _ in range(3)]
        world.store.away = True
        await beats(6 if is_known else 0)
        for job in jobs:
            job.open(note=False)
            job.serve()
            await world.result(job.id)
        await beats(6)
        world.store.away = False
        await beats()
    node.call("POST", PATH, STREAM, **bearer("acme"))
    await world.job()


@scenario
async def test_a_request_that_waits_is_known_on_every_edge(world):
    node, other = await world.owner("e"), await world.owner("f")
    stream = node.call("POST", PATH, STREAM)
    job = await world.job()
    await beats(1)
    assert (await other.call("GET", f"/v1/requests/{job.id}").json())["status"] == "queued"
    assert await code(other.call("GET", "/v1/requests/never-there")) == (404, "request_not_found")
    second = other.call("GET", f"/v1/requests/{job.id}/events")
    await beats(1)
    job.open()
    job.serve()
    assert (await second.done()).body == (await stream.done()).body


# Drain


@scenario
async def test_an_edge_that_drains_lets_answers_end_and_takes_nobody(world):
    node, other = await world.owner("e"), await world.owner("f")
    stream, whole = node.call("POST", PATH, STREAM), node.call("POST", PATH, COMPLETION)
    jobs = [await world.job(), await world.job()]
    for job in jobs:
        job.open()
    drain = asyncio.create_task(node.edge.admission.drain(30))
    await asyncio.sleep(0.1)
    ready = await node.call("GET", "/ready").done()
    assert (ready.status, (await ready.json())["accepting"]) == (503, False)
    assert await code(node.call("POST", PATH, STREAM)) == (503, "edge_draining")
    for job in jobs:
        job.serve()
    assert (await whole.done()).status == 200
    assert (await stream.done()).body.endswith(b"data: [DONE]\n\n")
    await drain
    other.call("POST", PATH, STREAM)
    await world.job()


@scenario
async def test_who_is_left_at_the_end_of_a_drain_goes_on_elsewhere(world):
    node, other = await world.owner("e"), await world.owner("f")
    stream, whole = node.call("POST", PATH, STREAM), node.call("POST", PATH, COMPLETION)
    jobs = {each.id: each for each in (await world.job(), await world.job())}
    for job in jobs.values():
        job.open()
        job.frame(0, IDS[:3])
    await stream.events_until(1)
    await node.edge.admission.drain(2)
    assert await code(whole) == (503, "edge_draining")
    await stream.done()
    assert b"[DONE]" not in stream.body, "no end: the client sees that there is more"
    last_id = stream.events[-1][0]
    job = jobs[last_id.partition(":")[0]]
    rest = other.call("GET", f"/v1/requests/{job.id}/events", Last_Event_ID=last_id)
    job.frame(3, IDS[3:6])
    job.frame(6, IDS[6:], finish=FinishReason.STOP)
    await rest.done()
    assert texts(stream.events + rest.events) == TEXT
    assert (await world.result(job.id)).status == "completed"


# Slow clients


@pytest.mark.parametrize("num_slow", [3])
def test_clients_that_read_nothing_hold_nobody_up_and_keep_one_piece_each(num_slow):
    @scenario
    async def work(world):
        node = await world.owner("e")
        slow = [node.call("POST", PATH, STREAM) for _ in range(num_slow)]
        for exchange in slow:
            exchange.reading.clear()
        slow_jobs = [await world.job() for _ in slow]
        quick = node.call("POST", PATH, STREAM)
        quick_job = await world.job()
        for job in (*slow_jobs, quick_job):
            job.open()
        ids = [400 + n % 50 for n in range(2000)]
        for job in (*slow_jobs, quick_job):
            job.serve(ids)
        assert (await quick.done()).body.endswith(b"data: [DONE]\n\n")
        for job in slow_jobs:
            await world.result(job.id)
        assert all(exchange.body == b"" for exchange in slow)
        await asyncio.sleep(300)  # long after all the ends
        for exchange in slow:
            exchange.reading.set()
            await exchange.done()
            assert texts(exchange.events) == texts(quick.events)

    work()
