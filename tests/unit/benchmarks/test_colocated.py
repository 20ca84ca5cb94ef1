from itertools import count
from pathlib import Path
from random import Random

import pytest

from benchmarks.colocated import (
    DRAIN_S,
    VLLM,
    Answer,
    Arrival,
    Point,
    Run,
    arrivals_of,
    parse_points,
    result_of,
    run_point,
    table,
    trace_file,
)
from benchmarks.engine.drive import Work, greedy
from loadgen.traces import TraceRow, read_trace
from shared.engine.fake import fake_engine
from shared.errors import StartupError

SLICES = Path("loadgen/data")


def rows_of(*lengths):
    return [TraceRow(index, 0.0, *each) for index, each in enumerate(lengths)]


def test_points_are_read_in_order():
    assert parse_points("conv:8,13.5;code:6") == [Point("conv", 8), Point("conv", 13.5), Point("code", 6)]


def test_the_points_of_the_issue_have_a_peer():
    assert set(parse_points("conv:8,13,17,21;code:6,10,14,18")) == VLLM["llama-3.1-8b"].keys()


def test_a_trace_is_found_by_a_word_of_its_name():
    assert len(read_trace(trace_file(SLICES, "conv"))) == 60
    with pytest.raises(StartupError, match="2 csv files"):
        trace_file(SLICES, "azure")


def test_arrivals_keep_the_order_and_lengths_of_the_trace():
    rows = rows_of((5, 3), (20, 1), (7, 2), (4, 4)) * 20
    arrivals = arrivals_of(rows, 10.0, 1.0, 21, Work(1000, 1), Random(1))
    wanted = [(5, 3), (7, 2), (4, 4)] * 20
    assert [(len(a.request.ids), a.request.sampling.max_tokens) for a in arrivals] == wanted[: len(arrivals)]
    assert all(a.request.sampling.ignore_eos for a in arrivals)
    assert 0 < arrivals[0].at_s < arrivals[-1].at_s < 1.0


def test_a_trace_that_is_too_short_is_refused():
    with pytest.raises(StartupError, match="3 requests"):
        arrivals_of(rows_of((5, 3)) * 3, 10.0, 100.0, 1000, Work(1000, 1), Random(1))


def test_every_arrival_is_answered_in_full():
    requests = Work(1000, 1).requests(5, 70, greedy(4))
    run = run_point(fake_engine(), [Arrival(0.002 * index, request) for index, request in enumerate(requests)])
    result = result_of(Point("conv", 1), run, 0)
    assert (result.num_requests, result.num_complete, result.attained) == (5, 5, [100, 100])
    assert all(answer.num_tokens == 4 and answer.ttft_s > 0 for answer in run.answers.values())


def test_what_is_not_done_in_time_is_given_up():
    engine = fake_engine()
    ticks = count()
    requests = Work(1000, 1).requests(2, 5, greedy(100))
    # Each look at the clock takes a quarter of the time there is.
    run = run_point(engine, [Arrival(0.0, each) for each in requests], lambda: next(ticks) * DRAIN_S / 4)
    assert [answer.is_complete for answer in run.answers.values()] == [False, False]
    assert all(answer.tpot_s == float("inf") for answer in run.answers.values())
    assert engine.stats().num_free_pages == engine.limits.num_pages


def test_attainment_needs_both_limits():
    answers = {
        "good": Answer(0.0, 3, first_s=0.4, last_s=0.44, num_tokens=3),
        "slow tokens": Answer(0.0, 3, first_s=0.4, last_s=0.5, num_tokens=3),
        "late": Answer(1.0, 3, first_s=1.6, last_s=1.62, num_tokens=3),
        "incomplete": Answer(0.0, 3, first_s=0.1, last_s=0.1, num_tokens=1),
    }
    result = result_of(Point("conv", 8), Run(answers), 0)
    assert result.attained == [75, 25]
    assert result.num_complete == 3
    assert result.ttft_ms[0] == pytest.approx(400)


def test_a_point_stands_beside_its_peer():
    point = Point("conv", 8)
    result = result_of(point, Run({"a": Answer(0.0, 2, first_s=0.04, last_s=0.05, num_tokens=2)}), 0)
    lines = table([(point, result)], VLLM["llama-3.1-8b"]).splitlines()
    assert "40 / 40 / 40" in lines[2]
    assert "40 / 94 / 203" in lines[3]
