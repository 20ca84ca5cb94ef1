"""What a worker measures of itself: how long its steps take for their work."""

from collections.abc import Iterable
from dataclasses import astuple

from shared.policy.profile import LinkRate, SpeedProfile
from shared.policy.profile_fit import MeasuredStep, ProfileFit
from shared.worker.engine_thread import Step

MAX_GAP_SHARE = 0.2
"""Of a batch's time the thread may have been elsewhere between two steps: beyond that the device may have waited."""


class SpeedMeter:
    """Learns from the steps as they come, in order.

    Attributes:
        profile: as of the last `refresh`; None before enough has run.
    """

    def __init__(self, measured: Iterable[MeasuredStep] = ()) -> None:
        """`measured`: steps of this engine that were run to be measured."""
        self._fit = ProfileFit()
        self._before: Step | None = None
        self.profile: SpeedProfile | None = None
        for step in measured:
            self._fit.add(step.work, step.seconds)
        self.refresh()

    @property
    def scatter(self) -> float:
        """How far off the profile is for the middle one of all sizes of steps, as a share."""
        return self._fit.scatter

    def add(self, step: Step) -> None:
        """The next step has run."""
        batch_s = batch_time_s(step, self._before)
        self._before = step
        if batch_s is not None:
            self._fit.add(step.output.work, batch_s)

    def refresh(self) -> SpeedProfile | None:
        """The profile by all that has run; takes some milliseconds if anything has."""
        fitted = self._fit.profile()
        self.profile = None if fitted is None else SpeedProfile(*(rounded(speed) for speed in astuple(fitted)))
        return self.profile


def batch_time_s(step: Step, before: Step | None) -> float | None:
    """How long the batch took that `step` waited for; None if that cannot be told.

    A batch that was launched in the step before had the device to itself once that step's batch was done. One that
    found the device idle was launched in its own step.
    """
    if before is None or not before.output.num_in_flight:
        return step.ended_s - step.started_s
    batch_s = step.ended_s - before.ended_s
    return batch_s if step.started_s - before.ended_s <= MAX_GAP_SHARE * batch_s else None


def rounded(value: float) -> float:
    """In three digits: what is told again need not be read again."""
    return float(f"{value:.3g}")


def rounded_rate(rate: LinkRate) -> LinkRate:
    return LinkRate(rounded(rate.latency_s), rounded(rate.bytes_per_s))
