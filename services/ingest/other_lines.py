"""The lines of other ingests: room is everybody's, and batch is in nobody's way."""

import math
from collections.abc import Sequence
from dataclasses import replace

from shared.policy.admission import BacklogReport
from shared.policy.line import Blocked

WAITS_FOR_ROOM_S = 0.1
"""Who has waited for so long does so because there is no room, and not for its turn."""


class OtherLines:
    """What was said of them at their last beats.

    Attributes:
        somebody_waits: for room, and is not batch.
        urgent_s: when somebody came there last who is not batch (unix seconds).
    """

    def __init__(self) -> None:
        self.somebody_waits = False
        self.urgent_s = -math.inf
        self._blocked: list[Blocked] = []
        self._said_s = -math.inf

    def note(self, reports: Sequence[BacklogReport], now_s: float) -> None:
        """All of them, as they are now."""
        self.somebody_waits = any(report.oldest_wait_s >= WAITS_FOR_ROOM_S for report in reports)
        self.urgent_s = now_s - min((each.quiet_s for each in reports if each.quiet_s is not None), default=math.inf)
        self._blocked = [report.blocked for report in reports if report.blocked is not None]
        self._said_s = now_s

    def hold_back(self, mine: Blocked, now_s: float) -> bool:
        """Whether the first of one of them, for whom there is no room, comes before the first here."""
        since_s = now_s - self._said_s
        return any(replace(each, for_s=each.for_s + since_s).holds_back(mine) for each in self._blocked)
