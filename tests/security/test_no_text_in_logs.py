"""Whatever happens to requests, no word of prompt or answer, no key and no secret stands in logs, metrics or health.

Real requests, each with words of its own, through all services with every log line kept; nothing in Baton can be asked
to log texts, so nothing here asks for it.
"""

import asyncio
import logging
from base64 import b64encode
from contextlib import suppress

import httpx
import orjson
import pytest
import structlog
from prometheus_client import CollectorRegistry, generate_latest

from shared.blocks import token_ids
from shared.bus.memory import MemoryBus
from shared.errors import BatonError
from shared.wire.topics import DEAD_LETTER, DECODE, INGEST_RESUME, PREFILL, STREAM_OUT
from tests.flow.system import MODEL, System

CANARY = "canary"
IDS = [311, 322, 333, 344, 355, 366, 377, 388, 399, 410]
KEY = "sk-canary-key"


@pytest.fixture
def lines():
    """What was logged, as it would be printed."""
    return []


@pytest.fixture
async def system(lines, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    registries = []

    def new_registry():
        registries.append(CollectorRegistry())
        return registries[-1]

    monkeypatch.setattr("tests.flow.system.CollectorRegistry", new_registry)
    system = System(grace_s=0.2)
    system.registries = registries
    system.lines = lines
    system.logger = structlog.wrap_logger(
        Recorder(lines),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("debug"),
    )
    system.kv_secrets = []
    drawn = system.random.randbytes

    def draw(num_bytes):
        system.kv_secrets.append(drawn(num_bytes))
        return system.kv_secrets[-1]

    system.random.randbytes = draw
    try:
        await system.start()
        yield system
    finally:
        await system.close()


class Recorder:
    """Takes what a logger prints."""

    def __init__(self, lines):
        self._lines = lines

    def _take(self, line):
        self._lines.append(line)

    debug = info = warning = error = exception = critical = msg = _take


async def post(system, path, body, **headers):
    async with httpx.AsyncClient(base_url=system.edges[0].url, trust_env=False, timeout=20) as http:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        return await http.post(path, content=content, headers={"authorization": f"Bearer {KEY}", **headers})


async def good(system):
    """Streamed and not; its answer must not show either."""
    messages = [{"role": "user", "content": f"{CANARY} in a question"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0, "user": CANARY}
    whole = await post(system, "/v1/chat/completions", body)
    streamed = await post(system, "/v1/chat/completions", body | {"stream": True})
    assert (whole.status_code, streamed.status_code) == (200, 200)
    return [whole.json()["choices"][0]["message"]["content"]]


async def as_ids(system):
    answer = await post(system, "/v1/completions", {"model": MODEL, "prompt": IDS, "max_tokens": 12, "temperature": 0})
    assert answer.status_code == 200
    return [answer.json()["choices"][0]["text"]]


async def refused(system):
    for change in (
        {"temperature": CANARY},
        {"stop": [CANARY] * 99},
        {"n": -1},
        {"logit_bias": {CANARY: 1}},
        {CANARY: 1},
    ):
        body = {"model": MODEL, "prompt": f"{CANARY} in a refused prompt", "max_tokens": 2} | change
        await post(system, "/v1/completions", body, **{"idempotency-key": f"{CANARY}-{sorted(change)}"})
    too_long = await post(system, "/v1/completions", {"model": MODEL, "prompt": CANARY * 2000})
    assert too_long.status_code == 400


async def undecodable(system):
    for body in (b'{"prompt": "canary', b"\xffcanary", orjson.dumps([CANARY]), b'{"canary":' * 500):
        assert (await post(system, "/v1/completions", body)).status_code == 400
        await system.ended(await system.submit(body))


async def dead_lettered(system):
    await system.ended(await system.submit({"model": MODEL, "prompt": CANARY, "max_tokens": CANARY}))
    assert any(system.log.records(DEAD_LETTER.name, n) for n in range(DEAD_LETTER.num_partitions))


async def cancelled(system):
    body = {"model": MODEL, "prompt": f"{CANARY} that nobody waits for", "max_tokens": 3000, "ignore_eos": True}
    with suppress(httpx.ReadTimeout):
        async with httpx.AsyncClient(base_url=system.edges[0].url, trust_env=False, timeout=0.3) as http:
            await http.post("/v1/completions", json=body)


async def garbage(system):
    """Records that no service of ours wrote, on each private topic."""
    async with MemoryBus(system.log, client_id="vandal").producer() as producer:
        for value in (
            b"canary",
            b'{"type": "prefill_work", "ids": "canary"}',
            b'{"type": "open", "request_id": ["canary"]}',
        ):
            for topic in (PREFILL, DECODE, STREAM_OUT, INGEST_RESUME):
                for partition in range(4):
                    await producer.send(topic.name, partition, value)


async def failed(system):
    """The engine meets a defect in a request, and says what it saw."""
    worker = system.workers[0]
    add = worker.engine.add

    def broken(request, *arguments, **more):
        worker.engine.add = add
        raise RuntimeError(f"defect at {request.request_id if hasattr(request, 'request_id') else 'a request'}")

    worker.engine.add = broken
    job = await system.submit({"model": MODEL, "prompt": f"{CANARY} that fails", "max_tokens": 2})
    with suppress(TimeoutError, BatonError):
        await system.ended(job, timeout_s=3)
    assert "defect" in "\n".join(system.lines) + repr(worker.task)


HAPPENINGS = (good, as_ids, refused, undecodable, dead_lettered, cancelled, garbage, failed)


@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda happens: happens.__name__)
async def test_no_text_shows(happens, system, lines, caplog):
    answers = await happens(system) or []
    await asyncio.sleep(0.2)
    shown = {
        "logs": "\n".join(lines),
        "logs of libraries": "\n".join(
            f"{record.getMessage()} {record.exc_info} {record.exc_text}"
            for record in caplog.records
            if not record.name.startswith("http")  # this test's own client
        ),
        "metrics": "".join(generate_latest(registry).decode() for registry in system.registries),
        "health": str([await each.service.ready() for each in (*system.edges, *system.ingests, *system.workers)])
        + str([worker.service.peers.health() for worker in system.workers]),
        "errors of tasks": str([repr(w.task.exception()) for w in system.workers if w.task.done()]),
    }
    for place, text in shown.items():
        for secret in secrets_of(system, answers):
            assert secret not in text, f"{secret!r} in {place}: {around(text, secret)}"


def secrets_of(system, answers):
    ids = token_ids(IDS)
    yield from (CANARY, KEY, ", ".join(map(str, IDS[:4])), b64encode(ids.tobytes()).decode()[:24])
    for answer in answers:
        yield from (answer, orjson.dumps(answer).decode()[1:-1])
    for secret in system.kv_secrets:
        yield from (secret.hex(), b64encode(secret).decode(), repr(secret)[2:-1])


def around(text, secret):
    at = text.index(secret)
    return text[max(0, at - 300) : at + 100]


async def test_the_canaries_would_be_heard(system, lines):
    """A test of the test: what a service logs lands where the test looks."""
    system.logger.info("said", text=CANARY)
    assert CANARY in lines[-1]
    await good(system)
    assert len(lines) > 1
    assert system.kv_secrets
