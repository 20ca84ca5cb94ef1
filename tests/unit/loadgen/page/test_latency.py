from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.measure import Slo
from loadgen.page.latency import CURVE_POINTS, curve, distributions_of, hand_off_of
from tests.unit.loadgen.builders import record
from tests.unit.loadgen.page.runs import answered, failed, mixed


@given(st.lists(st.floats(0, 1e4), max_size=3000).map(sorted))
def test_a_curve_rises_and_ends_at_the_largest_value(values):
    points = curve(values)
    assert len(points) <= CURVE_POINTS
    assert list(points) == sorted(points)
    assert all(0 < share < 1 for _, share in points)
    if values:
        assert points[-1][0] == values[-1]


def test_a_thinned_curve_keeps_the_whole_tail():
    values = [float(value) for value in range(100_000)]
    assert [value for value, _ in curve(values)][-5:] == values[-5:]


def test_distributions_are_of_completed_requests_and_lateness_of_all_sends():
    found = distributions_of(mixed(20), Slo(ttft_ms=500))
    assert found["ttft"].summary.count == 18
    assert found["ttft"].limit_s == 0.5
    assert found["tpot"].limit_s is None
    assert found["lateness"].summary.count == 20
    assert distributions_of([], Slo())["ttft"].points == ()


def test_the_hand_off_is_the_first_gap_less_the_usual_one_of_the_same_request():
    quick = record(0, gaps_s=(0.5, 0.1, 0.1, 0.3), first_token_s=1.0, last_token_s=2.0, answered_s=2.0)
    slow = replace(quick, gaps_s=(1.0, 0.6))
    found = hand_off_of([quick, slow, replace(quick, gaps_s=()), failed(1)])
    assert found.extra.count == 2
    assert found.extra.mean == pytest.approx(0.4)
    assert (found.first.summary.count, found.later.summary.count) == (2, 4)
    assert [(entry.place, entry.summary.count) for entry in found.places] == [(1, 2), (2, 2), (3, 1), (4, 1)]


def test_stamps_split_the_hand_off():
    found = hand_off_of([answered(0, rng=Random(1))])
    assert found.handing_on.median == pytest.approx(0.1, abs=1e-5)
    assert found.rest.median == pytest.approx(0.15, abs=1e-5)
    assert hand_off_of([answered(0, rng=Random(1), stamped=False)]).handing_on is None
