"""schemathesis against a whole running system: every answer is one that the document tells of, and none is a 5xx."""

import socket

import httpx
import orjson
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.stream_out.openapi import openapi_document
from tests.flow.system import MODEL
from tests.fuzz.bodies import BODIES, SPECIAL_BODIES
from tests.fuzz.live import live_system
from tests.fuzz.records import FUZZ, hostile

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(orjson.loads(orjson.dumps(openapi_document())))
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
CALLS = [
    (label, mode)
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "/requests/" in label or label.startswith("POST")  # others take anything
]

ANSWER_TIMEOUT_S = 30.0

HASTE_S = 5.0
"""Who gives a request less time than this may hear that it was not enough."""


@pytest.fixture(scope="module")
def live():
    with live_system() as live:
        yield live
        live.check_good_request()
        live.check_each_has_one_result(live.accepted())
        live.check_quiet()


@pytest.fixture
def accepted(live):
    """Afterwards everything accepted has its one result, and the next request is served."""
    yield
    live.check_good_request()
    live.check_each_has_one_result(live.accepted())


@pytest.mark.parametrize(("label", "mode"), CALLS)
def test_operation(live, accepted, label, mode):
    url = live.system.edges[0].url

    @FUZZ
    @given(OPERATIONS[label].as_strategy(mode))
    def run(case):
        aim(case)
        answer = case.call(base_url=url, timeout=ANSWER_TIMEOUT_S)
        check_no_failure_of_ours(answer.status_code, case.headers or {})
        # The check of refusals knows some statuses as such; each of ours is one.
        case.validate_response(
            answer, checks=CHECKS if answer.status_code >= 400 else [*CHECKS, negative_data_rejection]
        )
        live.check_alive()

    run()


def aim(case) -> None:
    """Let most bodies name the model that is there and ask for little: what is beyond admission is of interest too."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and 1 <= len(body["model"]) <= 256:
        body["model"] = MODEL
        if "stream" not in body and len(body) % 2:
            body["stream"] = True


def check_no_failure_of_ours(status: int, headers) -> None:
    """No 5xx; but who named a deadline that was too near is told so."""
    if status in {503, 504} and float(headers.get("x-baton-timeout-s", HASTE_S)) < HASTE_S:
        return
    assert status < 500, status


def test_every_operation_is_tried():
    assert len(OPERATIONS) == sum(len(methods) for methods in openapi_document()["paths"].values())


# What no schema tells: bytes, types, headers

CONTENT_TYPES = [
    None,
    "application/json",
    "application/json; charset=utf-8",
    "application/json; charset=utf-16",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain",
    "",
    ";",
]
header_texts = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
header_names = st.sampled_from(
    [
        "Authorization",
        "Idempotency-Key",
        "Last-Event-ID",
        "x-baton-tenant",
        "x-baton-priority",
        "traceparent",
        "Content-Encoding",
        "Accept",
    ]
)
header_lists = st.lists(st.tuples(header_names, header_texts.map(lambda text: text.strip())), max_size=4)
paths = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/completions?x=%00", "//v1/completions"])


def test_bytes(live, accepted):
    with httpx.Client(base_url=live.system.edges[0].url, timeout=ANSWER_TIMEOUT_S) as client:

        @FUZZ
        @given(paths, hostile(BODIES) | st.sampled_from(SPECIAL_BODIES), st.sampled_from(CONTENT_TYPES), header_lists)
        def run(path, body, content_type, headers):
            headers = [(name, value.encode("latin-1")) for name, value in headers]
            if content_type is not None:
                headers.append(("Content-Type", content_type))
            answer = client.post(path, content=body, headers=headers)
            check_no_failure_of_ours(answer.status_code, {})
            if answer.status_code != 200:
                assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, answer.text
            live.check_alive()

        run()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_paths(live, method):
    segments = st.lists(
        st.sampled_from(
            ["v1", "models", "requests", "events", "..", "", "%2e%2e", "%00", "%0a", "%ff", "%", "ü", "a" * 3000]
        )
        | st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=8),
        max_size=5,
    )
    host, port = live.system.edges[0].url.removeprefix("http://").split(":")

    @FUZZ
    @given(segments)
    def run(parts):
        path = "/" + "/".join(parts)
        with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S) as connection:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            connection.sendall(head.encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        status = int(answer.split(b" ")[1])
        assert status < 500, (path, answer)
        assert status == 200 or b"application/json" in answer.partition(b"\r\n\r\n")[0], (path, answer)

    run()
