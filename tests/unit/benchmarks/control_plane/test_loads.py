import json
from itertools import pairwise
from statistics import fmean

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.control_plane.loads import (
    FULL,
    HALF,
    PAUSE_S,
    Calibration,
    Load,
    Setup,
    calibrated_streams,
    check_pages,
    closed_job,
    job_maker,
    load_of,
    open_rows,
    parse_names,
)
from shared.errors import StartupError

CALIBRATIONS = [Calibration(1, 100.0), Calibration(16, 1280.0), Calibration(64, 2560.0)]


def setup(**fields) -> Setup:
    known = {
        "model": "unused",
        "model_name": "m",
        "device": "cpu",
        "dtype": "float32",
        "num_pages": 64,
        "max_running": 64,
        "max_batch_tokens": 512,
        "input_tokens": 32,
        "output_tokens": 10,
        "seconds": 20.0,
        "seed": 3,
    }
    return Setup(**(known | fields))


def test_names_are_streams_half_or_full():
    assert parse_names("1, 16,half,full") == ("1", "16", HALF, FULL)
    for wrong in ("0", "-1", "many", "", "1,,2"):
        with pytest.raises(StartupError, match="--streams"):
            parse_names(wrong)


def test_calibration_ends_at_what_the_engine_runs_at_once():
    assert calibrated_streams(("16", "1", HALF), 64) == [1, 16, 64]
    with pytest.raises(StartupError, match="--max-running 8"):
        calibrated_streams(("16",), 8)


def test_engines_must_hold_the_most_requests():
    check_pages(setup(max_running=4, input_tokens=100, output_tokens=28, num_pages=12))
    with pytest.raises(StartupError, match="need 16"):
        check_pages(setup(max_running=4, input_tokens=100, output_tokens=29, num_pages=12))


def test_rate_and_duration_follow_littles_law():
    calibration = Calibration(16, 1280.0)
    assert calibration.rate_per_s(10) == 128.0
    assert calibration.duration_s(10) == 16 / 128


def test_a_number_of_streams_becomes_the_rate_that_keeps_so_many_in_flight():
    load = load_of("16", 1, setup(), CALIBRATIONS)
    assert load.rate_per_s == 128.0
    assert load.streams == pytest.approx(load.rate_per_s * CALIBRATIONS[1].duration_s(10))


def test_a_load_runs_longer_than_a_request_takes_before_and_after_what_is_measured():
    quick, slow = load_of("16", 1, setup(), CALIBRATIONS), load_of("1", 0, setup(output_tokens=500), CALIBRATIONS)
    assert quick.lead_s == quick.trail_s == 1.0
    assert slow.lead_s == slow.trail_s == pytest.approx(1.2 * 5)


def test_half_is_half_the_saturating_rate():
    assert load_of(HALF, 0, setup(), CALIBRATIONS).rate_per_s == 128.0


def test_one_stream_and_full_are_closed_loops():
    lone, full = load_of("1", 0, setup(), CALIBRATIONS), load_of(FULL, 1, setup(), CALIBRATIONS)
    assert (lone.rate_per_s, lone.streams, lone.pause_s) == (None, 1, PAUSE_S)
    assert (full.rate_per_s, full.streams, full.pause_s) == (None, 64, 0.0)


def test_only_the_middle_of_a_load_is_measured():
    load = load_of("16", 0, setup(), CALIBRATIONS)
    assert not load.measures(load.lead_s - 0.001)
    assert load.measures(load.lead_s)
    assert load.measures(load.lead_s + 19.999)
    assert not load.measures(load.lead_s + 20.0)


def test_open_rows_fill_the_whole_load_at_its_rate_and_repeat_for_one_seed():
    load = load_of("16", 0, setup(), CALIBRATIONS)
    rows = open_rows(load, setup())
    assert rows == open_rows(load, setup())
    assert rows != open_rows(load, setup(seed=4))
    assert len(rows) / load.total_s == pytest.approx(128.0, rel=0.1)
    assert load.total_s - 0.1 < rows[-1].at_s < load.total_s
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(rows)]
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 128, rel=0.1)


def test_no_two_requests_of_a_run_share_a_prompt():
    loads = [load_of(name, place, setup(), CALIBRATIONS) for place, name in enumerate(("16", "64"))]
    indices = [row.trace_index for load in loads for row in open_rows(load, setup())]
    assert len(indices) == len(set(indices))


def test_the_first_requests_of_a_closed_load_end_one_by_one(tmp_path):
    Tokenizer(WordLevel({f"w{token}": token for token in range(500)}, "w0")).save(str(tmp_path / "tokenizer.json"))
    made = setup(model=str(tmp_path))
    load = Load(name=FULL, streams=4, rate_per_s=None, lead_s=0, seconds=1, trail_s=0, pause_s=0, first_index=1_000_000)
    maker = job_maker(made, "test")
    jobs = [closed_job(maker, load, place, made) for place in range(6)]
    assert [job.row.output_tokens for job in jobs] == [2, 5, 8, 10, 10, 10]
    bodies = [json.loads(job.body) for job in jobs]
    assert [body["max_tokens"] for body in bodies] == [body["min_tokens"] for body in bodies] == [2, 5, 8, 10, 10, 10]
    assert len({tuple(body["prompt"]) for body in bodies}) == 6
    assert all(len(body["prompt"]) == 32 for body in bodies)
