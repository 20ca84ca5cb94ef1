"""How many prefill and decode workers a trace needs for its users' goals."""

from collections.abc import Callable
from dataclasses import dataclass

from loadgen.simulator.outcome import Outcome

MIN_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Split:
    """So many workers of each role."""

    num_prefill: int
    num_decode: int

    @property
    def num(self) -> int:
        return self.num_prefill + self.num_decode

    def __str__(self) -> str:
        return f"{self.num_prefill} prefill + {self.num_decode} decode"


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of one split."""

    split: Split
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        chosen: the best split of the fewest workers that do; None: not even `max_workers` do.
        best_of_fewer: the best split of one worker less; None if there is no such.
        tried: all that was simulated, in order.
    """

    chosen: Tried | None
    best_of_fewer: Tried | None
    tried: tuple[Tried, ...]


class Sizing:
    """Searches for the fewest workers.

    More workers are taken never to do worse, and attainment to rise up to the best split and to fall behind it.

    Args:
        simulate: the workload on so many workers.
        wanted: share of requests that must keep the goals.
    """

    def __init__(self, simulate: Callable[[Split], Outcome], wanted: float, max_workers: int) -> None:
        self._simulate = simulate
        self._wanted = wanted
        self._max_workers = max_workers
        self._tried: dict[Split, Tried] = {}
        self._prefill_share = 0.5

    def plan(self) -> Plan:
        """Double the workers until they do, then close in."""
        too_few, enough = MIN_WORKERS - 1, MIN_WORKERS
        while not self._does(self.best(enough)):
            if enough >= self._max_workers:
                return Plan(None, self.best(enough), tuple(self._tried.values()))
            too_few, enough = enough, min(2 * enough, self._max_workers)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self._does(self.best(middle)):
                enough = middle
            else:
                too_few = middle
        fewer = self.best(enough - 1) if enough > MIN_WORKERS else None
        return Plan(self.best(enough), fewer, tuple(self._tried.values()))

    def best(self, num: int) -> Tried:
        """The best split of so many workers: from the share that was best last, uphill."""
        num_prefill = min(max(round(num * self._prefill_share), 1), num - 1)
        best = self._try(Split(num_prefill, num - num_prefill))
        for step in (1, -1):
            while 1 <= best.split.num_prefill + step < num:
                num_prefill = best.split.num_prefill + step
                other = self._try(Split(num_prefill, num - num_prefill))
                if _merit(other) <= _merit(best):
                    break
                best = other
        self._prefill_share = best.split.num_prefill / num
        return best

    def _does(self, tried: Tried) -> bool:
        return tried.outcome.attainment >= self._wanted

    def _try(self, split: Split) -> Tried:
        if split not in self._tried:
            self._tried[split] = Tried(split, self._simulate(split))
        return self._tried[split]


def _merit(tried: Tried) -> tuple[float, float]:
    ttft_s = tried.outcome.ttft_s
    return tried.outcome.attainment, -ttft_s[1] if ttft_s else 0.0
