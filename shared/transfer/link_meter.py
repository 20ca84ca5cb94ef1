"""How fast a link is, and how long one may wait for it."""

from collections.abc import Callable

from shared.transfer.plan import LinkSpeed

STALL_S = 5.0
"""A peer that makes no progress for so long, beyond what the link's speed explains, is taken for dead."""

SHARE = 4.0
"""How many times slower than measured a link may be before that is no longer the link's fault: others use it too."""

UNMEASURED_BYTES_PER_S = 1e6
"""What a link that was not measured is trusted to do at the least, until it has done better."""

MIN_SAMPLE_S = 0.02
MIN_SAMPLE_BYTES = 16 * 2**20
"""What is less than both says more of buffers on the way than of the link."""

MAX_SAMPLE_S = 0.5
"""A link that is never idle gives a sample this often."""

NEW_SAMPLE_SHARE = 0.25
"""Weight of a sample of `MAX_SAMPLE_S` against all before it. A shorter one counts by its time: a moment in which the
process stood still must not weigh more than all the sends, a millisecond each, that went as they should."""


class LinkMeter:
    """Of one end of one link.

    The sender's end learns: bytes that were sent while anything was on the wire, over the time in which anything was.

    Attributes:
        speed: measured by the self-test, refined by what was sent; None before the test.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.speed: LinkSpeed | None = None
        self._clock = clock
        self._in_flight_bytes = 0
        self._busy_since_s = 0.0
        self._sent_bytes = 0
        self._proven_bytes_per_s = UNMEASURED_BYTES_PER_S

    def begin(self, num_bytes: int) -> None:
        """So many bytes are on the wire from now on."""
        if self._in_flight_bytes == 0:
            self._busy_since_s, self._sent_bytes = self._clock(), 0
        self._in_flight_bytes += num_bytes

    def end(self, num_bytes: int) -> None:
        """They no longer are."""
        self._in_flight_bytes -= num_bytes
        self._sent_bytes += num_bytes
        if self._in_flight_bytes == 0 and self._sent_bytes >= MIN_SAMPLE_BYTES:
            busy_s = self._clock() - self._busy_since_s
            self._proven_bytes_per_s = max(self._proven_bytes_per_s, self._sent_bytes / max(busy_s, MIN_SAMPLE_S))

    def learn(self) -> None:
        """After a send: refine the speed, if enough was sent since the last time."""
        now_s = self._clock()
        busy_s = now_s - self._busy_since_s
        if self.speed is None or (self._in_flight_bytes and busy_s < MAX_SAMPLE_S):
            return
        if busy_s < MIN_SAMPLE_S and self._sent_bytes < MIN_SAMPLE_BYTES:
            return
        known, surplus_bytes = self.speed.bytes_per_s, self._sent_bytes - self.speed.bytes_per_s * busy_s
        speed = known + NEW_SAMPLE_SHARE * surplus_bytes / max(busy_s, MAX_SAMPLE_S)
        self.speed = LinkSpeed(speed, self.speed.latency_s)
        self._busy_since_s, self._sent_bytes = now_s, 0

    def expected_s(self) -> float:
        """Until what is in flight has been moved; 0 before the link was measured."""
        return 0.0 if self.speed is None else self._in_flight_bytes / self.speed.bytes_per_s

    def patience_s(self, num_bytes: int = 0) -> float:
        """How long to wait for what is in flight and `num_bytes` more."""
        bytes_per_s = self._proven_bytes_per_s if self.speed is None else self.speed.bytes_per_s
        return STALL_S + SHARE * (self._in_flight_bytes + num_bytes) / bytes_per_s
