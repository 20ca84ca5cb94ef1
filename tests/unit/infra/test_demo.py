from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from infra import demo
from infra.demo import WorkerReading, read_worker, worker_problems
from shared.observe.metrics import WorkerMetrics

EMPTY = WorkerReading(
    name="decode-0",
    prompt_tokens=0,
    cached_tokens=64,
    generated_tokens=7,
    pulled_bytes=1 << 20,
    local_prefills=0,
    pages=128,
    free_pages=128,
    held_requests=0,
)


async def test_a_reading_is_what_a_worker_s_own_metrics_say():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, "m")
    metrics.prefix_hits.inc(64)
    metrics.generation_tokens.inc(7)
    metrics.transfer_bytes.inc(1 << 20)
    metrics.total_pages.set(128)
    metrics.free_pages.set(128)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=generate_latest(registry)))
    async with httpx.AsyncClient(transport=transport) as http:
        assert await read_worker(http, "decode-0", "http://worker") == EMPTY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"free_pages": 127}, "holds pages"),
        ({"held_requests": 1}, "holds pages"),
        ({"pages": 0, "free_pages": 0}, "holds pages"),
        ({"generated_tokens": 0}, "generated nothing"),
        ({"local_prefills": 2}, "2 prompts itself"),
    ],
)
def test_what_went_wrong_is_told(change, words):
    assert worker_problems([EMPTY]) == []
    (problem,) = worker_problems([EMPTY, replace(EMPTY, name="decode-1", **change)])
    assert problem.startswith("decode-1 ")
    assert words in problem


async def test_a_replay_that_fails_is_a_problem(monkeypatch, capfd):
    monkeypatch.setattr(demo, "smollm2_folder", lambda: "/nowhere")
    (problem,) = await demo.replay("http://127.0.0.1:1")
    assert "exit status 2" in problem
    assert "no tokenizer.json" in capfd.readouterr().err
