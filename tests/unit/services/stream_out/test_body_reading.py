import asyncio

import pytest
from starlette.requests import Request

from services.stream_out.app import SINGLE_HEADERS, _check_headers, _read_body
from shared.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, UnsupportedBody


def a_request(*headers, parts=(b"",), ends=True):
    waiting = list(parts)

    async def receive():
        if not waiting:
            await asyncio.sleep(60)
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting) or not ends}

    raw = [(name.encode(), value.encode()) for name, value in headers]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


async def test_a_body_comes_in_any_number_of_parts():
    request = a_request(parts=(b"ab", b"", b"c"))
    assert await _read_body(request, max_bytes=3, timeout_s=5) == b"abc"


async def test_a_body_that_does_not_end_is_given_up():
    request = a_request(parts=(b"ab",), ends=False)
    with pytest.raises(BodyTooSlow, match=r"0\.01 s"):
        await _read_body(request, max_bytes=3, timeout_s=0.01)


async def test_a_body_is_refused_where_it_passes_the_limit():
    with pytest.raises(BodyTooLarge):
        await _read_body(a_request(parts=(b"ab", b"cd"), ends=False), max_bytes=3, timeout_s=5)


@pytest.mark.parametrize("length", ["4", "9" * 5000])
async def test_a_body_that_is_announced_too_large_is_not_read(length):
    request = a_request(("content-length", length), parts=())
    with pytest.raises(BodyTooLarge):
        await _read_body(request, max_bytes=3, timeout_s=5)


@pytest.mark.parametrize("name", SINGLE_HEADERS)
def test_what_means_something_comes_once(name):
    _check_headers(a_request((name, "a")))
    with pytest.raises(InvalidRequest, match="once") as caught:
        _check_headers(a_request((name, "a"), (name, "a")))
    assert caught.value.param == name


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "APPLICATION/JSON", "application/json; charset=utf-8", 'application/json;charset="utf8"'],
)
def test_json_is_taken(content_type):
    _check_headers(a_request(("content-type", content_type), ("content-encoding", "Identity")))


def test_a_body_without_a_type_is_taken_for_json():
    _check_headers(a_request())


@pytest.mark.parametrize(
    "header",
    [
        ("content-type", ""),
        ("content-type", "text/plain"),
        ("content-type", "application/json; charset=latin-1"),
        ("content-type", "application/jsonl"),
        ("content-type", "application/json, text/plain"),
        ("content-encoding", "gzip"),
        ("content-encoding", "gzip, identity"),
    ],
)
def test_other_forms_are_refused_by_name(header):
    with pytest.raises(UnsupportedBody) as caught:
        _check_headers(a_request(header))
    assert (caught.value.param, caught.value.http_status) == (header[0], 415)
