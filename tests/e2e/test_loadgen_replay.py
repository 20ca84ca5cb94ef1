"""`python -m loadgen replay` as its users run it, against a small streaming server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from loadgen.page.render import render_page
from loadgen.saved import read_saved
from tests.e2e.loadgen_server import TTFT_S, FakeServer, serving

ROOT = Path(__file__).parents[2]
MOONCAKE = ROOT / "loadgen" / "data" / "mooncake_conversation_60.jsonl"
AZURE = ROOT / "loadgen" / "data" / "azure_conv_60.csv"
TIMEOUT_S = 60


def command(*options):
    return [sys.executable, "-m", "loadgen", "replay", *map(str, options)]


def start(*options):
    environment = {**os.environ, "COLUMNS": "160", "http_proxy": "http://127.0.0.1:1"}
    return subprocess.Popen(
        command(*options), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*options):
    process = start(*options)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def test_a_slice_of_a_trace_gets_the_right_medians_and_every_field(tmp_path):
    fake = FakeServer()
    saved = ["--save-result", "--save-detailed", "--result-dir", tmp_path, "--result-filename", "r.json"]
    saved += ["--save-requests", tmp_path / "requests.jsonl", "--save-schedule", tmp_path / "schedule.jsonl"]
    saved += ["--html", tmp_path / "page.html"]
    with serving(fake) as base_url:
        status, out, err = run(
            *("--trace", MOONCAKE, "--base-url", base_url, "--vocab-size", 1000, "--num-prompts", 20, "--speed", 10),
            *("--length-scale", 0.02, "--max-input", 300, "--jitter-ticks"),
            *("--goodput", "ttft:5000 tpot:5000", "--metadata", "build=7", *saved),
        )
    assert status == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"], result["num_prompts"]) == (20, 0, 20)
    assert result["buckets"] == {"completed": 20}
    assert (result["model_id"], result["metadata_build"], result["slo_attainment"]) == ("fake-model", "7", 1)

    # What the server got is what the trace, scaled, says.
    scheduled = [json.loads(line) for line in (tmp_path / "schedule.jsonl").read_text().splitlines()][1:]
    assert sorted(len(body["prompt"]) for body in fake.bodies) == sorted(row["input_tokens"] for row in scheduled)
    assert sorted(body["min_tokens"] for body in fake.bodies) == sorted(row["output_tokens"] for row in scheduled)
    assert all(body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] for body in fake.bodies)
    assert len({tuple(body["prompt"][:10]) for body in fake.bodies}) == 1, "hash id 0 opens every prompt"
    assert result["total_input_tokens"] == result["scheduled_input_tokens"] == sum(r["input_tokens"] for r in scheduled)
    assert result["total_output_tokens"] == result["scheduled_output_tokens"]
    assert result["total_cached_tokens"] == 20
    assert result["clipped_inputs"] > 0

    # Orders and the server's delays as lower bounds only: a busy machine adds to them. Exact medians are a unit test.
    assert result["median_ttft_from_send_ms"] / 1000 >= TTFT_S * 0.9
    assert result["median_ttft_ms"] >= result["median_ttft_from_send_ms"]
    assert result["median_itl_ms"] <= result["p90_itl_ms"] <= result["p99_itl_ms"]
    assert result["median_tpot_ms"] < result["median_e2el_ms"] <= result["p90_e2el_ms"] <= result["p99_e2el_ms"]
    assert result["stages_ms"]["accepted → first_token"]["count"] == 20
    assert result["stages_ms"]["accepted → first_token"]["p50"] / 1000 >= TTFT_S * 0.9

    assert [len(result[name]) for name in ("input_lens", "output_lens", "ttfts", "itls", "errors")] == [20] * 5
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(20))
    assert {line["bucket"] for line in lines} == {"completed"}
    for text in ("TTFT", "Where the time went", "cut to that", "times 0.02", result["schedule_sha256"][:16]):
        assert text in out
    assert "sent 20/20" in err
    assert (tmp_path / "page.html").read_bytes() == render_page(read_saved(tmp_path / "r.json"))


def test_two_runs_of_the_same_arguments_send_the_same_bytes(tmp_path):
    runs = []
    for name in ("a", "b"):
        fake = FakeServer()
        with serving(fake) as base_url:
            status, _, err = run(
                *("--trace", AZURE, "--base-url", base_url, "--vocab-size", 1000, "--length-scale", 0.01),
                *("--rows", "5:13", "--request-rate", 40, "--seed", 3, "--save-schedule", tmp_path / name),
            )
        assert status == 0, err
        runs.append(sorted(map(json.dumps, fake.bodies)))
    assert len(runs[0]) == 8
    assert runs[0] == runs[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_failures_are_counted_by_kind_and_the_books_close(tmp_path):
    misdeeds = {0: "refuse", 1: "break", 2: "short", 3: "double", 4: "error", 5: "hang"}
    fake = FakeServer(misdeeds)
    with serving(fake) as base_url:
        status, out, err = run(
            *("--trace", AZURE, "--base-url", base_url, "--vocab-size", 1000, "--length-scale", 0.1),
            *("--num-prompts", 8, "--arrivals", "constant", "--request-rate", 20, "--timeout", 5),
            *("--goodput", "ttft:60000", "--result-dir", tmp_path, "--result-filename", "r.json"),
        )
    assert status == 1, err
    result = json.loads((tmp_path / "r.json").read_text())
    kinds = ("http_429", "disconnect", "wrong_length", "duplicate", "error_worker_lost", "timeout")
    assert result["buckets"] == {"completed": 2} | dict.fromkeys(kinds, 1)
    assert (result["completed"], result["failed"], result["slo_attainment"]) == (2, 6, 0.25)
    assert all(kind in out for kind in kinds)


def test_a_server_that_is_not_there_is_named(tmp_path):
    unreachable = "http://127.0.0.1:9"
    status, _, err = run("--trace", AZURE, "--base-url", unreachable, "--vocab-size", 10)
    assert status == 2
    assert unreachable in err
    # With a model given nothing is asked first: each row then fails by itself and is counted.
    status, out, _ = run(
        *("--trace", AZURE, "--base-url", unreachable, "--vocab-size", 10, "--model", "m"),
        *("--num-prompts", 3, "--arrivals", "constant", "--request-rate", 100),
    )
    assert status == 1
    assert "connect" in out


def test_chat_sends_text_counted_by_the_local_tokeniser(tmp_path):
    words = {word: number for number, word in enumerate(["red", "green", "blue", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fake = FakeServer()
    with serving(fake) as base_url:
        status, out, err = run(
            *("--trace", AZURE, "--base-url", base_url, "--endpoint", "/v1/chat/completions", "--prompt-as", "text"),
            *("--tokenizer", tmp_path, "--num-prompts", 3, "--length-scale", 0.01, "--speed", 50, "--no-ignore-eos"),
        )
    assert status == 0, err
    lengths = sorted(len(body["messages"][0]["content"].split()) for body in fake.bodies)
    assert lengths == sorted(round(tokens * 0.01) for tokens in (374, 396, 879))
    assert "counted 3 of 3 prompts otherwise" in out
    assert not any("ignore_eos" in body for body in fake.bodies)


def test_ctrl_c_ends_the_run_and_still_reports(tmp_path):
    fake = FakeServer(dict.fromkeys(range(1, 50), "hang"))
    with serving(fake) as base_url:
        process = start(
            *("--trace", AZURE, "--base-url", base_url, "--vocab-size", 1000, "--length-scale", 0.01),
            *("--num-prompts", 10, "--arrivals", "constant", "--request-rate", 2),
            *("--result-dir", tmp_path, "--result-filename", "r.json"),
        )
        give_up = time.monotonic() + TIMEOUT_S
        while len(fake.bodies) < 3 and time.monotonic() < give_up:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"]
    assert sum(result["buckets"].values()) == 10
    assert result["buckets"]["cancelled"] >= 2
    assert result["buckets"]["not_sent"] >= 1
    assert "interrupted" in out
    assert "Traceback" not in err
