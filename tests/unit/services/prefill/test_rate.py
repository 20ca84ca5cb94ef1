import pytest

from services.prefill.rate import PrefillRate


def test_nothing_is_known_before_a_step_that_counts():
    rate = PrefillRate()
    rate.add(0, 1.0)
    rate.add(63, 1.0)
    assert rate.tokens_per_s is None


def test_long_steps_decide_and_old_ones_are_forgotten():
    rate = PrefillRate()
    rate.add(1000, 1.0)
    assert rate.tokens_per_s == 1000
    rate.add(100, 1.0)  # short: it moves the rate by less than the mean of both would
    assert rate.tokens_per_s == pytest.approx(1000 / 1.9)
    for _ in range(100):
        rate.add(4000, 1.0)
    assert rate.tokens_per_s == pytest.approx(4000, rel=1e-3)
