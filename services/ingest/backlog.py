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

from services.ingest.cluster import Cluster
from services.ingest.jobs import Job
from services.ingest.lengths import Lengths
from services.ingest.other_lines import OtherLines
from services.ingest.threshold import local_threshold
from services.ingest.work import Placed, Waiting
from shared.blocks import BlockHash, hash_chain, root_hash
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics
from shared.policy.admission import BacklogReport, Outlook, Usual, WaitingLine
from shared.policy.idle_capacity import leaves_others_alone, needed_quiet_s
from shared.policy.line import Blocked, Claim, Entry, Line
from shared.policy.placement import Chosen, Decision, NeverFits, NoRoomNow, Rules, capacity_tokens, place
from shared.policy.views import ClusterView, RequestView
from shared.request import PlacementId, Priority
from shared.state import keys
from shared.state.port import Placement, PlacementKey, State, StateUnavailable

ROOM_POLL_S = 0.02
BATCH_POLL_S = 0.1

STATE_RETRY_S = 0.1

NUM_HASHED = 16
"""Prompts whose blocks' hashes are kept: those that are tried again and again."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed while the choice waited."""


@dataclass(frozen=True, slots=True)
class EndedBefore:
    """The request has its result already."""


Settled = Placed | NeverFits | Expired | EndedBefore


@dataclass(frozen=True, slots=True)
class _TooBusy:
    """A batch job that may start once nobody has come for so long."""

    quiet_s: float


class Backlog:
    """Args:
        has_ended: whether a job has its result.
        clock_s: unix seconds.

    Attributes:
        pace: counts the choices that wait here, and whoever else is said to it to wait; not batch, nor who is aside.
    """

    def __init__(
        self,
        state: State,
        cluster: Cluster,
        lengths: Lengths,
        rules: Rules,
        *,
        has_ended: Callable[[Job], bool],
        clock_s: Callable[[], float],
        new_placement_id: Callable[[], PlacementId],
        metrics: IngestMetrics,
        log: Logger,
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._lengths = lengths
        self._rules = rules
        self._has_ended = has_ended
        self._clock_s = clock_s
        self._new_placement_id = new_placement_id
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
        self._usual: Usual | None = None
        self._grew = asyncio.Event()
        self._num_placed = 0
        self._hashed: dict[tuple[PlacementKey, str], tuple[BlockHash, ...]] = {}

    def add(self, waiting: Waiting) -> None:
        """Put a choice in line."""
        job = waiting.admitted.job
        num_tokens = waiting.num_ids + self._lengths.expect(waiting).new_tokens
        self._line.add(waiting, Claim(job.priority, job.tenant, job.deadline_s, num_tokens, waiting.is_resumed))
        if not _is_batch(waiting):
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
            outlook=self._outlook(),
            blocked=self._blocked_first(now_s),
            quiet_s=None if self._urgent_s == -math.inf else now_s - self._urgent_s,
        )

    def _outlook(self) -> Outlook | None:
        if self._usual is None:
            return None
        return Outlook.of(self._cluster.view, self._usual, local_prefill=self._rules.local_prefill)

    def _oldest_wait_s(self, now_s: float, *, is_batch: bool) -> float:
        oldest = self._line.oldest(is_batch=is_batch)
        return 0.0 if oldest is None else now_s - oldest.item.admitted_s

    def note_others(self, reports: Sequence[BacklogReport]) -> None:
        """What other ingests said of their lines at their last beat."""
        self._others.note(reports, self._clock_s())

    def _blocked_first(self, now_s: float) -> Blocked | None:
        if self._blocked is None or self._blocked[0] is not self._line.first() or _is_batch(self._blocked[0].item):
            return None
        return Blocked.of(self._blocked[0].claim, now_s - self._blocked[1])

    def local_threshold(self) -> int | None:
        """See `threshold`, for choices such as those placed lately; None before there were any."""
        if self._usual is None:
            return None
        return local_threshold(self._cluster.view, self._rules, self._usual.num_new_tokens)

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
            if isinstance(settled, _TooBusy) or (isinstance(settled, NeverFits) and entry.item.is_resumed):
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
                placed = await self._place_by_recent_view(entry.item)
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
        if not (_is_batch(entry.item) or was_aside):
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

    def _set_aside(self, entry: Entry[Waiting], why: _TooBusy | NeverFits) -> None:
        self._line.set_aside(entry)
        if isinstance(why, _TooBusy):
            heapq.heappush(self._too_long, (why.quiet_s, entry.number, entry))
        else:
            self._too_large.append(entry)
            if not _is_batch(entry.item):
                self.pace.leave()

    def _bring_back(self) -> None:
        """Into the line: who would fit again, and whose prompt is not too long any more."""
        for entry in [entry for entry in self._too_large if self._may_fit(entry.item)]:
            self._too_large.remove(entry)
            self._line.bring_back(entry)
            if not _is_batch(entry.item):
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

    def _may_fit(self, waiting: Waiting) -> bool:
        admitted = waiting.admitted
        limit_tokens = capacity_tokens(admitted.spec.model, self._cluster.view)
        return limit_tokens is None or len(admitted.prompt_ids) + admitted.sampling.max_tokens <= limit_tokens

    def _is_over(self, waiting: Waiting) -> bool:
        """It needs no place."""
        return self._is_late(waiting) or self._has_ended(waiting.admitted.job)

    def _is_late(self, waiting: Waiting) -> bool:
        return self._clock_s() >= waiting.admitted.job.deadline_s

    async def _settle(self, waiting: Waiting) -> Settled | _TooBusy | None:
        """None: there is no room for it now."""
        is_late = self._is_late(waiting)
        try:
            if self._has_ended(waiting.admitted.job):
                return await self._let_go(waiting)
            if not is_late and (placed := await self._place_by_recent_view(waiting)) is not None:
                return placed
            decision: Decision | _TooBusy = NoRoomNow() if is_late else await self._decide(waiting)
            if isinstance(decision, Chosen):
                return await self._take_credits(waiting, decision)
            # It may be placed already, by an ingest that died or by a call whose answer was lost, and what leaves no
            # room may be its own credits: nobody else would ever give them back.
            standing = await self._state.find_placement(_key(waiting))
        except StateUnavailable as error:
            self._log.warning("placement waits for the state", error=str(error))
            if is_late:
                return EndedBefore() if self._has_ended(waiting.admitted.job) else Expired()
            await asyncio.sleep(STATE_RETRY_S)
            return None
        if standing is not None:
            return Placed(standing, None)
        if is_late:
            return Expired()
        return None if isinstance(decision, NoRoomNow) else decision

    async def _let_go(self, waiting: Waiting) -> EndedBefore:
        """Whoever placed it, if anybody did, may not have been able to tell its workers."""
        standing = await self._state.find_placement(_key(waiting))
        if standing is not None:
            for worker in {standing.prefill, standing.decode}:
                await self._state.give_back(standing.id, worker.incarnation)
        return EndedBefore()

    async def _place_by_recent_view(self, waiting: Waiting) -> Placed | None:
        """Place without asking who is there: whether a worker still takes it is the store's to say."""
        view = self._cluster.recent()
        if view is None:
            return None
        decision = self._decide_by(view, waiting)
        return await self._take_credits(waiting, decision) if isinstance(decision, Chosen) else None

    async def _decide(self, waiting: Waiting) -> Decision | _TooBusy:
        return self._decide_by(await self._cluster.refresh(), waiting)

    def _decide_by(self, view: ClusterView, waiting: Waiting) -> Decision | _TooBusy:
        decision = place(
            self._request_view(waiting), view, self._cluster.holders, self._rules, tie_break=self._num_placed
        )
        if _is_batch(waiting) and isinstance(decision, Chosen):
            return self._if_idle(decision, view)
        return decision

    def _if_idle(self, chosen: Chosen, view: ClusterView) -> Chosen | NoRoomNow | _TooBusy:
        """For a batch job."""
        quiet_s, needed_s = self._quiet_s(), needed_quiet_s(chosen, self._rules)
        if quiet_s < needed_s:
            return _TooBusy(needed_s)
        if self._others.somebody_waits or not leaves_others_alone(chosen, view, self._rules, quiet_s=quiet_s):
            return NoRoomNow()
        return chosen

    def _quiet_s(self) -> float:
        """For how long nobody but batch has come."""
        return self._clock_s() - max(self._urgent_s, self._others.urgent_s)

    def _request_view(self, waiting: Waiting) -> RequestView:
        admitted = waiting.admitted
        expected = self._lengths.expect(waiting)
        return RequestView(
            request_id=admitted.job.request_id,
            choice=waiting.choice,
            model=admitted.spec.model,
            num_tokens=waiting.num_ids,
            max_new_tokens=admitted.sampling.max_tokens - len(waiting.accepted_ids),
            expected_new_tokens=expected.new_tokens,
            usual_new_tokens=self._lengths.usual_tokens(),
            reserve_new_tokens=expected.reserve_tokens,
            blocks=self._blocks(waiting),
        )

    def _blocks(self, waiting: Waiting) -> tuple[BlockHash, ...]:
        """Hashes of its full blocks; kept while it is asked about again and again, as those near the front are."""
        fingerprint = self._cluster.fingerprints.get(waiting.admitted.spec.model, "")
        key = (_key(waiting), fingerprint)
        blocks = self._hashed.get(key)
        if blocks is None:
            root = root_hash(fingerprint, waiting.admitted.cache_salt)
            blocks = self._hashed[key] = tuple(hash_chain(root, waiting.ids))
            if len(self._hashed) > NUM_HASHED:
                del self._hashed[next(iter(self._hashed))]
        return blocks

    async def _take_credits(self, waiting: Waiting, chosen: Chosen) -> Placed | None:
        job = waiting.admitted.job
        wanted = Placement(self._new_placement_id(), chosen.prefill, chosen.decode)
        placement = await self._state.place(
            _key(waiting),
            wanted,
            num_prefill_pages=chosen.num_prefill_pages,
            num_decode_pages=chosen.num_decode_pages,
            prefill_s=chosen.prefill_s,
            keep_ms=max(int((job.deadline_s - self._clock_s()) * 1000), keys.LEASE_MS),
        )
        if placement is None:
            return None
        self._num_placed += 1
        self._metrics.placed.inc()
        if placement != wanted:  # an earlier one, whose credits the view has already
            return Placed(placement, None)
        self._cluster.count(chosen)
        self._note(waiting, chosen)
        return Placed(placement, chosen, self._cluster.fetch_ticket(chosen))

    def _note(self, waiting: Waiting, chosen: Chosen) -> None:
        """What is usual, for the outlook."""
        prefill_s = 0.0 if chosen.prefill == chosen.decode else chosen.prefill_s
        one = Usual(chosen.num_decode_pages, self._lengths.expect(waiting).new_tokens, prefill_s)
        self._usual = one if self._usual is None else self._usual.with_one_more(one)


def _is_batch(waiting: Waiting) -> bool:
    return waiting.admitted.job.priority is Priority.BATCH


def _key(waiting: Waiting) -> PlacementKey:
    return PlacementKey(waiting.admitted.job.request_id, waiting.choice, waiting.epoch)
