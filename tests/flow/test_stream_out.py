import asyncio
import json

from shared.request import FinishReason
from shared.wire.to_stream_out import ErrorBody
from tests.flow.edges import CHAT, COMPLETION, IDS, TEXT, TOKENISER, scenario, texts


@scenario
async def test_a_chat_streams(world):
    edge = await world.owner("a")
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    exchange = edge.call("POST", "/v1/chat/completions", body)
    job = await world.job()
    assert job.record.value == json.dumps(body).encode()
    assert exchange.status is None
    job.open()
    job.serve()
    await exchange.done()
    assert exchange.status == 200
    assert exchange.headers["content-type"].startswith("text/event-stream")
    assert exchange.headers["x-request-id"] == job.id
    assert texts(exchange.events) == TEXT
    ids, data = zip(*exchange.events, strict=True)
    assert data[-1] == "[DONE]"
    assert ids[-1] is None
    assert all(event_id.startswith(f"{job.id}:") for event_id in ids[:-1])
    usage = json.loads(data[-2])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(IDS)
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert usage["baton"]["request_id"] == job.id
    assert set(usage["baton"]["timings"]) == {"accepted", "admitted", "placed", "first_token", "finished"}
    first, *_, finish = (json.loads(part) for part in data[:-2])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert finish["choices"][0]["finish_reason"] == "stop"


@scenario
async def test_two_choices_with_logprobs_in_both_shapes(world):
    edge = await world.owner("a")
    for path, body in (
        ("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", COMPLETION | {"n": 2, "logprobs": 2}),
    ):
        for stream in (False, True):
            exchange = edge.call("POST", path, body | {"stream": stream})
            job = await world.job()
            job.open()
            job.serve(IDS[:4], choice=1, finish=FinishReason.LENGTH)
            job.serve(IDS)
            await exchange.done()
            assert exchange.status == 200
            if stream:
                assert texts(exchange.events, 0) == TEXT
                assert texts(exchange.events, 1).startswith("Hello")
                choices = [json.loads(data)["choices"][0] for _, data in exchange.events[:-1]]
                lines = [c["logprobs"] for c in choices if c["index"] == 0 and c["logprobs"]]
                num_lines = sum(len(line.get("content") or line.get("tokens")) for line in lines)
                assert num_lines == len(IDS)
            else:
                answer = await exchange.json()
                assert [c["finish_reason"] for c in answer["choices"]] == ["stop", "length"]
                choice = answer["choices"][0]
                assert (choice["text"] if "text" in choice else choice["message"]["content"]) == TEXT
                assert len(choice["logprobs"].get("content") or choice["logprobs"]["tokens"]) == len(IDS)
                assert answer["usage"]["completion_tokens"] == len(IDS) + 4
                assert answer["baton"]["request_id"] == job.id


@scenario
async def test_text_ends_before_the_stop_string_and_never_shows_half_a_character(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True, "stop": " said"})
    job = await world.job()
    job.open()
    job.serve()
    await exchange.done()
    assert texts(exchange.events) == TEXT[: TEXT.index(" said")]
    assert "\ufffd" not in exchange.body.decode()


@scenario
async def test_the_answer_is_also_the_result(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/chat/completions", CHAT, x_baton_tenant="t")
    job = await world.job()
    job.open()
    job.serve()
    answer = await exchange.json()
    result = await world.result(job.id)
    assert result.status == "completed"
    assert result.tenant == "t"
    assert result.response == answer
    assert result.body_hash == job.view.body_hash
    lines = [entry for entry in edge.log.entries if entry["event"] == "request ended"]
    assert [line["request_id"] for line in lines] == [job.id]
    assert lines[0]["answer_tokens"] == len(IDS)
    assert "delivered" in lines[0]["timings"]
    assert "Hello" not in str(lines)


@scenario
async def test_a_refusal_by_ingest_is_an_http_error(world):
    edge = await world.owner("a")
    for stream in (False, True):
        exchange = edge.call("POST", "/v1/chat/completions", CHAT | {"stream": stream})
        job = await world.job()
        error = ErrorBody("too long", "invalid_request_error", 400, "messages", "context_length_exceeded")
        job.refuse(error)
        assert await exchange.json() == {
            "error": {
                "message": "too long",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        }
        assert exchange.status == 400
        assert (await world.result(job.id)).status == "rejected"
    exchange = edge.call("POST", "/v1/completions", COMPLETION)
    job = await world.job()
    job.refuse(ErrorBody("full", "server_error", 503, code="overloaded", retry_after_s=7))
    await exchange.done()
    assert (exchange.status, exchange.headers["retry-after"]) == (503, "7")


@scenario
async def test_without_a_word_from_ingest_the_stream_begins_after_a_while(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/chat/completions", CHAT | {"stream": True})
    started_s = world.clock_s()
    job = await world.job()
    await exchange.until(lambda: exchange.status)
    assert 5 <= world.clock_s() - started_s < 5.1
    await exchange.until(lambda: b": keep-alive" in exchange.body)
    job.refuse(ErrorBody("late", "server_error", 503))
    await exchange.done()
    assert exchange.events[-1][1].startswith('{"error":{"message":"late"')


@scenario
async def test_a_failure_in_mid_stream_is_an_error_event_and_no_good_end(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/chat/completions", CHAT | {"stream": True, "n": 2})
    job = await world.job()
    job.open()
    job.frame(0, IDS[:3])
    job.frame(3, (), finish=FinishReason.FAILED, error=ErrorBody("NaN", "server_error", 500))
    await exchange.until(lambda: b"Hello" in exchange.body)
    job.serve(IDS[:5], choice=1)
    await exchange.done()
    datas = [data for _, data in exchange.events]
    assert json.loads(datas[-1])["error"]["message"] == "NaN"
    assert "[DONE]" not in datas
    assert texts(exchange.events, 1) == TOKENISER.decode(IDS[:5])
    assert (await world.result(job.id)).status == "failed"


@scenario
async def test_bad_bodies_are_refused_at_once(world):
    edge = await world.owner("a")
    cases = [
        (b"{", 400, None),
        (b"[]", 400, None),
        (json.dumps({"model": "tiny"}).encode(), 400, "messages"),
        (json.dumps(CHAT | {"temperature": "hot"}).encode(), 400, "temperature"),
        (json.dumps(CHAT | {"tools": [{}]}).encode(), 400, "tools"),
        (json.dumps(CHAT | {"max_tokens": 0}).encode(), 400, "max_tokens"),
    ]
    for body, status, param in cases:
        exchange = edge.call("POST", "/v1/chat/completions", body)
        error = (await exchange.json())["error"]
        assert (exchange.status, error["param"]) == (status, param)
        assert error["type"] == "invalid_request_error"
    assert not any(world.log.end_offset("ingest", p) for p in range(16))


@scenario
async def test_a_large_body_is_refused_without_being_read(world):
    edge = await world.owner("a")
    part = b" " * 65536
    for headers in ({}, {"content_length": str(32 * 65536)}):
        exchange = edge.call("POST", "/v1/completions", [part] * 32, **headers)
        error = (await exchange.json())["error"]
        assert exchange.status == 413
        assert error["code"] == "request_too_large"
        assert "1000000" in error["message"]
        assert exchange.num_body_parts_asked <= 16


@scenario
async def test_wrong_headers_are_refused(world):
    edge = await world.owner("a")
    for headers in (
        {"x_baton_timeout_s": "soon"},
        {"x_baton_timeout_s": "nan"},
        {"x_baton_timeout_s": "999999"},
        {"idempotency_key": "k" * 300},
        {"last_event_id": "nonsense"},
    ):
        exchange = await edge.call("POST", "/v1/completions", COMPLETION, **headers).done()
        assert exchange.status == 400, headers


@scenario
async def test_unknown_fields_are_counted_and_nothing_else(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/completions", COMPLETION | {"flavour": 1, "colour": 2})
    await world.job()
    assert edge.metric("baton_edge_unknown_fields_total") == 2


@scenario
async def test_unknown_paths_answer_in_the_same_shape(world):
    edge = await world.owner("a")
    for method, path in (("GET", "/v1/nothing"), ("GET", "/v1/completions"), ("GET", "/v1/requests/no-such")):
        exchange = edge.call(method, path)
        assert "message" in (await exchange.json())["error"]
        assert exchange.status == 404
    assert (await edge.call("GET", "/v1/requests/no-such/events").done()).status == 404
    assert (await edge.call("GET", "/v1/requests/no-such/placement").done()).status == 404
    assert (await edge.call("DELETE", "/v1/requests/no-such").done()).status == 404


@scenario
async def test_a_request_tells_where_it_is(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/chat/completions", CHAT | {"stream": True})
    job = await world.job()
    await asyncio.sleep(0.1)
    path = f"/v1/requests/{job.id}"
    assert (await edge.call("GET", path).json())["status"] == "queued"
    job.open()
    job.frame(0, IDS[:3])
    await asyncio.sleep(0.1)
    state = await edge.call("GET", path).json()
    assert (state["status"], state["last_event"]) == ("running", "placed")
    assert state["usage"]["completion_tokens"] == 3
    job.serve(IDS)
    await asyncio.sleep(0.1)
    state = await edge.call("GET", path).json()
    assert (state["status"], state["last_event"]) == ("completed", "finished")
    assert state["choices"] == [{"index": 0, "completion_tokens": len(IDS), "finish_reason": "stop"}]


@scenario
async def test_a_request_that_is_not_placed_yet_has_no_placement_and_an_old_one_no_reason(world):
    edge = await world.owner("a")
    edge.call("POST", "/v1/chat/completions", CHAT | {"stream": True})
    job = await world.job()
    await asyncio.sleep(0.1)
    path = f"/v1/requests/{job.id}/placement"
    nothing = {"id": job.id, "object": "baton.placement", "placements": []}
    assert await edge.call("GET", path).json() == nothing
    job.open()
    await asyncio.sleep(0.1)
    (placed,) = (await edge.call("GET", path).json())["placements"]
    assert (placed["index"], placed["epoch"], placed["explanation"]) == (0, 1, None)


@scenario
async def test_models_are_those_of_live_workers(world):
    edge = await world.owner("a")
    assert [model["id"] for model in (await edge.call("GET", "/v1/models").json())["data"]] == ["tiny"]
    world.workers = []
    assert (await edge.call("GET", "/v1/models").json())["data"] == []
    assert (await edge.call("GET", "/v1/models/tiny").done()).status == 404
    world.store.away = True
    exchange = await edge.call("GET", "/v1/models").done()
    assert exchange.status == 503


@scenario
async def test_a_log_that_is_away_is_answered_with_503(world):
    edge = await world.owner("a")
    edge.bus.can_send = False
    exchange = await edge.call("POST", "/v1/completions", COMPLETION).done()
    assert exchange.status == 503
    assert exchange.headers["retry-after"] == "2"
    edge.bus.can_read = False
    await asyncio.sleep(3)
    began_s = world.clock_s()
    asked = await edge.call("GET", "/v1/requests/req-somebodys").done()
    assert (asked.status, asked.headers["retry-after"]) == (503, "2")
    assert world.clock_s() - began_s < 0.1


@scenario
async def test_a_slow_client_holds_nobody_up(world):
    edge = await world.owner("a")
    slow = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    first = await world.job()
    slow.reading.clear()
    first.open()
    first.serve()
    quick = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
    second = await world.job()
    second.open()
    second.serve()
    await quick.done()
    await world.result(first.id)
    await asyncio.sleep(200)
    assert not slow.task.done()
    slow.reading.set()
    await slow.done()
    assert texts(slow.events) == texts(quick.events) == TEXT


@scenario
async def test_nothing_is_kept_of_requests_that_are_over(world):
    edge = await world.owner("a")
    for _ in range(20):
        exchange = edge.call("POST", "/v1/completions", COMPLETION | {"stream": True})
        job = await world.job()
        job.open()
        job.serve()
        await exchange.done()
    await asyncio.sleep(500)
    for found in edge.edge._partitions.values():
        assert not found.log.stories
        assert not found.log.fold.requests
        assert not found.log.fold._forgotten
        assert not found.owner._acked
    assert not edge.edge._background


@scenario
async def test_a_failure_of_ours_has_the_same_shape(world):
    edge = await world.owner("a")

    async def fail(**_):
        raise RuntimeError("a bug")

    edge.state.workers = fail
    exchange = edge.call("GET", "/v1/models")
    assert (await exchange.json())["error"]["code"] == "internal_error"
    assert exchange.status == 500
    assert "a bug" not in exchange.body.decode()
    assert any(entry["event"] == "route failed" for entry in edge.log.entries)


@scenario
async def test_a_client_that_leaves_before_its_body_came_is_no_failure(world):
    edge = await world.owner("a")
    exchange = edge.call("POST", "/v1/completions", [b"{", b""], content_length="5000")
    exchange._parts = []
    exchange.leave()
    await exchange.done()
    assert exchange.status is None
    assert edge.metric("baton_clients_gone_total") == 1
