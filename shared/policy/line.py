"""Who is next of those that wait for workers.

    ran before and lost its workers ─> interactive ─> standard ─> batch that ran before ─> batch

**Inside a class tenants get equal shares of tokens**, by virtual counters (VTC; Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024): who is placed is charged its prompt and its expected answer, and the tenant with the
least on its counter is next. A tenant that comes back after having waited for nothing is lifted to the least of those
who wait, so that idle time saves up no credit. **Inside a tenant** the earliest deadline is next.

**Who overtakes.** If there is no room for the first, something smaller behind it may have room, and a worker would
stand idle otherwise. But each that goes by takes room that the first waits for. So overtaking is bounded by the first's
own size: those that go by have together at most as many tokens as it has itself, and none more than half of that. From
then on nobody goes by: what runs comes to its end, all room that becomes free stays free, and the first is placed. So
everybody that fits at all is placed after a bounded number of others of its class. A class waits as long as those above
it have work: that is what classes are for. The same is true of batch, whose deadlines are late.

Each process counts its own line; a tenant's requests are spread over the processes evenly, by their ids. But room is
everybody's: who has been first in one line for WAITS_LONG_S without room is waited for in all of them, up to
GIVEN_UP_AFTER_S (`Blocked`).
"""

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

from shared.request import Priority

T = TypeVar("T")

NUM_TRIED = 4
"""So many from the front are looked at for one that may overtake."""

MAX_IDLE_COUNTERS = 10_000
"""Of tenants that do not wait; the smallest are forgotten."""

WAITS_LONG_S = 5.0
"""For the first of a line. Most who find no room find some within moments."""

GIVEN_UP_AFTER_S = 60.0
"""The other lines go on then: what takes its room may stay for hours."""

_SLACK = 1000
"""Entries that are gone may be kept in a heap up to so many more than there are."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a place in line depends on.

    Attributes:
        deadline_s: unix seconds.
        num_tokens: of the prompt and the expected answer: its size, and what its tenant is charged.
        is_resumed: it ran before, and was charged then.
    """

    priority: Priority
    tenant: str
    deadline_s: float
    num_tokens: float
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    """The first of a line, for whom there is no room.

    Attributes:
        rank: 0 for who ran before, then by classes.
        for_s: it has been so.
    """

    rank: int
    for_s: float

    @classmethod
    def of(cls, claim: Claim, for_s: float) -> "Blocked":
        return cls(0 if claim.is_resumed else 1 + list(Priority).index(claim.priority), for_s)

    def holds_back(self, other: "Blocked") -> bool:
        """Whether the first of another line leaves all room to this one."""
        if not WAITS_LONG_S <= self.for_s < GIVEN_UP_AFTER_S:
            return False
        return self.rank < other.rank or (self.rank == other.rank and self.for_s > other.for_s)


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One that waits.

    Attributes:
        number: in the order of coming.
        num_tokens_passed: of those that overtook it while it was the first.
        is_aside: it waits for something else than its turn.
    """

    item: T
    claim: Claim
    number: int
    num_tokens_passed: float = 0.0
    is_aside: bool = False

    def lets_by(self, other: "Entry[T]") -> bool:
        """Whether `other` may go before this one, the first, for which there is no room."""
        size = self.claim.num_tokens
        return other.claim.num_tokens <= min(size / 2, size - self.num_tokens_passed)


class Line(Generic[T]):
    """Those that wait, of all classes.

    Attributes:
        num_of: each class, with those aside.
    """

    def __init__(self) -> None:
        self._entries: dict[int, Entry[T]] = {}
        self._num_added = 0
        self._deadlines: list[tuple[float, int]] = []
        self._resumed: deque[Entry[T]] = deque()
        self._lanes = {priority: _Lane[T]() for priority in Priority}
        self._resumed_batch: deque[Entry[T]] = deque()
        self.num_of = dict.fromkeys(Priority, 0)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_batch(self) -> int:
        """Those not aside."""
        return self._lanes[Priority.BATCH].num + len(self._resumed_batch)

    @property
    def num_urgent(self) -> int:
        """Those not aside and not batch."""
        return len(self._resumed) + self._lanes[Priority.INTERACTIVE].num + self._lanes[Priority.STANDARD].num

    @property
    def num_standard(self) -> int:
        """Behind the interactive ones: those of the class that did not run yet."""
        return self._lanes[Priority.STANDARD].num

    def add(self, item: T, claim: Claim) -> None:
        """It waits from now on."""
        entry = Entry(item, claim, self._num_added)
        self._num_added += 1
        self._entries[entry.number] = entry
        self.num_of[claim.priority] += 1
        heapq.heappush(self._deadlines, (claim.deadline_s, entry.number))
        if len(self._deadlines) > 2 * len(self._entries) + _SLACK:
            self._deadlines = [(each.claim.deadline_s, number) for number, each in self._entries.items()]
            heapq.heapify(self._deadlines)
        self._join(entry)

    def _join(self, entry: Entry[T]) -> None:
        if entry.claim.is_resumed:
            self._resumed_like(entry).append(entry)
        else:
            self._lanes[entry.claim.priority].add(entry)

    def oldest(self, *, is_batch: bool) -> Entry[T] | None:
        """Who came first of those not aside."""
        if not (self.num_batch if is_batch else self.num_urgent):
            return None
        entries = (entry for entry in self._entries.values() if not entry.is_aside)
        return next(entry for entry in entries if (entry.claim.priority is Priority.BATCH) == is_batch)

    def first(self) -> Entry[T] | None:
        """Who is next; batch only where nobody else waits."""
        if self._resumed:
            return self._resumed[0]
        urgent = self._lanes[Priority.INTERACTIVE].first() or self._lanes[Priority.STANDARD].first()
        if urgent is not None:
            return urgent
        return self._resumed_batch[0] if self._resumed_batch else self._lanes[Priority.BATCH].first()

    def overtakers(self) -> list[Entry[T]]:
        """Who may go before the first, for which there is no room now; whoever should first."""
        first = self.first()
        if first is None:
            return []
        if first.claim.priority is Priority.BATCH:
            near = chain(self._resumed_batch, self._lanes[Priority.BATCH].near_front())
        else:
            urgent = (self._lanes[priority].near_front() for priority in (Priority.INTERACTIVE, Priority.STANDARD))
            near = chain(self._resumed, *urgent)
        candidates = islice((entry for entry in near if entry is not first), 3 * NUM_TRIED)
        return list(islice(filter(first.lets_by, candidates), NUM_TRIED))

    def late(self, now_s: float) -> Entry[T] | None:
        """One whose deadline has passed, if there is any."""
        while self._deadlines and self._deadlines[0][1] not in self._entries:
            heapq.heappop(self._deadlines)
        if not self._deadlines or now_s < self._deadlines[0][0]:
            return None
        return self._entries[self._deadlines[0][1]]

    def set_aside(self, entry: Entry[T]) -> None:
        """It has no turn until it is brought back; only `late` tells of it."""
        self._leave_turn(entry, charge=0.0)
        entry.is_aside = True

    def bring_back(self, entry: Entry[T]) -> None:
        """It has its turn again."""
        entry.is_aside = False
        self._join(entry)

    def place(self, entry: Entry[T]) -> None:
        """It leaves because there was room for it: its tenant is charged."""
        first = self.first()
        if first is not None and first is not entry:
            first.num_tokens_passed += entry.claim.num_tokens
        self._leave(entry, charge=0.0 if entry.claim.is_resumed else entry.claim.num_tokens)

    def leave(self, entry: Entry[T]) -> None:
        """It leaves without having been placed."""
        self._leave(entry, charge=0.0)

    def _leave(self, entry: Entry[T], *, charge: float) -> None:
        del self._entries[entry.number]
        self.num_of[entry.claim.priority] -= 1
        if not entry.is_aside:
            self._leave_turn(entry, charge)
        entry.is_aside = False

    def _leave_turn(self, entry: Entry[T], charge: float) -> None:
        if entry.claim.is_resumed:
            self._resumed_like(entry).remove(entry)
        else:
            self._lanes[entry.claim.priority].remove(entry, charge)

    def _resumed_like(self, entry: Entry[T]) -> "deque[Entry[T]]":
        return self._resumed_batch if entry.claim.priority is Priority.BATCH else self._resumed


_Key = tuple[float, int]


class _Tenant(Generic[T]):
    """Of one class, while it waits. `entries` has the next one last."""

    __slots__ = ("counter", "entries", "mark")

    def __init__(self, counter: float) -> None:
        self.counter = counter
        self.mark: _Key = (counter, 0)
        self.entries: list[tuple[_Key, Entry[T]]] = []


class _Lane(Generic[T]):
    """One class."""

    def __init__(self) -> None:
        self.num = 0
        self._tenants: dict[str, _Tenant[T]] = {}
        self._order: list[tuple[_Key, str]] = []
        """A heap of the tenants that wait, by counter; of a tenant only the entry with its mark counts."""
        self._num_marks = 0
        self._idle: dict[str, float] = {}
        self._last_counter = 0.0

    def add(self, entry: Entry[T]) -> None:
        name = entry.claim.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = _Tenant[T](max(self._idle.pop(name, 0.0), self._least_counter()))
            self._tenants[name] = tenant
            self._put(name, tenant)
        insort(tenant.entries, (_key(entry), entry), key=_by_key)
        self.num += 1

    def first(self) -> Entry[T] | None:
        name = self._first_tenant()
        return None if name is None else self._tenants[name].entries[-1][1]

    def near_front(self) -> Iterator[Entry[T]]:
        """The next of each of the first tenants, about in their order, then what these have behind it."""
        names = [name for mark, name in sorted(self._order[: 2 * NUM_TRIED]) if self._counts(mark, name)]
        for depth in range(1, NUM_TRIED + 1):
            for name in names:
                entries = self._tenants[name].entries
                if depth <= len(entries):
                    yield entries[-depth][1]

    def remove(self, entry: Entry[T], charge: float) -> None:
        name = entry.claim.tenant
        tenant = self._tenants[name]
        del tenant.entries[bisect_left(tenant.entries, _key(entry), key=_by_key)]
        self.num -= 1
        tenant.counter += charge
        if tenant.entries:
            if charge:
                self._put(name, tenant)
            return
        del self._tenants[name]
        self._last_counter = tenant.counter
        self._idle[name] = tenant.counter
        if len(self._idle) > MAX_IDLE_COUNTERS:
            self._forget_idle()

    def _put(self, name: str, tenant: _Tenant[T]) -> None:
        # Of equal counters the one that has had it for longest is first: nobody comes between again and again.
        self._num_marks += 1
        tenant.mark = (tenant.counter, self._num_marks)
        heapq.heappush(self._order, (tenant.mark, name))
        if len(self._order) > 2 * len(self._tenants) + _SLACK:
            self._order = [(each.mark, name) for name, each in self._tenants.items()]
            heapq.heapify(self._order)

    def _counts(self, mark: _Key, name: str) -> bool:
        tenant = self._tenants.get(name)
        return tenant is not None and tenant.mark == mark

    def _first_tenant(self) -> str | None:
        while self._order and not self._counts(*self._order[0]):
            heapq.heappop(self._order)
        return self._order[0][1] if self._order else None

    def _least_counter(self) -> float:
        name = self._first_tenant()
        return self._last_counter if name is None else self._tenants[name].counter

    def _forget_idle(self) -> None:
        least = self._least_counter()
        owing = sorted(((counter, name) for name, counter in self._idle.items() if counter > least), reverse=True)
        self._idle = {name: counter for counter, name in owing[: MAX_IDLE_COUNTERS // 2]}


def _key(entry: Entry[T]) -> _Key:
    """Later deadlines first; of equal ones, who came later."""
    return -entry.claim.deadline_s, -entry.number


def _by_key(keyed: tuple[_Key, Entry[T]]) -> _Key:
    return keyed[0]
