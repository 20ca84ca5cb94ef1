import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadgen.measure import Slo, attainment
from loadgen.page.slo import MAX_LIMITS, limits_ms, slo_grid_of
from tests.unit.loadgen.page.runs import failed, mixed


def test_the_given_limits_are_in_the_grid_with_their_attainment():
    records, slo = mixed(60), Slo(ttft_ms=432, tpot_ms=98, e2el_ms=1500)
    grid = slo_grid_of(records, slo)
    share = grid.shares[grid.tpot_limits_ms.index(98)][grid.ttft_limits_ms.index(432)]
    assert share == attainment(records, slo).share
    assert grid.given == (432, 98)


def test_looser_limits_are_met_by_no_fewer_and_without_any_only_failures_miss():
    grid = slo_grid_of(mixed(60), Slo())
    for along in (*grid.shares, *zip(*grid.shares, strict=True)):
        assert list(along) == sorted(along)
    assert grid.shares[-1][-1] == 0.9
    assert grid.given is None


def test_a_run_without_answers_has_no_grid():
    assert slo_grid_of([failed(0)], Slo(ttft_ms=1)) is None
    assert slo_grid_of([], Slo()) is None


@pytest.mark.parametrize(
    ("values_s", "first_ms", "last_ms"), [([0.01, 0.09], 10, 100), ([0.5], 500, 500), ([0.000_1, 90.0], 1, 100_000)]
)
def test_limits_are_round_few_and_reach_the_largest_value(values_s, first_ms, last_ms):
    *limits, none = limits_ms(values_s, None)
    assert none is None
    assert len(limits) <= MAX_LIMITS
    assert limits[0] >= first_ms
    assert limits[-1] == last_ms
    assert limits_ms([None, 0.0], None) == (None,)


@given(st.lists(st.floats(1e-9, 1e5), min_size=1), st.none() | st.floats(0.001, 1e6))
@example([99_999.999_999_999_99], None)
def test_limits_rise_and_the_loosest_is_met_by_all(values_s, given_ms):
    *limits, _ = limits_ms(values_s, given_ms)
    assert limits == sorted(set(limits))
    assert limits[-1] >= max(values_s) * 1e3
    assert given_ms is None or given_ms in limits
