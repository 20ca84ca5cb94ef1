"""Virtual time: what happens next."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """What is to happen, in the order of its times; what has one time, in the order in which it was put down.

    Attributes:
        now_s: virtual seconds since the start.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_put = 0

    def at(self, at_s: float, do: Callable[..., None], *args: Any) -> None:
        """Call `do(*args)` at `at_s`, or now if that has passed."""
        self._num_put += 1
        heappush(self._heap, (max(at_s, self.now_s), self._num_put, do, args))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            self.now_s, _, do, args = heappop(heap)
            do(*args)
