"""Every wrong request gets OpenAI's error, at once, naming field and limit; no worker notices, the next one works."""

import json
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.e2e.stack import LIMIT_TOKENS, MODEL, WORKERS

pytestmark = pytest.mark.asyncio(loop_scope="session")

COMPLETION = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
TOO_LONG = "context_length_exceeded"
MEDIA = "unsupported_media_type"


@dataclass(frozen=True, slots=True)
class Case:
    """A body and what is wrong with it; `words` stand in the error's message, the limit among them."""

    body: object
    param: str | None
    words: str
    status: int = 400
    code: str | None = None
    path: str = "completions"


def completion(param: str, words: str, code: str | None = None, status: int = 400, **fields) -> Case:
    return Case(COMPLETION | fields, param, words, status, code)


def chat(param: str, words: str, code: str | None = None, **fields) -> Case:
    return Case(CHAT | fields, param, words, code=code, path="chat/completions")


def without(body: dict, field: str) -> dict:
    return {name: value for name, value in body.items() if name != field}


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth > 1 else []


CASES = {
    "malformed JSON": Case(b'{"model": "smollm2", "prompt"', None, "JSON"),
    "no UTF-8": Case(b'{"model": "smollm2", "prompt": "\xff\xfe"}', None, "JSON"),
    "half a character": Case(b'{"model": "smollm2", "prompt": "\\ud800"}', None, "JSON"),
    "NaN": Case(b'{"model": "smollm2", "prompt": "a", "temperature": NaN}', None, "JSON"),
    "nested without end": Case(b"[" * 100_000, None, "32 objects and lists"),
    "a field nested too deeply": completion("x_extra", "32 objects and lists", x_extra=nested(40)),
    "too many messages": chat("messages", "4096", messages=[{"role": "user", "content": ""}] * 4097),
    "too many parts": chat(
        "messages[0].content", "1024", messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]
    ),
    "too long a user": completion("user", "1024", user="u" * 1025),
    "too many stop ids": completion("stop_token_ids", "64", stop_token_ids=[5] * 65),
    "too long a stop string": completion("stop[0]", "1 to 128", stop=["x" * 129]),
    "empty body": Case(b"", None, "JSON"),
    "no object": Case([1, 2], None, "object"),
    "a body over the limit": Case(b"x" * 2_000_000, None, "1000000", 413, "request_too_large"),
    "a prompt over the body's limit": completion(None, "1000000", "request_too_large", 413, prompt="word " * 400_000),
    "no model": Case(without(COMPLETION, "model"), "model", "required"),
    "unknown model": completion("model", "gpt-9", "model_not_found", 404, model="gpt-9"),
    "unknown model, streamed": completion("model", "gpt-9", "model_not_found", 404, model="gpt-9", stream=True),
    "no prompt": Case(without(COMPLETION, "prompt"), "prompt", "required"),
    "empty prompt": completion("prompt", "empty", prompt=""),
    "empty list of ids": completion("prompt", "empty", prompt=[]),
    "several prompts": completion("prompt", "one prompt, not 2", prompt=["a", "b"]),
    "no messages": Case(without(CHAT, "messages"), "messages", "required", path="chat/completions"),
    "empty messages": chat("messages", "at least 1", messages=[]),
    "prompt at the limit": completion("prompt", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * LIMIT_TOKENS),
    "prompt over the limit": completion("prompt", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * (LIMIT_TOKENS + 1)),
    "over the limit, streamed": completion(
        "prompt", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * (LIMIT_TOKENS + 1), stream=True
    ),
    "prompt over the model's context": completion("prompt", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * 8193),
    "messages over the limit": chat(
        "messages", str(LIMIT_TOKENS), TOO_LONG, messages=[{"role": "user", "content": "word " * LIMIT_TOKENS}]
    ),
    "answer over the limit by one": completion(
        "max_tokens", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * 10, max_tokens=LIMIT_TOKENS - 9
    ),
    "in the model's context, over every worker's pages": completion(
        "max_tokens", str(LIMIT_TOKENS), TOO_LONG, prompt=[5] * 10, max_tokens=5000
    ),
    "no token of the model": completion("prompt", "49152", prompt=[49152]),
    "negative token": completion("prompt[1]", "greater than or equal to 0", prompt=[1, -1]),
    "stop id that is no token": completion("stop_token_ids", "49152", stop_token_ids=[10**6]),
    "text for a number": completion("temperature", "number", temperature="hot"),
    "float for an integer": completion("max_tokens", "integer", max_tokens=1.5),
    "text for a flag": completion("stream", "boolean", stream="yes"),
    "number for a stop": completion("stop", "text", stop=5),
    "number for a prompt": completion("prompt", "text or a list", prompt=5),
    "text for messages": chat("messages", "list", messages="hello"),
    "unknown role": chat("messages[0].role", "user", messages=[{"role": "robot", "content": "hi"}]),
    "number for content": chat("messages[0].content", "text", messages=[{"role": "user", "content": 5}]),
    "an image": chat(
        "messages[0].content[0].type",
        "text",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ),
    "temperature": completion("temperature", "2", temperature=2.5),
    "top_p": completion("top_p", "greater than 0", top_p=0),
    "presence_penalty": completion("presence_penalty", "-2", presence_penalty=-3),
    "frequency_penalty": completion("frequency_penalty", "2", frequency_penalty=3),
    "max_tokens": completion("max_tokens", "1", max_tokens=0),
    "two lengths": completion("max_tokens", "differ", max_tokens=2, max_completion_tokens=3),
    "min_tokens": completion("min_tokens", "at most max_tokens, 1", min_tokens=2),
    "n": completion("n", "8", n=9),
    "no choice": completion("n", "1", n=0),
    "seed": completion("seed", "9223372036854775807", seed=2**70),
    "stop strings": completion("stop", "at most 4", stop=list("abcde")),
    "empty stop string": completion("stop[0]", "1 to 128", stop=[""]),
    "logprobs": completion("logprobs", "5", logprobs=6),
    "top_logprobs": chat("top_logprobs", "20", logprobs=True, top_logprobs=21),
    "top_logprobs alone": chat("top_logprobs", "logprobs", top_logprobs=2),
    "stream_options alone": completion("stream_options", "stream true", stream_options={"include_usage": True}),
    "echo": completion("echo", "not supported", echo=True),
    "suffix": completion("suffix", "not supported", suffix="end"),
    "best_of": completion("best_of", "not supported", best_of=3),
    "logit_bias": completion("logit_bias", "not supported", logit_bias={"5": 10}),
    "tools": chat("tools", "not supported", tools=[{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": chat("tool_choice", "not supported", tool_choice="required"),
    "functions": chat("functions", "not supported", functions=[{"name": "f"}]),
    "response_format": chat("response_format", "not supported", response_format={"type": "json_object"}),
    "modalities": chat("modalities", "not supported", modalities=["text", "audio"]),
    "verbosity": chat("verbosity", "not supported", verbosity="low"),
    "moderation": chat("moderation", "not supported", moderation={"model": "m"}),
    "guided_json": completion("guided_json", "not supported", guided_json={}),
}


@pytest_asyncio.fixture(loop_scope="session")
async def healthy(serving):
    """Afterwards a normal request works, no worker was restarted and none told of an error."""
    before = processes_of(serving)
    yield
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=COMPLETION)
    assert answer.json()["choices"][0]["text"] == " Paris"
    assert processes_of(serving) == before
    assert serving.errors_in_logs(WORKERS) == []


def processes_of(serving) -> list:
    return [(process.name, process.pid, process.restarts) for process in serving.stack.record().processes]


@pytest.mark.parametrize("name", CASES)
async def test_a_wrong_request_is_refused(serving, healthy, name):
    case = CASES[name]
    content = {"content": case.body} if isinstance(case.body, bytes) else {"json": case.body}
    answer = await serving.http.post(f"{serving.edge()}/v1/{case.path}", **content)
    check_error(answer, case.status, case.param, case.words, case.code)


def check_error(answer, status, param, words, code=None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]


async def test_a_body_without_a_length_is_refused_where_it_passes_the_limit(serving, healthy):
    async def endless():
        for _ in range(64):
            yield b"x" * 32_768

    answer = await serving.http.post(f"{serving.edge()}/v1/completions", content=endless())
    check_error(answer, 413, None, "1000000", "request_too_large")


WRONG_HEADERS = {
    "x-baton-timeout-s": ("soon", "21600"),
    "x-baton-tenant": ("two words", "match"),
    "x-baton-priority": ("urgent", "interactive, standard, batch"),
    "idempotency-key": ("k" * 257, "256"),
    "last-event-id": ("nonsense", "event"),
}


@pytest.mark.parametrize("header", WRONG_HEADERS)
async def test_a_wrong_header_is_refused(serving, healthy, header):
    value, words = WRONG_HEADERS[header]
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=COMPLETION, headers={header: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].lower() in {header, header.removeprefix("x-baton-")}
    assert words in error["message"]


@pytest.mark.parametrize("header", WRONG_HEADERS)
async def test_a_header_that_comes_twice_is_refused(serving, healthy, header):
    headers = [(header, "a"), (header, "b")]
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=COMPLETION, headers=headers)
    check_error(answer, 400, header, "once")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("content-encoding", "gzip"),
        ("content-type", "text/plain"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("content-type", "application/json; charset=utf-16"),
    ],
)
async def test_a_body_in_another_form_is_refused(serving, healthy, header, value):
    body = json.dumps(COMPLETION).encode()
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", content=body, headers={header: value})
    check_error(answer, 415, header, "body must not" if header == "content-encoding" else "application/json", MEDIA)


@pytest.mark.parametrize(
    "value", ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=utf8"]
)
async def test_a_body_of_the_right_type_is_served(serving, value):
    body = json.dumps(COMPLETION).encode()
    headers = {"content-type": value, "content-encoding": "identity"}
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 200, answer.text


async def test_headers_without_end_are_refused(serving, healthy):
    headers = [(f"x-many-{number}", "y" * 1000) for number in range(100)]
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=COMPLETION, headers=headers)
    check_error(answer, 431, None, "65536")


async def test_template_syntax_in_a_message_is_only_text(serving, healthy):
    content = "{{ 7 * 7 }}{% for x in range(9) %}{{ messages.__class__.__mro__ }}{% endfor %}{# no #}"
    asked = CHAT | {"messages": [{"role": "user", "content": content}]}
    answer = await serving.http.post(f"{serving.edge()}/v1/chat/completions", json=asked)
    plain = CHAT | {"messages": [{"role": "user", "content": "{" * 20}]}
    other = await serving.http.post(f"{serving.edge()}/v1/chat/completions", json=plain)
    assert (answer.status_code, other.status_code) == (200, 200)
    assert answer.json()["usage"]["prompt_tokens"] > other.json()["usage"]["prompt_tokens"]


async def test_the_document_is_served(serving):
    document = (await serving.http.get(f"{serving.edge()}/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in document["paths"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/requests/req-nobody"),
        ("DELETE", "/v1/requests/req-nobody"),
        ("GET", "/v1/requests/req-nobody/events"),
        ("GET", "/v1/requests/not%20an%20id"),
        ("GET", "/v1/models/gpt-9"),
        ("GET", "/v1/embeddings"),
        ("POST", "/v1/embeddings"),
    ],
)
async def test_what_is_not_there_is_404(serving, method, path):
    answer = await serving.http.request(method, serving.edge() + path)
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_fields_are_ignored_and_counted(serving, healthy):
    before = await serving.metric_of_all("edge", "baton_edge_unknown_fields_total")
    body = COMPLETION | {"shiny": 1, "x_trace": {"id": 5}, "logit_bias": {}, "tools": None, "echo": False}
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == " Paris"
    assert await serving.metric_of_all("edge", "baton_edge_unknown_fields_total") == before + 2
    assert await serving.metric_of_all("ingest", "baton_unknown_fields_total") >= 2


async def test_what_just_fits_is_served(serving, healthy):
    prompt = [5] * 10
    asked = COMPLETION | {"prompt": prompt, "max_tokens": LIMIT_TOKENS - len(prompt)}
    first = await serving.http.post(f"{serving.edge()}/v1/completions", json=asked | {"max_tokens": 1, "logprobs": 0})
    stop = first.json()["choices"][0]["text"]
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=asked | {"stop": stop})
    assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "stop")
    assert answer.json()["usage"]["completion_tokens"] == 1
