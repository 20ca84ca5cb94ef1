import json
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.client import (
    Clock,
    ExchangeFailed,
    HttpTransport,
    Observation,
    SseEvent,
    SseParser,
    StreamReader,
    error_label,
    first_model,
)
from shared.errors import StartupError
from shared.request import Event
from tests.unit.loadgen.builders import job_of, scheduled

USAGE = {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def text_chunk(text, reason=None):
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def chat_chunk(delta, reason=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def read(chunks, *, is_chat=False, ids=None):
    """The observation of a stream whose n-th event comes at second n."""
    seen = Observation()
    reader = StreamReader(seen, is_chat=is_chat)
    for number, chunk in enumerate(chunks):
        data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
        reader.read(SseEvent(ids[number] if ids else None, data), float(number))
    reader.close()
    return seen


@given(st.lists(st.integers(0, 90)))
def test_events_are_the_same_however_the_bytes_are_split(cuts):
    stream = b': hello\r\nid: a:1.0\r\ndata: {"x": 1}\r\n\r\ndata:one\ndata: two\n\n\ndata: [DONE]\n\nrest'
    bounds = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    parser = SseParser()
    pieces = [stream[start:end] for start, end in pairwise(bounds)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert events == [SseEvent("a:1.0", b'{"x": 1}'), SseEvent(None, b"one\ntwo"), SseEvent(None, b"[DONE]")]


def test_a_completion_is_timed_by_its_chunks_even_those_without_text():
    usage = {"choices": [], "usage": USAGE, "baton": {"timings": {"accepted": 5.5, "nonsense": 1, "finished": None}}}
    seen = read([text_chunk(""), text_chunk("a"), text_chunk("b", "length"), usage, b"[DONE]"])
    assert (seen.first_token_s, seen.last_token_s, seen.answered_s, seen.gaps_s) == (0, 2, 2, [1, 1])
    assert (seen.prompt_tokens, seen.output_tokens, seen.cached_tokens) == (4, 3, 2)
    assert seen.finish_reason == "length"
    assert seen.stamps == {Event.ACCEPTED: 5.5}
    assert not seen.duplicated


def test_an_empty_last_chunk_of_a_completion_adds_no_token():
    seen = read([text_chunk("a"), text_chunk("b"), text_chunk("", "stop"), b"[DONE]"])
    assert seen.gaps_s == [1]


def test_a_chats_role_is_no_token():
    seen = read(
        [
            chat_chunk({"role": "assistant", "content": ""}),
            chat_chunk({"content": "a"}),
            chat_chunk({}, "stop"),
            b"[DONE]",
        ],
        is_chat=True,
    )
    assert (seen.first_token_s, seen.last_token_s, seen.gaps_s) == (1, 1, [])


def test_an_answer_without_text_is_timed_by_its_end():
    seen = read([text_chunk("", "stop"), b"[DONE]"])
    assert (seen.first_token_s, seen.gaps_s) == (0, [])


@pytest.mark.parametrize("chunks", [[], [text_chunk("a"), b"[DONE]"], [text_chunk("a", "length")]])
def test_a_stream_without_reason_or_done_was_cut(chunks):
    with pytest.raises(ExchangeFailed) as failure:
        read(chunks)
    assert failure.value.label == "disconnect"


@pytest.mark.parametrize(
    ("chunk", "label"),
    [
        (b"{", "malformed"),
        (b"[1]", "malformed"),
        ({"error": {"message": "no", "type": "server_error", "code": "worker lost!"}}, "error_worker_lost_"),
        ({"error": {"message": "no", "type": "server_error", "code": None}}, "error_server_error"),
        ({"error": "plain"}, "error_unnamed"),
    ],
)
def test_what_is_no_chunk_fails_by_its_label(chunk, label):
    with pytest.raises(ExchangeFailed) as failure:
        read([chunk])
    assert failure.value.label == label


def test_labels_are_bounded():
    assert len(error_label({"code": "x" * 1000})) < 60


@pytest.mark.parametrize(
    ("chunks", "ids"),
    [
        ([text_chunk("a"), text_chunk("a"), text_chunk("b", "stop"), b"[DONE]"], ["r:1.0", "r:1.0", "r:2.0", None]),
        ([text_chunk("a", "stop"), text_chunk("b", "stop"), b"[DONE]"], None),
        ([text_chunk("a", "stop"), text_chunk("b"), b"[DONE]"], None),
    ],
)
def test_a_repeated_event_or_end_is_a_duplicate(chunks, ids):
    assert read(chunks, ids=ids).duplicated


async def pieces(text):
    for start in range(0, len(text), 50):
        yield text[start : start + 50].encode()


def client(answer):
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")


async def exchange(answer):
    seen = Observation()
    async with client(answer) as http:
        transport = HttpTransport(http, "/v1/completions", {"x-tenant": "t"}, Clock(lambda: 7.0, lambda: 0.0))
        await transport.exchange(job_of(scheduled(0)), seen)
    return seen


async def test_a_job_is_posted_under_its_id_with_its_headers():
    requests = []

    def answer(request):
        requests.append(request)
        stream = [text_chunk("a", "length"), {"choices": [], "usage": USAGE}]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in stream)
        return httpx.Response(200, content=pieces(f"{text}data: [DONE]\n\n"))

    seen = await exchange(answer)
    assert (seen.sent_s, seen.first_token_s, seen.output_tokens) == (7, 7, 3)
    (request,) = requests
    assert request.url == "http://server/v1/completions"
    assert (request.headers["x-request-id"], request.headers["x-tenant"]) == ("replay-test-0", "t")
    assert request.content == b"{}"


async def test_a_refusal_is_labelled_with_its_status():
    with pytest.raises(ExchangeFailed) as failure:
        await exchange(lambda request: httpx.Response(429, text="slow down " * 100))
    assert failure.value.label == "http_429"
    assert failure.value.detail.startswith("slow down")
    assert len(failure.value.detail) <= 300


@pytest.mark.parametrize(
    ("error", "label"),
    [(httpx.ConnectError("refused"), "connect"), (httpx.ReadError("reset"), "disconnect")],
)
async def test_a_lost_connection_is_labelled(error, label):
    def answer(request):
        raise error

    with pytest.raises(ExchangeFailed) as failure:
        await exchange(answer)
    assert failure.value.label == label


async def test_the_first_model_is_taken_or_the_start_refused():
    async with client(lambda request: httpx.Response(200, json={"data": [{"id": "m"}, {"id": "n"}]})) as http:
        assert await first_model(http) == "m"
    for bad in (httpx.Response(500), httpx.Response(200, text="<html>"), httpx.Response(200, json={"data": []})):
        async with client(lambda request, bad=bad: bad) as http:
            with pytest.raises(StartupError, match="--model"):
                await first_model(http)
