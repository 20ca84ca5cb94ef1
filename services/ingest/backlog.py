"""Choices that wait for workers, placed one at a time in the order of `shared.policy.line`.

    add ─> line ─> the first ─> settled: placed, never fits, expired, ended before
             ^         └─ no room now: perhaps one that may overtake it
             └── aside <┘

Whose deadline has passed leaves the line from wherever it stands. Two kinds wait aside, so that nobody waits behind
them: one that ran on a larger worker than there is now, until such a one comes; and a batch job whose prompt takes so
long that it must not start where others come all the time, until they do not.
"""

import asyncio
import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from services.ingest.jobs import Job
from services.ingest.lengths import Lengths
from services.ingest.other_lines import OtherLines
from services.ingest.placer import Others, Placer, TooBusy
from services.ingest.work import Placed, Waiting
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics
from shared.policy.admission import BacklogReport, WaitingLine
from shared.policy.line import Blocked, Claim, Entry, Line
from shared.policy.placement import NeverFits
from shared.request import Priority
from shared.state.port import StateUnavailable

ROOM_POLL_S = 0.02
BATCH_POLL_S = 0.1

STATE_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed while the choice waited."""


@dataclass(frozen=True, slots=True)
class EndedBefore:
    """The request has its result already."""


Settled = Placed | NeverFits | Expired | EndedBefore


class Backlog:
    """Args:
        has_ended: whether a job has its result.
        clock_s: unix seconds.

    Attributes:
        pace: counts the choices that wait here, and whoever else is said to it to wait; not batch, nor who is aside.
    """

    def __init__(
        self,
        placer: Placer,
        lengths: Lengths,
        *,
        has_ended: Callable[[Job], bool],
        clock_s: Callable[[], float],
        metrics: IngestMetrics,
        log: Logger,
    ) -> None:
        self._placer = placer
        self._lengths = lengths
        self._has_ended = has_ended
        self._clock_s = clock_s
        self._metrics = metrics
        self._log = log
        self._line = Line[Waiting]()
        self._too_large: list[Entry[Waiting]] = []
        self._too_long: list[tuple[float, int, Entry[Waiting]]] = []
        """A heap, by the quiet that each needs."""
        self.pace = WaitingLine(clock_s())
        self._blocked: tuple[Entry[Waiting], float] | None = None
        """Who was first and found no room, and since when."""
        self._urgent_s = -math.inf
        """When somebody came last who is not batch."""
        self._others = OtherLines()
        self._grew = asyncio.Event()

    def add(self, waiting: Waiting) -> None:
        """Put a choice in line."""
        job = waiting.admitted.job
        num_tokens = waiting.num_ids + self._lengths.expect(waiting).new_tokens
        self._line.add(waiting, Claim(job.priority, job.tenant, job.deadline_s, num_tokens, waiting.is_resumed))
        if not waiting.is_batch:
            self._urgent_s = self._clock_s()
            self.pace.join()
        self._tell_length(job.priority)
        self._grew.set()

    def _tell_length(self, priority: Priority) -> None:
        self._metrics.backlog[priority].set(self._line.num_of[priority])

    def report(self, num_unread: int) -> BacklogReport:
        """What edges must know of the line, once a beat; behind it are `num_unread` jobs in the log."""
        now_s = self._clock_s()
        placed_per_s = self.pace.beat(now_s)
        return BacklogReport(
            self.pace.num_waiting + num_unread,
            max(self._oldest_wait_s(now_s, is_batch=False), self.pace.in_vain_s),
            placed_per_s,
            num_standard=self._line.num_standard,
            oldest_batch_wait_s=self._oldest_wait_s(now_s, is_batch=True),
            outlook=self._placer.outlook(),
            blocked=self._blocked_first(now_s),
            quiet_s=None if self._urgent_s == -math.inf else now_s - self._urgent_s,
        )

    def _oldest_wait_s(self, now_s: float, *, is_batch: bool) -> float:
        oldest = self._line.oldest(is_batch=is_batch)
        return 0.0 if oldest is None else max(0.0, now_s - oldest.item.since_s)

    def note_others(self, reports: Sequence[BacklogReport]) -> None:
        """What other ingests said of their lines at their last beat."""
        self._others.note(reports, self._clock_s())

    def _blocked_first(self, now_s: float) -> Blocked | None:
        if self._blocked is None or self._blocked[0] is not self._line.first() or self._blocked[0].item.is_batch:
            return None
        return Blocked.of(self._blocked[0].claim, now_s - self._blocked[1])

    async def next(self) -> tuple[Waiting, Settled]:
        """One and what becomes of it: the first in line as soon as there is room for it, one that may overtake it, or
        who waited too long."""
        while True:
            self._grew.clear()
            self._bring_back()
            entry = self._line.late(self._clock_s()) or self._line.first()
            if entry is None:
                await self._wait_for_more(ROOM_POLL_S if len(self._line) else None)
                continue
            if self._is_held_back(entry):
                await self._wait_for_room()
                continue
            settled = await self._settle(entry.item)
            if isinstance(settled, TooBusy) or (isinstance(settled, NeverFits) and entry.item.is_resumed):
                self._set_aside(entry, settled)
                continue
            if settled is None:
                if self._blocked is None or self._blocked[0] is not entry:
                    self._blocked = entry, self._clock_s()
                entry, settled = await self._overtaker()
            if entry is None or settled is None:
                await self._wait_for_room()
                continue
            self._take_out(entry, settled)
            return entry.item, settled

    def _is_held_back(self, entry: Entry[Waiting]) -> bool:
        """By who waits for room at another ingest."""
        now_s = self._clock_s()
        mine = self._blocked_first(now_s) or Blocked.of(entry.claim, 0.0)
        return self._others.hold_back(mine, now_s) and not self._is_over(entry.item)

    async def _overtaker(self) -> tuple[Entry[Waiting] | None, Settled | None]:
        """Somebody placed who may go before the first."""
        for entry in self._line.overtakers():
            if self._is_over(entry.item):
                continue
            try:
                placed = await self._placer.place_at_once(entry.item, self._not_batch())
            except StateUnavailable:
                break
            if placed is not None:
                self._metrics.overtaken.inc()
                return entry, placed
        return None, None

    def _take_out(self, entry: Entry[Waiting], settled: Settled) -> None:
        is_placed, was_aside = isinstance(settled, Placed), entry.is_aside
        if is_placed:
            self._line.place(entry)
        else:
            self._line.leave(entry)
        self._tell_length(entry.claim.priority)
        if not (entry.item.is_batch or was_aside):
            leave = self.pace.place if is_placed else self.pace.leave
            leave()
        if was_aside:
            self._forget_aside()

    async def _wait_for_room(self) -> None:
        if not self._line.num_urgent:
            await self._wait_for_more(BATCH_POLL_S)
        else:
            await asyncio.sleep(ROOM_POLL_S)

    async def _wait_for_more(self, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._grew.wait()

    def _set_aside(self, entry: Entry[Waiting], why: TooBusy | NeverFits) -> None:
        self._line.set_aside(entry)
        if isinstance(why, TooBusy):
            heapq.heappush(self._too_long, (why.quiet_s, entry.number, entry))
        else:
            self._too_large.append(entry)
            if not entry.item.is_batch:
                self.pace.leave()

    def _bring_back(self) -> None:
        """Into the line: who would fit again, and whose prompt is not too long any more."""
        for entry in [entry for entry in self._too_large if self._placer.may_fit(entry.item)]:
            self._too_large.remove(entry)
            self._line.bring_back(entry)
            if not entry.item.is_batch:
                self.pace.join()
        quiet_s = self._quiet_s()
        while self._too_long and self._too_long[0][0] <= quiet_s:
            _, _, entry = heapq.heappop(self._too_long)
            self._line.bring_back(entry)

    def _forget_aside(self) -> None:
        """Who has left from there."""
        self._too_large = [entry for entry in self._too_large if entry.is_aside]
        self._too_long = [each for each in self._too_long if each[-1].is_aside]
        heapq.heapify(self._too_long)

    def _not_batch(self) -> Others:
        return Others(self._quiet_s(), self._others.somebody_waits)

    def _quiet_s(self) -> float:
        """For how long nobody but batch has come."""
        return self._clock_s() - max(self._urgent_s, self._others.urgent_s)

    def _is_over(self, waiting: Waiting) -> bool:
        """It needs no place."""
        return self._is_late(waiting) or self._has_ended(waiting.admitted.job)

    def _is_late(self, waiting: Waiting) -> bool:
        return self._clock_s() >= waiting.admitted.job.deadline_s

    async def _settle(self, waiting: Waiting) -> Settled | TooBusy | None:
        """None: there is no room for it now."""
        has_ended, is_late = self._has_ended(waiting.admitted.job), self._is_late(waiting)
        try:
            if has_ended:
                await self._placer.take_back(waiting)
            elif not is_late:
                return await self._placer.place(waiting, self._not_batch())
            elif (standing := await self._placer.standing(waiting)) is not None:
                return standing
        except StateUnavailable as error:
            self._log.warning("placement waits for the state", error=str(error))
            if not is_late:
                await asyncio.sleep(STATE_RETRY_S)
                return None
        return EndedBefore() if has_ended else Expired()
