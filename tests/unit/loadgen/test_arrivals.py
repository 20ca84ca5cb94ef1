from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.arrivals import constant_times, gamma_times, poisson_times, spread_ticks


def gaps(times):
    return [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]


def variation(times):
    return pstdev(gaps(times)) / fmean(gaps(times))


def test_constant_arrivals_stand_at_equal_distances():
    assert constant_times(4, 2.0) == [0, 0.5, 1.0, 1.5]


def test_poisson_arrivals_have_the_rate_and_the_exponential_shape():
    times = poisson_times(20_000, 5.0, Random("a"))
    assert fmean(gaps(times)) == pytest.approx(0.2, rel=0.03)
    assert variation(times) == pytest.approx(1.0, rel=0.05)
    # Of an exponential, 1 - 1/e lies below the mean; of a uniform or constant, 1/2 or all.
    assert sum(gap < 0.2 for gap in gaps(times)) / 20_000 == pytest.approx(0.632, abs=0.02)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_burstiness(burstiness):
    times = gamma_times(20_000, 5.0, burstiness, Random("a"))
    assert fmean(gaps(times)) == pytest.approx(0.2, rel=0.05)
    assert variation(times) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_one_seed_draws_one_sequence():
    assert poisson_times(50, 1, Random("x")) == poisson_times(50, 1, Random("x"))
    assert poisson_times(50, 1, Random("x")) != poisson_times(50, 1, Random("y"))


@given(st.lists(st.sampled_from([0.0, 3.0, 6.0, 30.0, 33.0]), min_size=1, max_size=40).map(sorted))
def test_spreading_keeps_every_request_inside_its_tick_and_in_order(ticks):
    spread = spread_ticks(ticks, Random("x"))
    assert spread == sorted(spread)
    distinct = sorted(set(ticks))
    for tick, at_s in zip(ticks, spread, strict=True):
        behind = [later for later in distinct if later > tick]
        assert tick <= at_s
        assert not behind or at_s <= behind[0]


def test_a_pause_behind_a_tick_stays_a_pause():
    spread = spread_ticks([0, 0, 0, 3, 3, 3, 6, 6, 6, 60, 60], Random("x"))
    assert max(spread[6:9]) <= 9
    assert len(set(spread)) == 11


def test_one_single_tick_cannot_be_spread():
    assert spread_ticks([5.0, 5.0], Random("x")) == [5.0, 5.0]
