"""Jobs that come straight by Kafka: each ends once on `results`; what is no job also stands on `dead-letter`."""

import asyncio
import json
import signal

import pytest

from shared.request import partition_of
from shared.wire.topics import INGEST
from tests.e2e.stack import LIMIT_TOKENS, MODEL

pytestmark = pytest.mark.asyncio(loop_scope="session")

JOB = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
CHAT_JOB = {"model": MODEL, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 3, "temperature": 0}


async def test_a_bare_producer_and_consumer_get_answers(serving):
    await serving.produce("kafka-completion", JOB, [("tenant", b"batch")])
    await serving.produce("kafka-chat", CHAT_JOB)
    over_http = (await serving.http.post(f"{serving.edge()}/v1/completions", json=JOB)).json()
    plain, chat = [await serving.result_of(key) for key in ("kafka-completion", "kafka-chat")]
    assert (plain["request_id"], plain["status"], plain["tenant"]) == ("kafka-completion", "completed", "batch")
    assert plain["response"]["choices"] == over_http["choices"]
    assert plain["response"]["usage"]["completion_tokens"] == 3
    assert chat["response"]["choices"][0]["message"]["content"] != ""
    assert next(iter(plain["timings"])) == "accepted"
    assert (await serving.result_of(over_http["id"]))["response"] == over_http
    state = await serving.http.get(f"{serving.edge()}/v1/requests/kafka-completion")
    assert state.json()["status"] == "completed"
    assert serving.dead_letters.under("kafka-completion") == []


async def test_a_job_that_is_written_twice_ends_once(serving):
    for _ in range(2):
        await serving.produce("kafka-twice", JOB)
    first = await serving.result_of("kafka-twice")
    await serving.produce("kafka-twice", JOB)
    # One more of the same partition ends behind all that the third one could cause.
    behind = next(key for n in range(10_000) if partition_of(key := f"behind-{n}") == partition_of("kafka-twice"))
    await serving.produce(behind, JOB)
    await serving.result_of(behind)
    assert await serving.result_of("kafka-twice") == first
    assert first["status"] == "completed"


async def test_a_job_may_be_cancelled_and_may_run_out_of_time(serving):
    await serving.produce("kafka-endless", JOB | {"max_tokens": 3000, "ignore_eos": True})
    async with asyncio.timeout(60):
        while (
            await serving.http.delete(f"{serving.edge()}/v1/requests/kafka-endless")
        ).status_code == 404:  # not read yet
            await asyncio.sleep(0.1)
    await serving.produce("kafka-late", JOB, [("deadline-unix-ms", b"1000")])
    assert (await serving.result_of("kafka-endless"))["status"] == "cancelled"
    late = await serving.result_of("kafka-late")
    assert (late["status"], late["error"]["code"]) == ("expired", "deadline_exceeded")
    await serving.pages_free()


BAD_JOBS = {
    "garbage": (b"\x00\xff\xfe garbage", [], None, "JSON"),
    "bad-json": (b'{"model": "smollm2", ', [], None, "JSON"),
    "no-object": (b"[1, 2]", [], None, "object"),
    "empty-value": (b"", [], None, "JSON"),
    "no-prompt": ({"model": MODEL}, [], "messages", "required"),
    "both-kinds": (JOB | {"messages": CHAT_JOB["messages"]}, [], "messages", "exclude"),
    "unknown-model": (JOB | {"model": "gpt-9"}, [], "model", "gpt-9"),
    "too-long": (JOB | {"prompt": [5] * LIMIT_TOKENS}, [], "prompt", str(LIMIT_TOKENS)),
    "hot": (JOB | {"temperature": 9}, [], "temperature", "2"),
    "bad-deadline": (JOB, [("deadline-unix-ms", b"soon")], "deadline-unix-ms", "milliseconds"),
    "far-deadline": (JOB, [("deadline-unix-ms", b"9999999999999999")], "deadline-unix-ms", "21600"),
    "bad-tenant": (JOB, [("tenant", b"\xff two words")], "tenant", "match"),
}


@pytest.mark.parametrize("key", BAD_JOBS)
async def test_a_bad_job_is_rejected_and_buried(serving, key):
    value, headers, param, words = BAD_JOBS[key]
    place = await serving.produce(key, value, headers)
    result = await serving.result_of(key)
    check_rejected(result, param, words)
    await check_buried(serving, key, value, place, result)


async def test_a_record_without_a_key_is_named_by_its_place(serving):
    place = await serving.produce(None, JOB)
    name = f"unnamed-{place.partition}-{place.offset}"
    (record,) = await serving.results.wait_for(name)
    result = json.loads(record.value)
    check_rejected(result, "key", "request id")
    await check_buried(serving, name, JOB, place, result)


@pytest.mark.parametrize("key", ["two words", "ключ", "x" * 129])
async def test_a_key_that_can_be_no_id_is_named_by_its_place(serving, key):
    place = await serving.produce(key, JOB)
    name = f"unnamed-{place.partition}-{place.offset}"
    (record,) = await serving.results.wait_for(name)
    check_rejected(json.loads(record.value), "key", "request id")
    await check_buried(serving, name, JOB, place, json.loads(record.value))


async def test_null_values_and_null_headers_harm_nobody(serving):
    await serving.producer.send_and_wait(INGEST.name, None, key=b"tombstone", partition=partition_of("tombstone"))
    assert (await serving.result_of("tombstone"))["status"] == "rejected"
    await serving.produce("null-header", JOB, [("tenant", None), ("deadline-unix-ms", None)])
    assert (await serving.result_of("null-header"))["status"] == "completed"


def check_rejected(result, param, words) -> None:
    assert (result["status"], result.get("response")) == ("rejected", None)
    assert result["error"].get("param") == param
    assert words in result["error"]["message"]


async def check_buried(serving, key, value, place, result) -> None:
    (record,) = await serving.dead_letters.wait_for(key)
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    assert record.value == body
    assert record.partition == place.partition
    assert dict(record.headers) == {
        "error": result["error"]["message"].encode(),
        "source-topic": b"ingest",
        "source-partition": str(place.partition).encode(),
        "source-offset": str(place.offset).encode(),
        "source-bytes": str(len(body)).encode(),
        "tenant": result["tenant"].encode(),
    }


async def test_jobs_end_once_though_one_of_two_ingests_is_killed(serving):
    keys = [f"flow-{n}" for n in range(24)]
    second = await serving.stack.add("ingest")
    try:
        await serving.all_ready()
        for key in keys[:12]:
            await serving.produce(key, JOB | {"max_tokens": 2})
        await serving.results.wait_for(keys[0])
        for key in keys[12:18]:
            await serving.produce(key, JOB | {"max_tokens": 2})
        serving.stack.send_signal("ingest-0", signal.SIGKILL)
        for key in keys[18:]:
            await serving.produce(key, JOB | {"max_tokens": 2})
        results = [await serving.result_of(key) for key in keys]
        assert {result["status"] for result in results} == {"completed"}
        assert len({result["response"]["choices"][0]["text"] for result in results}) == 1
        await serving.all_ready()
    finally:
        await serving.stack.remove(second)
    await serving.produce("after-two-ingests", JOB)
    assert (await serving.result_of("after-two-ingests"))["status"] == "completed"
    await serving.pages_free()
