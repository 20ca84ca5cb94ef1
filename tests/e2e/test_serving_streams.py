"""A stream goes on wherever it was cut; what is cancelled ends, once, and leaves no page behind."""

import asyncio
import signal
from contextlib import asynccontextmanager

import httpx
import pytest
import pytest_asyncio

from shared.request import keyed_request_id
from tests.e2e.stack import MODEL, TIMEOUT_S, Event, NotDone, Serving, events_of, text_of, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORY = {
    "model": MODEL,
    "prompt": "Once upon a time",
    "temperature": 0.8,
    "seed": 3,
    "ignore_eos": True,
    "logprobs": 0,
}
STREAM = STORY | {"stream": True}


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _all_ready(serving):
    """A test before may have killed an edge and failed."""
    await serving.all_ready()


@asynccontextmanager
async def streaming(serving: Serving, edge: int, **body):
    """(request id, events) of a stream; leaving it hangs up."""
    url = f"{serving.edge(edge)}/v1/completions"
    async with serving.http.stream("POST", url, json=STREAM | body) as response:
        assert response.status_code == 200
        yield response.headers["x-request-id"], events_of(response)


async def take(events, num: int) -> list[Event]:
    return [await anext(events) for _ in range(num)]


async def until(error: type[Exception], events) -> list[Event]:
    """What comes before the stream ends with `error`."""
    told = []
    try:
        async for event in events:
            told.append(event)  # noqa: PERF401 - what came before the error counts
    except error:
        return told
    raise AssertionError(f"the stream ended without {error.__name__}")


async def resume(serving: Serving, edge: int, request_id: str, last: Event | None = None) -> list[Event]:
    """The events behind `last` to the end, from any edge, which may be about to start."""
    headers = {"last-event-id": last.id} if last is not None else {}
    url = f"{serving.edge(edge)}/v1/requests/{request_id}/events"
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                async with serving.http.stream("GET", url, headers=headers) as response:
                    if response.status_code == 200:
                        return [event async for event in events_of(response)]
                    assert response.status_code == 503, await response.aread()
            except httpx.TransportError:
                pass  # a killed edge, or one that does not listen yet
            await asyncio.sleep(0.1)


async def whole_tokens(serving: Serving, **body) -> list[str]:
    """The tokens of the same request, not streamed and not disturbed."""
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=STORY | body)
    return answer.json()["choices"][0]["logprobs"]["tokens"]


async def state_of(serving: Serving, request_id: str, edge: int = 0) -> dict:
    answer = await serving.http.get(f"{serving.edge(edge)}/v1/requests/{request_id}")
    return answer.json() | {"http_status": answer.status_code}


async def until_status(serving: Serving, request_id: str, status: str) -> dict:
    async with asyncio.timeout(TIMEOUT_S):
        while (state := await state_of(serving, request_id)).get("status") != status:
            await asyncio.sleep(0.1)
    return state


async def test_a_cut_stream_goes_on_at_another_edge(serving):
    async with streaming(serving, 0, max_tokens=10) as (request_id, events):
        before = await take(events, 3)
    behind = await resume(serving, 1, request_id, before[-1])
    told = before + behind
    assert told == await resume(serving, 0, request_id) == await resume(serving, 1, request_id)
    assert tokens_of(told) == await whole_tokens(serving, max_tokens=10)
    result = await serving.result_of(request_id)
    assert result["status"] == "completed"
    assert text_of(told) == result["response"]["choices"][0]["text"]


async def test_a_stream_is_taken_up_by_the_same_post_and_by_nobody_else(serving):
    body = STREAM | {"max_tokens": 6}
    async with streaming(serving, 0, max_tokens=6) as (request_id, events):
        (first,) = await take(events, 1)
        url, header = f"{serving.edge(1)}/v1/completions", {"last-event-id": first.id}
        async with serving.http.stream("POST", url, json=body, headers=header) as response:
            behind = [event async for event in events_of(response)]
        assert behind == [event async for event in events]
        other = await serving.http.post(url, json=body | {"max_tokens": 7}, headers=header)
        assert (other.status_code, other.json()["error"]["param"]) == (409, "Last-Event-ID")
    assert response.headers["x-request-id"] == request_id


async def test_two_choices_and_two_clients_at_once(serving):
    async with streaming(serving, 0, max_tokens=6, n=2) as (request_id, events):
        before = await take(events, 2)
        watched, here = await asyncio.gather(resume(serving, 1, request_id), rest_of(events))
    assert watched == before + here
    finished = [choice["index"] for event in watched for choice in event.data["choices"] if choice["finish_reason"]]
    assert sorted(finished) == [0, 1]


async def rest_of(events) -> list[Event]:
    return [event async for event in events]


async def test_a_killed_edge_loses_nothing_where_another_one_is(serving):
    async with streaming(serving, 0, max_tokens=16) as (request_id, events):
        before = await take(events, 3)
        serving.stack.send_signal("edge-0", signal.SIGKILL)
        before += await until(httpx.TransportError, events)
    told = before + await resume(serving, 1, request_id, before[-1])
    assert tokens_of(told) == await whole_after_restart(serving, max_tokens=16)
    result = await serving.result_of(request_id)
    assert text_of(told) == result["response"]["choices"][0]["text"]


async def whole_after_restart(serving: Serving, **body) -> list[str]:
    await serving.all_ready()
    return await whole_tokens(serving, **body)


async def test_all_edges_killed_and_others_started(serving):
    async with streaming(serving, 0, max_tokens=16) as (request_id, events):
        before = await take(events, 3)
        for name in ("edge-0", "edge-1"):
            serving.stack.send_signal(name, signal.SIGKILL)
        before += await until(httpx.TransportError, events)
    # The supervisor starts them again; until then the client only tries.
    told = before + await resume(serving, 1, request_id, before[-1])
    assert tokens_of(told) == await whole_after_restart(serving, max_tokens=16)
    assert told == await resume(serving, 0, request_id)
    result = await serving.result_of(request_id)
    assert result["status"] == "completed"
    assert text_of(told) == result["response"]["choices"][0]["text"]


async def test_delete_in_mid_stream_ends_it_for_all_and_frees_the_pages(serving):
    async with streaming(serving, 0, max_tokens=2000) as (request_id, events):
        await take(events, 2)
        running = await state_of(serving, request_id, edge=1)
        assert (running["status"], running["choices"][0]["finish_reason"]) == ("running", None)
        assert running["usage"]["completion_tokens"] >= 2
        answer = await serving.http.delete(f"{serving.edge(1)}/v1/requests/{request_id}")
        assert answer.json() == {"id": request_id, "status": "cancelled"}
        last = (await until(NotDone, events))[-1]
    assert last.data["error"]["code"] == "request_cancelled"
    for edge in (0, 1):
        assert (await state_of(serving, request_id, edge))["status"] == "cancelled"
    again = await serving.http.delete(f"{serving.edge(0)}/v1/requests/{request_id}")
    assert again.json()["status"] == "cancelled"
    result = await serving.result_of(request_id)
    assert (result["status"], result["error"]["code"]) == ("cancelled", "request_cancelled")
    await serving.pages_free()


async def test_a_client_that_leaves_for_good_cancels_its_request(serving):
    async with streaming(serving, 1, max_tokens=2000) as (request_id, events):
        await take(events, 1)
    state = await until_status(serving, request_id, "cancelled")
    assert state["reason"] == "client gone"
    assert (await serving.result_of(request_id))["status"] == "cancelled"
    await serving.pages_free()


async def test_a_request_tells_its_state_in_each_phase(serving):
    tenant, key = "phases", "one"
    request_id = keyed_request_id(tenant, key)
    headers = {"x-baton-tenant": tenant, "idempotency-key": key}
    url = f"{serving.edge()}/v1/completions"
    assert (await state_of(serving, request_id))["http_status"] == 404

    serving.stack.send_signal("ingest-0", signal.SIGSTOP)
    try:
        body = STORY | {"max_tokens": 4}
        waiting = asyncio.create_task(serving.http.post(url, json=body, headers=headers))
        cancelled_key = headers | {"idempotency-key": "two"}
        unwanted = asyncio.create_task(serving.http.post(url, json=body, headers=cancelled_key))
        cancelled_id = keyed_request_id(tenant, "two")
        for one in (request_id, cancelled_id):
            await until_status(serving, one, "queued")
        # Cancelled before ingest has seen it: ingest's work for it is void whenever it comes.
        answer = await serving.http.delete(f"{serving.edge()}/v1/requests/{cancelled_id}")
        assert answer.json()["status"] == "cancelled"
        refused = await asyncio.wait_for(unwanted, TIMEOUT_S)
        assert refused.json()["error"]["code"] == "request_cancelled"
    finally:
        serving.stack.send_signal("ingest-0", signal.SIGCONT)
    answer = await asyncio.wait_for(waiting, TIMEOUT_S)
    assert answer.status_code == 200
    state = await state_of(serving, request_id, edge=1)
    assert (state["status"], state["choices"][0]["finish_reason"]) == ("completed", "length")
    assert list(state["timings"]) == [
        *("accepted", "admitted", "placed", "prefilling", "first_token", "transferring", "decoding", "finished")
    ]
    assert list(state["timings"].values()) == sorted(state["timings"].values())
    again = await serving.http.post(url, json=body, headers=headers)
    assert again.json()["id"] == request_id
    assert again.json()["choices"] == answer.json()["choices"]
    assert (await serving.result_of(cancelled_id))["status"] == "cancelled"
    assert (await serving.result_of(request_id))["status"] == "completed"
    late = await serving.http.delete(f"{serving.edge()}/v1/requests/{request_id}")
    assert late.json()["status"] == "completed"
    await serving.pages_free()
