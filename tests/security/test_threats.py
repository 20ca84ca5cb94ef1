"""Attacks on a whole Baton that fail: see docs/security.md, which names for each threat the tests that try it.

Those here are the ones that no suite has beside its own subject.
"""

import hmac
import re
import secrets
from contextlib import asynccontextmanager

import httpx
import orjson
import pytest
import structlog

from services.stream_out import tenants as tenants_module
from services.stream_out.sse import Cursor, format_event, parse_event_id
from services.stream_out.tenants import KEY_PREFIX, Tenants, key_hash
from shared.errors import InvalidRequest, NotAuthenticated
from shared.request import NUM_SLOTS, RequestId
from shared.state import keys
from shared.state.port import RequestHint
from shared.wire.topics import DEAD_LETTER
from tests.contract.state_worlds import redis_world
from tests.flow.system import MODEL, System
from tests.named_tests import ROOT, missing_tests, named_tests

DOCUMENT = ROOT / "docs/security.md"
ACME, RIVAL = (KEY_PREFIX + secrets.token_urlsafe(32) for _ in range(2))
BODY = {"model": MODEL, "prompt": [10, 20, 30], "max_tokens": 4, "temperature": 0}

THREATS = re.findall(r"^### (T\d+) ", DOCUMENT.read_text(), re.MULTILINE)


def section(threat: str) -> str:
    return (
        re.split(rf"^### {threat} ", DOCUMENT.read_text(), flags=re.MULTILINE)[1].split("\n### ")[0].split("\n## ")[0]
    )


def test_threats_are_counted():
    assert [f"T{number}" for number in range(1, len(THREATS) + 1)] == THREATS


@pytest.mark.parametrize("threat", THREATS)
def test_every_threat_names_tests_that_are_there(threat):
    assert named_tests(section(threat)), f"{threat} names no test"
    assert missing_tests(section(threat)) == []


@pytest.mark.parametrize("threat", THREATS)
def test_every_threat_names_where_its_defence_is(threat):
    named = re.findall(r"`((?:shared|services|infra)/[\w/.]+|docker-compose\.yml)`", section(threat))
    assert named, f"{threat} names no place in the code"
    for path in named:
        assert (ROOT / path).exists(), path


# Keys and tenants, over HTTP


@asynccontextmanager
async def an_edge(tmp_path):
    """A system whose callers need keys, and a client of each tenant."""
    path = tmp_path / "tenants.json"
    path.write_bytes(orjson.dumps({"acme": {"keys": [key_hash(ACME)]}, "rival": {"keys": [key_hash(RIVAL)]}}))
    system = System()
    try:
        await system.start(decodes=1)
        system.edges[0].service.tenants = Tenants(path)
        async with (
            client_of(system, f"Bearer {ACME}") as acme,
            client_of(system, f"Bearer {RIVAL}") as rival,
        ):
            yield system, acme, rival
    finally:
        await system.close()


def client_of(system, authorization):
    headers = {"authorization": authorization} if authorization else {}
    return httpx.AsyncClient(base_url=system.edges[0].url, headers=headers, trust_env=False, timeout=20)


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer guess", f"Basic {ACME}", f"Bearer {ACME[:-1]}", f"Bearer {key_hash(ACME)}"]
)
async def test_without_a_key_of_the_file_nothing_is_told(tmp_path, authorization):
    async with an_edge(tmp_path) as (system, _, _), client_of(system, authorization) as stranger:
        for method, path in (
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/requests/anything"),
            ("DELETE", "/v1/requests/anything"),
            ("GET", "/v1/requests/anything/events"),
            ("GET", "/v1/requests/anything/placement"),
        ):
            answer = await stranger.request(method, path, json=BODY if method == "POST" else None)
            assert answer.status_code == 401, (method, path)
            assert MODEL not in answer.text


async def test_a_tenant_cannot_say_that_it_is_another(tmp_path):
    async with an_edge(tmp_path) as (_, acme, _):
        answer = await acme.post("/v1/completions", json=BODY, headers={"x-baton-tenant": "rival"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-baton-tenant"


async def test_what_is_of_another_tenant_is_as_if_it_were_not(tmp_path):
    """By its id, which a rival would have to guess: no answer, no end, no events, not where it was placed."""
    async with an_edge(tmp_path) as (_, acme, rival):
        mine = await acme.post("/v1/completions", json=BODY)
        assert mine.status_code == 200
        name = mine.headers["x-request-id"]
        for method, of_it in (("GET", ""), ("DELETE", ""), ("GET", "/placement")):
            theirs = await rival.request(method, f"/v1/requests/{name}{of_it}")
            unknown = await rival.request(method, f"/v1/requests/nobodys{of_it}")
            assert theirs.status_code == unknown.status_code == 404
            assert theirs.text.replace(name, "nobodys") == unknown.text
        resumed = await rival.post(
            "/v1/completions", json=BODY | {"stream": True}, headers={"last-event-id": f"{name}:0.0"}
        )
        assert resumed.status_code == 404
        assert (await acme.get(f"/v1/requests/{name}")).status_code == 200
        assert (await acme.get(f"/v1/requests/{name}/placement")).status_code == 200


async def test_a_placement_shows_slots_and_times_and_not_who_the_workers_are(tmp_path):
    async with an_edge(tmp_path) as (system, acme, rival):
        theirs = await rival.post("/v1/completions", json=BODY)
        mine = await acme.post("/v1/completions", json=BODY)
        answer = await acme.get(f"/v1/requests/{mine.headers['x-request-id']}/placement")
        (placed,) = answer.json()["placements"]
        assert placed.keys() == {"index", "epoch", "prefill", "decode", "placed", "explanation"}
        assert placed["explanation"].keys() == {"reason", "num_considered", "candidates"}
        for candidate in placed["explanation"]["candidates"]:
            assert all(isinstance(value, int | float) for value in candidate.values())
        workers = await system.workers[0].state.workers(num_slots=NUM_SLOTS)
        secret = [
            *(worker.card.incarnation for worker in workers),
            *(worker.card.transfer_address for worker in workers),
        ]
        for each in (*secret, theirs.headers["x-request-id"], "rival"):
            assert each not in answer.text


async def test_an_idempotency_key_joins_only_the_tenants_own_request(tmp_path):
    async with an_edge(tmp_path) as (_, acme, rival):
        first, again, theirs = [
            (await client.post("/v1/completions", json=BODY, headers={"idempotency-key": "order-66"}))
            for client in (acme, acme, rival)
        ]
        assert first.headers["x-request-id"] == again.headers["x-request-id"] != theirs.headers["x-request-id"]


def test_keys_are_compared_in_constant_time_and_each_with_all(tmp_path, monkeypatch):
    """Neither how much of a guess is right nor which tenant's key it is shows in the time."""
    path = tmp_path / "tenants.json"
    path.write_bytes(orjson.dumps({f"t{n}": {"keys": [key_hash(f"key {n}")]} for n in range(9)}))
    compared = []
    compare = hmac.compare_digest

    def counting(a, b):
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(tenants_module.hmac, "compare_digest", counting)
    tenants = Tenants(path)
    for key, tenant in (("key 0", "t0"), ("key 8", "t8"), ("nobody's", None)):
        compared.clear()
        if tenant is None:
            with pytest.raises(NotAuthenticated):
                tenants.caller(f"Bearer {key}")
        else:
            assert tenants.caller(f"Bearer {key}").tenant == tenant
        assert len(compared) == 9
        assert all(key.encode() not in (a, b) for a, b in compared)


def test_the_file_of_tenants_holds_no_key(tmp_path):
    assert ACME not in key_hash(ACME)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", key_hash(ACME))


# Ids


async def test_ids_cannot_be_guessed():
    """122 random bits each; an edge draws them by uuid4."""
    text = (ROOT / "services/stream_out/__main__.py").read_text()
    assert "draw_name=lambda: uuid.uuid4().hex" in text


@pytest.mark.parametrize(
    "evil", ["a\nb", "a\r\ndata: forged", "a:1", "", "a" * 129, "../../etc/passwd", "a b", "ä", "a\0"]
)
async def test_an_id_carries_nothing_into_headers_events_or_keys(evil):
    """Neither by a record's key, nor by an event's id."""
    with pytest.raises(InvalidRequest):
        parse_event_id(f"{evil}:1.0")
    system = System()
    try:
        await system.start(decodes=1)
        await system.submit(BODY, request_id=evil or None)
    finally:
        await system.close()


def test_an_event_is_one_event_whatever_the_answer_says():
    body = orjson.dumps({"text": "x\n\ndata: [DONE]\n\nid: forged"})
    assert format_event(RequestId("r"), Cursor(1, 0), body).count(b"\n\n") == 1


@pytest.mark.parametrize(
    "evil", ["'; redis.call('FLUSHALL') --", "{other}:key", "*", "a\r\nFLUSHALL\r\n", "]]..redis.call('KEYS','*')"]
)
async def test_lua_and_keys_take_ids_as_values(redis_url, evil):
    """Scripts are constant and get ids as KEYS and ARGV; whatever an id says, one key of Baton's is written."""
    async with redis_world(redis_url) as world:
        await world.state.note_request(RequestId("kept"), RequestHint(3, 7), keep_ms=60_000)
        await world.state.note_request(RequestId(evil), RequestHint(0, 1), keep_ms=60_000)
        await world.state.lease_partitions(evil, evil, num_partitions=2, lease_ms=1000)
        assert await world.state.find_request(RequestId(evil)) == RequestHint(0, 1)
        assert await world.state.find_request(RequestId("kept")) == RequestHint(3, 7)
        assert all(key.startswith(keys.PREFIX.encode()) for key in await world.state._client.keys("*"))


# Jobs by Kafka


async def test_a_producer_may_name_any_tenant():
    """Not a hole but a rule that must be known: who may write `ingest` is trusted with every tenant's name."""
    system = System()
    try:
        await system.start(decodes=1)
        result = await system.result(await system.submit(BODY, headers=[("tenant", b"acme")]))
        assert result.tenant == "acme"
    finally:
        await system.close()


async def test_a_job_that_is_no_job_ends_nothing_but_itself():
    system = System()
    try:
        await system.start(decodes=1)
        for body in (b"\0" * 1000, b"[" * 100_000, b'{"model": "fake", "prompt": ' + b'"a"' * 10):
            assert (await system.ended(await system.submit(body))).finished
        assert (await system.result(await system.submit(BODY))).response["usage"]["completion_tokens"] == 4
        assert any(system.log.records(DEAD_LETTER.name, n) for n in range(DEAD_LETTER.num_partitions))
    finally:
        await system.close()


# What is not there


HTTP_CLIENTS = {"aiohttp", "http", "httpx", "requests", "urllib"}


def test_nothing_that_a_client_sends_is_opened_or_fetched():
    """No URL of a request reaches a socket: services have nothing that fetches one. What reads URLs is for settings."""
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in [*(ROOT / "services").rglob("*.py"), *(ROOT / "shared").rglob("*.py")]
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        if name in HTTP_CLIENTS
    }
    assert found == {("shared/runtime/settings.py", "urllib")}


def test_a_log_line_is_one_line_whatever_it_tells():
    rendered = structlog.processors.JSONRenderer()(None, "info", {"event": "e", "path": 'a"\n{"event": "forged"}'})
    assert "\n" not in rendered
