import sys
from contextlib import asynccontextmanager
from math import inf

from benchmarks.control_plane import path
from benchmarks.control_plane.exposition import Histogram
from benchmarks.control_plane.loads import Setup
from benchmarks.control_plane.path import (
    FRAME_AGE,
    STEP_SECONDS,
    STEP_TOKENS,
    Look,
    PathOptions,
    measure_path,
    services,
)
from shared.errors import StartupError

SETUP = Setup(
    model="unused",
    model_name="m",
    device="cuda",
    dtype="bfloat16",
    num_pages=64,
    max_running=8,
    max_batch_tokens=256,
    input_tokens=20,
    output_tokens=6,
    seconds=0.1,
    seed=0,
)


async def test_the_stack_gets_the_engine_settings_and_a_failure_is_told(monkeypatch, tmp_path):
    compositions = []

    @asynccontextmanager
    async def broken_stack(composition, *_args, **_kwargs):
        compositions.append(composition)
        raise StartupError("no broker")
        yield

    monkeypatch.setattr(path, "local_stack", broken_stack)
    told = []
    options = PathOptions(counts={"decode": 1}, gpus={"prefill": "0", "decode": "1"}, env={"BATON_X": "1"})
    measured = await measure_path(SETUP, [], options, tmp_path, told.append)
    assert measured["results"] == {}
    assert "no broker" in measured["error"]
    assert told == [measured["error"]]
    (composition,) = compositions
    assert composition.gpus == {"prefill": "0", "decode": "1"}
    assert composition.env == {
        "BATON_MAX_RUNNING": "8",
        "BATON_MAX_BATCH_TOKENS": "256",
        "BATON_LOCAL_PREFILL": "false",
        "BATON_X": "1",
    }
    assert composition.max_restarts == 0


def test_paced_workers_take_the_place_of_those_with_a_model():
    commands = {service.name: service.command for service in services(SETUP)}
    assert commands["decode"][1:] == ("-m", "services.decode")
    paced = Setup(**{name: getattr(SETUP, name) for name in SETUP.__slots__} | {"fake_step_ms": 2.5})
    commands = {service.name: service.command for service in services(paced)}
    assert commands["decode"] == (sys.executable, "-m", "benchmarks.control_plane.paced", "decode", "2.5")
    assert commands["edge"][1:] == ("-m", "services.stream_out")


def test_workers_and_edges_are_told_apart_by_what_they_count():
    def histogram(count, total):
        return Histogram({0.002: count, inf: count}, total)

    before = Look(
        0.0, {}, {"decode-0": {STEP_SECONDS: histogram(5, 1.0), STEP_TOKENS: histogram(5, 5.0)}, "edge-0": {}}
    )
    after = Look(
        1.0,
        {},
        {
            "decode-0": {STEP_SECONDS: histogram(15, 1.1), STEP_TOKENS: histogram(15, 85.0)},
            "edge-0": {FRAME_AGE: histogram(4, 0.004)},
        },
    )
    assert path._workers(before, after) == {"decode-0": {"steps": 10, "step_mean_ms": 10.0, "token_rows_mean": 8.0}}
    (age,) = path._frame_age(before, after)["frame_age_ms"].values()
    assert (age["count"], age["mean"], age["p50"]) == (4, 1.0, 1.0)
    assert path._frame_age(before, before) == {}
