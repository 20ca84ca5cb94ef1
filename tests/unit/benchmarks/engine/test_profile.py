import pytest

from benchmarks.engine.profile import DeviceWork, summarise


def test_pauses_between_steps_do_not_count_and_those_within_do():
    # Two steps of two kernels each, 2 us apart; 100 us between the steps.
    work = [
        DeviceWork("a", 0, 10),
        DeviceWork("b", 12, 10),
        DeviceWork("a", 122, 10),
        DeviceWork("b", 134, 10),
    ]
    profile = summarise(work, 2)
    assert profile.step_ms == pytest.approx(0.022)
    assert profile.busy_ms == pytest.approx(0.020)


def test_work_that_runs_at_the_same_time_is_busy_once():
    profile = summarise([DeviceWork("a", 0, 10), DeviceWork("copy", 5, 10)], 1)
    assert profile.step_ms == profile.busy_ms == pytest.approx(0.015)


def test_kernels_are_named_by_their_share_of_a_step():
    work = [DeviceWork("small", 0, 1), DeviceWork("large", 1, 8), DeviceWork("small", 9, 1), DeviceWork("large", 10, 8)]
    assert summarise(work, 2).kernels == (("large", 1.0, 0.008), ("small", 1.0, 0.001))
