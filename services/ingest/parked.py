"""Jobs that have long to wait, by nothing but their place in the log: their records are read again when it is time.

How many there are is for those to say who write batch jobs, and for the log: all that stand there and whose deadlines,
at most MAX_DEADLINE_S behind them, have not passed. No job is refused for it, and reading stops for none, for behind
them others come that do not wait. So they are kept small: with all that is known of it elsewhere (`low_water`, `ended`)
one takes about 600 bytes, a million 0.6 GB. `baton_batch_jobs_parked` tells how many there are.
"""

import heapq
import math
from collections.abc import Collection

from services.ingest.work import InHand


class Parked:
    """Batch jobs beyond those that wait in line, and what a predecessor left behind.

    Tenants take turns, so that one with ever so many jobs does not keep the others from the line, where shares are
    fair. Of a tenant the earliest deadline is next.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, list[tuple[float, int, InHand]]] = {}
        """Heaps; the tenants in turn."""
        self._num_added = 0
        self._num = 0
        self._first_deadline_s = math.inf
        """Nobody's is earlier."""

    def __len__(self) -> int:
        return self._num

    def add(self, in_hand: InHand, tenant: str, deadline_s: float) -> None:
        """Args:
        deadline_s: unix seconds; 0 if that is not known: the record is looked at as soon as may be.
        """
        heapq.heappush(self._tenants.setdefault(tenant, []), (deadline_s, self._num_added, in_hand))
        self._num_added += 1
        self._num += 1
        self._first_deadline_s = min(self._first_deadline_s, deadline_s)

    def take(self, now_s: float, *, room: bool) -> InHand | None:
        """One whose deadline has passed, or the next one if there is room for it."""
        if self._num and self._first_deadline_s <= now_s:
            tenant = min(self._tenants, key=lambda name: self._tenants[name][0])
            self._first_deadline_s = self._tenants[tenant][0][0]
            if self._first_deadline_s <= now_s:
                return self._pop(tenant)
        return self._pop(next(iter(self._tenants))) if self._num and room else None

    def drop(self, partitions: Collection[int]) -> list[InHand]:
        """Those of these partitions, which are another's now. Kept, they would come again with their partition."""
        dropped: list[InHand] = []
        for tenant, heap in list(self._tenants.items()):
            gone = [in_hand for _, _, in_hand in heap if in_hand.position.partition in partitions]
            if not gone:
                continue
            dropped += gone
            heap[:] = [each for each in heap if each[2].position.partition not in partitions]
            heapq.heapify(heap)
            if not heap:
                del self._tenants[tenant]
        self._num -= len(dropped)
        return dropped

    def _pop(self, tenant: str) -> InHand:
        """The tenant's next; its turn is over."""
        heap = self._tenants.pop(tenant)
        _, _, in_hand = heapq.heappop(heap)
        if heap:
            self._tenants[tenant] = heap
        self._num -= 1
        return in_hand
