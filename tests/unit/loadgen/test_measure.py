from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.client import Observation
from loadgen.measure import (
    COMPLETED,
    Slo,
    attainment,
    bucket_of_answer,
    measure,
    percentile,
    record_of,
    stage_times,
    summarise,
)
from shared.request import Event
from tests.unit.loadgen.builders import record, scheduled


def answered(row=0, at_s=10.0, ttft_s=1.0, gaps_s=(0.2, 0.4), output_tokens=3, **fields):
    """A completed record whose pieces came `gaps_s` apart."""
    first_s = at_s + ttft_s
    known = {"first_token_s": first_s, "last_token_s": first_s + sum(gaps_s), "answered_s": first_s + sum(gaps_s)}
    return record(row, at_s, gaps_s=tuple(gaps_s), output_tokens=output_tokens, **(known | fields))


def test_latencies_of_one_answer():
    one = answered(sent_s=10.25)
    assert one.lateness_s == 0.25
    assert (one.ttft_s, one.ttft_from_send_s) == (1.0, 0.75)
    assert one.tpot_s == pytest.approx(0.3)
    assert one.handoff_s == 0.2
    assert (one.e2el_s, one.e2el_from_send_s) == (pytest.approx(1.6), pytest.approx(1.35))
    assert one.gaps_per_token_s == [0.2, 0.4]


def test_a_gap_is_divided_by_the_tokens_it_brought():
    assert answered(gaps_s=(0.2, 0.4), output_tokens=5).gaps_per_token_s == [0.1, 0.2]


def test_an_answer_of_one_token_has_no_time_per_output_token():
    one = answered(gaps_s=(), output_tokens=1)
    assert one.tpot_s is None
    assert one.handoff_s is None
    assert one.gaps_per_token_s == []
    assert Slo(tpot_ms=1).missed(one) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_percentiles_interpolate_between_the_neighbours(values):
    ascending = sorted(values)
    assert percentile(ascending, 0) == ascending[0]
    assert percentile(ascending, 100) == ascending[-1]
    assert percentile(ascending, 50) == pytest.approx(median(values), abs=1e-6)


def test_a_summary_leaves_out_what_was_not_measured():
    summary = summarise([1.0, None, 3.0])
    assert (summary.count, summary.mean, summary.median, summary.std) == (2, 2, 2, 1)
    assert summary.percentiles[99] == pytest.approx(2.98)
    assert summarise([None]) is None


def test_attainment_is_of_all_rows_and_a_good_row_meets_every_limit():
    records = [
        answered(0),
        answered(1, ttft_s=2.0),
        answered(2, gaps_s=(2.0, 2.0)),
        answered(3, first_token_s=None),
        record(4, bucket="timeout"),
    ]
    attained = attainment(records, Slo(ttft_ms=1000, tpot_ms=300.1))
    assert (attained.good, attained.share) == (1, 0.2)
    assert attained.missed == {"ttft": 2, "tpot": 2}
    assert attainment(records, Slo()).good == 4


@pytest.mark.parametrize(
    ("fields", "bucket"),
    [
        ({"output_tokens": 3}, COMPLETED),
        ({"output_tokens": 2}, "wrong_length"),
        ({"output_tokens": 4}, "wrong_length"),
        ({}, "no_usage"),
        ({"output_tokens": 3, "duplicated": True}, "duplicate"),
    ],
)
def test_the_bucket_of_an_answer(fields, bucket):
    assert bucket_of_answer(Observation(**fields), 3, exact_length=True) == bucket


def test_a_contradiction_that_comes_later_makes_a_completed_row_a_duplicate():
    seen = Observation(output_tokens=3, duplicated=True)
    known = {"started_s": 0.0, "ended_s": 1.0, "prompt_tokens": 4, "detail": ""}
    assert record_of(scheduled(0), seen, bucket=COMPLETED, **known).bucket == "duplicate"
    assert record_of(scheduled(0), seen, bucket="timeout", **known).bucket == "timeout"


def test_the_numbers_of_a_run():
    records = [
        answered(0, at_s=0.0, cached_tokens=2),
        answered(1, at_s=0.5, served_prompt_tokens=6),
        record(2, at_s=0.5, bucket="http_429", prompt_tokens=3, ended_s=0.6),
        record(3, at_s=9.0, bucket="not_sent", sent_s=None, prompt_tokens=None),
    ]
    results = measure(records, Slo(), 4.0, 0.0)
    assert results.buckets == {COMPLETED: 2, "http_429": 1, "not_sent": 1}
    assert (results.completed, results.failed) == (2, 2)
    assert (results.total_input_tokens, results.total_output_tokens, results.total_cached_tokens) == (10, 6, 2)
    assert (results.prompts_off, results.counts_differ) == (1, 1)
    assert results.max_concurrent_requests == 3
    assert measure([*records, answered(4, at_s=2.5)], Slo(), 4.5, 0.0).max_concurrent_requests == 3
    assert results.lateness.count == 3
    assert results.latencies["itl"].count == 4
    assert results.latencies["ttft"].mean == pytest.approx(1.0)


def test_a_failed_request_is_under_way_until_its_failure():
    records = [
        record(0, at_s=0.0, bucket="http_429", ended_s=0.5),
        answered(1, at_s=1.0),
        record(2, at_s=9.0, bucket="not_sent", sent_s=None),
    ]
    assert measure(records, Slo(), 10.0, 0.0).max_concurrent_requests == 1


def test_no_rows_are_no_attainment():
    assert attainment([], Slo(ttft_ms=1)).share == 0


def test_stages_are_differences_of_successive_events_from_the_send_to_the_receipt():
    start = 1_700_000_000.0
    moved = {Event.ACCEPTED: start + 10.1, Event.FIRST_TOKEN: start + 10.6, Event.DECODING: start + 10.8}
    ended_at_first = {Event.ACCEPTED: start + 10.3, Event.FIRST_TOKEN: start + 10.6, Event.FINISHED: start + 10.7}
    stages = stage_times([answered(stamps=moved), answered(stamps=ended_at_first), answered()], start)
    assert list(stages) == [
        "sent → accepted",
        "accepted → first_token",
        "first_token → decoding",
        "first_token → finished",
        "decoding → received",
        "finished → received",
    ]
    assert stages["sent → accepted"].mean == pytest.approx(0.2, abs=1e-5)
    assert stages["accepted → first_token"].count == 2
    assert stages["first_token → decoding"].median == pytest.approx(0.2, abs=1e-5)


def test_the_edges_own_end_is_no_stage():
    start = 1_700_000_000.0
    stamps = {Event.FINISHED: start + 11, Event.DELIVERED: start + 12}
    assert list(stage_times([answered(stamps=stamps)], start)) == ["sent → finished", "finished → received"]
