from dataclasses import replace
from random import Random

import pytest

from loadgen.page.timeline import MAX_BARS, bin_width_s, flow_of, most_in_flight, timeline_of, token_times
from tests.unit.loadgen.builders import record
from tests.unit.loadgen.page.runs import answered, failed, mixed

STREAMED = record(first_token_s=1.0, last_token_s=3.0, answered_s=3.0, gaps_s=(0.5, 1.5), output_tokens=5)


def test_a_gap_brings_its_share_of_the_tokens_behind_the_first():
    assert list(token_times(STREAMED)) == [(1.0, 1.0), (1.5, 2.0), (3.0, 2.0)]


def test_unseen_pieces_are_spread_evenly_from_the_first_token_to_the_last():
    assert list(token_times(replace(STREAMED, gaps_s=()))) == [(1.0, 1), (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 1)]


def test_a_broken_answer_counts_its_pieces():
    assert [count for _, count in token_times(replace(STREAMED, output_tokens=None))] == [1, 1, 1]
    assert list(token_times(failed(0))) == []


def test_bins_tell_the_most_requests_at_once_and_keep_those_that_last():
    rows = [(0.0, 4.5), (0.2, 0.8), (2.1, 2.2), (2.3, 2.4)]
    records = [record(row, start_s, ended_s=end_s) for row, (start_s, end_s) in enumerate(rows)]
    assert most_in_flight(records, 1.0, 6) == (2, 1, 2, 1, 1, 0)
    assert most_in_flight([], 1.0, 3) == (0, 0, 0)


def test_rates_over_the_run_add_up():
    records = mixed(50)
    flow = flow_of(records, 7.0)
    assert sum(flow.arrivals_per_s) * flow.bin_s == pytest.approx(50)
    tokens = sum(each.output_tokens for each in records if each.completed)
    assert sum(flow.tokens_per_s) * flow.bin_s == pytest.approx(tokens)


@pytest.mark.parametrize(("end_s", "width_s"), [(59.0, 1.0), (61.0, 2.0), (200.0, 5.0), (0.01, 0.001)])
def test_bins_are_round_and_not_too_many(end_s, width_s):
    assert bin_width_s(end_s, 60) == width_s


def test_there_is_a_bar_for_each_request_until_they_would_be_too_thin():
    rng = Random(1)
    few = [answered(row, row * 0.01, rng=rng) for row in range(MAX_BARS)]
    assert len(timeline_of(few, 1.0).bars) == MAX_BARS
    many = timeline_of([*few, failed(MAX_BARS, 2.0)], 1.0)
    assert many.bars == ()
    assert sum(entry.requests for entry in many.bins) == MAX_BARS + 1
    assert sum(entry.failed for entry in many.bins) == 1


def test_the_time_axis_holds_every_end():
    late = record(ended_s=9.0)
    assert timeline_of([late], 2.0).end_s == 9
    assert timeline_of([late], 12.0).end_s == 12
    assert timeline_of([], 0.0).end_s > 0
