"""Jobs that have long to wait, by nothing but their place in the log: their records are read again when it is time."""

import heapq

from services.ingest.work import InHand


class Parked:
    """Batch jobs beyond those that wait in line, the earliest deadline first, and what a predecessor left behind."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, InHand]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, in_hand: InHand, deadline_s: float) -> None:
        """Args:
        deadline_s: unix seconds; 0 if that is not known: the record is looked at as soon as may be.
        """
        heapq.heappush(self._heap, (deadline_s, self._num_added, in_hand))
        self._num_added += 1

    def take(self, now_s: float, *, room: bool) -> InHand | None:
        """The next one, if there is room for one, or its deadline has passed."""
        if self._heap and (room or self._heap[0][0] <= now_s):
            return heapq.heappop(self._heap)[2]
        return None
