import pytest

from shared.engine.port import StepOutput
from shared.policy.profile import LinkRate, SpeedProfile, StepWork, num_pairs
from shared.policy.profile_fit import MeasuredStep
from shared.worker.engine_thread import Step
from shared.worker.speeds import SpeedMeter, batch_time_s, rounded_rate

TRUE = SpeedProfile(base_s=4.0e-3, row_s=1.0e-5, context_s=3.0e-8, token_s=2.0e-5, pair_s=1.0e-9)


def a_step(started_s, ended_s, *, num_in_flight=0, work=StepWork(1, 100)):  # noqa: B008 - nobody changes it
    return Step(StepOutput(work=work, num_in_flight=num_in_flight), started_s, ended_s)


@pytest.mark.parametrize(
    ("before", "took_s"),
    [
        (None, 2.0),
        (a_step(5.0, 9.9), 2.0),
        (a_step(5.0, 9.9, num_in_flight=1), pytest.approx(2.1)),
        (a_step(5.0, 8.0, num_in_flight=1), None),
    ],
    ids=["the first", "behind an idle engine", "launched in the step before", "the thread was elsewhere"],
)
def test_how_long_a_batch_took(before, took_s):
    assert batch_time_s(a_step(10.0, 12.0), before) == took_s


def works():
    for num_rows in (1, 4, 16, 64, 256):
        for context in (200, 2000):
            yield StepWork(num_rows, num_rows * context)
    for num_new in (50, 500, 2000):
        for num_before in (0, 8000):
            yield StepWork(0, 0, num_new, num_pairs(num_new, num_before))


def test_the_profile_follows_steps_that_overlap():
    """Each step launches the next batch, waits for its own, and gives way to commands for a moment."""
    meter, now_s = SpeedMeter(), 0.0
    assert meter.profile is None
    for _ in range(5):
        for work in works():
            took_s = TRUE.step_s(work)
            meter.add(a_step(now_s + 0.05 * took_s, now_s + took_s, num_in_flight=1, work=work))
            now_s += took_s
    assert meter.profile is None, "until the next look"
    profile = meter.refresh()
    for work in works():
        assert profile.step_s(work) == pytest.approx(TRUE.step_s(work), rel=0.02)
    assert meter.scatter < 0.01


def test_what_was_measured_before_is_there_from_the_beginning():
    steps = [MeasuredStep(work, TRUE.step_s(work)) for work in works() for _ in range(3)]
    profile = SpeedMeter(steps).profile
    assert profile.token_s == float(f"{profile.token_s:.3g}") == pytest.approx(TRUE.token_s, rel=0.02)


def test_rates_are_told_in_three_digits():
    assert rounded_rate(LinkRate(3.14159e-4, 3.40321e11)) == LinkRate(3.14e-4, 3.4e11)
