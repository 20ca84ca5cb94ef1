"""Whether this edge may judge who lives: only who has seen for a whole lease can tell the dead from the unseen."""

from dataclasses import dataclass

from shared.request import Incarnation
from shared.state.keys import LEASE_MS, LEASE_S

SILENCE_S = LEASE_S / 2
"""A log that is there answers twice a second. Workers say after a lease that it is away: a judge whom it does not
answer either must know by then."""


@dataclass(frozen=True, slots=True)
class Alive:
    """Who lives, and who does not.

    Attributes:
        lost: workers that were needed before the store was asked, and have no lease, or their words do not reach the
            log. A worker that started since is not among those that live, and may have work already.
    """

    edges: frozenset[Incarnation]
    lost: frozenset[Incarnation]


class Sight:
    """Blind is whose own loop stood still, whom the store or the log did not answer, and whose store was emptied; for a
    lease from then on, for so long those that live may not have been able to say so."""

    def __init__(self, now_s: float) -> None:
        self._clear_since_s = now_s
        self._looked_s = now_s

    def look(self, now_s: float, *, up_ms: int, silent_s: float) -> None:
        """The store has told who lives.

        Args:
            up_ms: see `State.up_ms`.
            silent_s: see `Bus.silent_s`.
        """
        stood_still = now_s - self._looked_s > LEASE_S
        self._looked_s = now_s
        if stood_still or up_ms < LEASE_MS or silent_s > SILENCE_S:
            self._clear_since_s = now_s

    def fail(self, now_s: float) -> None:
        """The store has not answered."""
        self._looked_s = self._clear_since_s = now_s

    def is_clear(self, now_s: float) -> bool:
        """Whether a verdict may be passed."""
        return now_s - self._clear_since_s >= LEASE_S
