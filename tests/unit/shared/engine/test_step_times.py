"""The steps that are run to be measured, over a runner that keeps its own time."""

from dataclasses import dataclass, field

import pytest

from shared.engine.batch import work_of
from shared.engine.port import EngineLimits
from shared.engine.seats import is_decode
from shared.engine.step_times import NUM_REPEATS, measure_steps
from shared.policy.profile import SpeedProfile
from shared.policy.profile_fit import ProfileFit

TRUE = SpeedProfile(base_s=4.3e-3, row_s=1.0e-5, context_s=3.0e-8, token_s=2.16e-5, pair_s=1.0e-9)


@dataclass
class TimedRunner:
    """A device that takes for each batch as long as it should, after the ones before it; the first of a size longer."""

    num_ahead: int
    slowness: float = 1.0
    now_s: float = 100.0
    idle_from_s: float = 0.0
    launched: list = field(default_factory=list)
    num_in_flight: int = 0
    sizes: set = field(default_factory=set)

    def clock_s(self):
        return self.now_s

    def launch(self, rows):
        assert self.num_in_flight <= self.num_ahead
        self.num_in_flight += 1
        num_decode = sum(is_decode(row) for row in rows)
        took_s = self.slowness * TRUE.step_s(work_of(rows, num_decode))
        size = (len(rows), rows[0].end - rows[0].start)
        if size not in self.sizes:
            took_s += 0.05
        self.sizes.add(size)
        self.idle_from_s = max(self.idle_from_s, self.now_s) + took_s
        self.launched.append((rows, self.idle_from_s))
        if not self.num_ahead:
            self.now_s = self.idle_from_s
        return Batch(self, self.idle_from_s)


@dataclass
class Batch:
    runner: TimedRunner
    done_s: float

    def wait(self):
        self.runner.num_in_flight -= 1
        self.runner.now_s = max(self.runner.now_s, self.done_s)


DECODE = EngineLimits(max_context=32_768, num_pages=10_000, max_running=256, max_batch_tokens=2048)
PREFILL = EngineLimits(max_context=131_072, num_pages=10_000, max_running=256, max_batch_tokens=8192)
SMALL = EngineLimits(max_context=512, num_pages=8, max_running=4, max_batch_tokens=64)


@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("limits", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_the_speeds_follow_from_them(limits, num_ahead):
    runner = TimedRunner(num_ahead)
    fit = ProfileFit()
    for step in measure_steps(runner, limits, budget_s=3.0, clock_s=runner.clock_s):
        fit.add(step.work, step.seconds)
    profile = fit.profile()
    assert profile.base_s == pytest.approx(TRUE.base_s, rel=0.03)
    assert profile.token_s == pytest.approx(TRUE.token_s, rel=0.1)
    assert profile.context_s == pytest.approx(TRUE.context_s, rel=0.1)
    for num_new, num_before in ((300, 0), (2000, 0), (2000, 6000)):
        assert profile.prefill_s(num_new, num_before) == pytest.approx(TRUE.prefill_s(num_new, num_before), rel=0.05)
    for num_rows in (1, 64, 256):
        step_s = TRUE.decode_step_s(num_rows, 1000 * num_rows)
        assert profile.decode_step_s(num_rows, 1000 * num_rows) == pytest.approx(step_s, rel=0.05)


@pytest.mark.parametrize("limits", [DECODE, PREFILL, SMALL], ids=["decode", "prefill", "small"])
def test_they_are_such_as_an_engine_launches_and_leave_no_trace(limits):
    runner = TimedRunner(1)
    measured = measure_steps(runner, limits, budget_s=100.0, clock_s=runner.clock_s)
    assert len(measured) * (NUM_REPEATS + 1) == len(runner.launched) * NUM_REPEATS
    for rows, _ in runner.launched:
        assert sum(row.end - row.start for row in rows) <= limits.max_batch_tokens
        assert sorted({row.seat for row in rows}) == list(range(len(rows))) == list(range(min(len(rows), 256)))
        assert len(rows) <= limits.max_running
        for row in rows:
            assert row.sequence < -1, "no sequence of an engine, and not nobody's"
            assert 0 <= row.start < row.end <= min(len(row.ids), limits.max_context)
            assert row.end <= len(row.pages) * 64
            assert all(0 <= page < limits.num_pages for page in row.pages)


def test_a_slow_device_is_measured_by_small_steps_alone():
    runner = TimedRunner(0, slowness=50.0)
    measured = measure_steps(runner, DECODE, budget_s=3.0, clock_s=runner.clock_s)
    assert measured
    assert runner.now_s - 100.0 < 6.0
    assert max(step.work.num_prompt_tokens for step in measured) < 2048
