"""Choices that wait for workers, placed one at a time in the order of their admission: nobody overtakes, but those
that ran before and lost their workers go first.

Whose deadline has passed leaves the line from wherever it stands. One that ran on a larger worker than there is now
waits beside the line for such a one to come, so that nobody waits behind it.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from services.ingest.cluster import Cluster
from services.ingest.work import Placed, Waiting
from shared.blocks import BlockHash, hash_chain, root_hash
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics
from shared.policy.admission import BacklogReport, WaitingLine
from shared.policy.placement import Chosen, Decision, NeverFits, NoRoomNow, Rules, capacity_tokens, place
from shared.policy.views import ClusterView, RequestView
from shared.request import PlacementId
from shared.state import keys
from shared.state.port import Placement, PlacementKey, State, StateUnavailable

ROOM_POLL_S = 0.02
STATE_RETRY_S = 0.1

LIKELY_NEW_TOKENS = 256
RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1, local_prefill=False, fetch=False)


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed while the choice waited."""


Settled = Placed | NeverFits | Expired


class Backlog:
    """Args:
        clock_s: unix seconds.

    Attributes:
        line: counts the choices that wait here, and whoever else is said to it to wait.
    """

    def __init__(
        self,
        state: State,
        cluster: Cluster,
        *,
        clock_s: Callable[[], float],
        new_placement_id: Callable[[], PlacementId],
        metrics: IngestMetrics,
        log: Logger,
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._clock_s = clock_s
        self._new_placement_id = new_placement_id
        self._metrics = metrics
        self._log = log
        self._waiting: deque[Waiting] = deque()
        self._stranded: list[Waiting] = []
        self.line = WaitingLine(clock_s())
        self._first_deadline_s = math.inf
        self._grew = asyncio.Event()
        self._num_placed = 0
        self._hashed: tuple[Waiting, str, tuple[BlockHash, ...]] | None = None

    def add(self, waiting: Waiting) -> None:
        """Put a choice at the end of the line; one that ran before only behind others such: its client waits."""
        place = len(self._waiting)
        if waiting.is_resumed:
            place = sum(other.is_resumed for other in self._waiting)
        self._waiting.insert(place, waiting)
        self.line.join()
        self._first_deadline_s = min(self._first_deadline_s, waiting.admitted.job.deadline_s)
        self._metrics.backlog.set(len(self._waiting))
        self._grew.set()

    def report(self, num_unread: int) -> BacklogReport:
        """What edges must know of the line, once a beat; behind it are `num_unread` jobs in the log."""
        now_s = self._clock_s()
        oldest_s = min((waiting.admitted_s for waiting in self._waiting), default=now_s)
        oldest_wait_s = max(0.0, now_s - oldest_s)
        return BacklogReport(self.line.num_waiting + num_unread, oldest_wait_s, self.line.beat(now_s))

    async def next(self) -> tuple[Waiting, Settled]:
        """One and what becomes of it: the first in line as soon as there is room for it, or who waited too long."""
        while True:
            self._bring_back()
            if not self._waiting:
                await self._wait_for_more()
                continue
            waiting = self._late() or self._waiting[0]
            settled = await self._settle(waiting)
            if settled is None:
                await asyncio.sleep(ROOM_POLL_S)
                continue
            self._waiting.remove(waiting)
            self._metrics.backlog.set(len(self._waiting))
            leave = self.line.place if isinstance(settled, Placed) else self.line.leave
            leave()
            if not (isinstance(settled, NeverFits) and waiting.is_resumed):
                return waiting, settled
            self._stranded.append(waiting)

    async def _wait_for_more(self) -> None:
        self._grew.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(ROOM_POLL_S if self._stranded else None):
                await self._grew.wait()

    def _bring_back(self) -> None:
        """Into the line: who would fit again, and who waited too long."""
        back = [waiting for waiting in self._stranded if self._is_late(waiting) or self._may_fit(waiting)]
        for waiting in back:
            self._stranded.remove(waiting)
            self.add(waiting)

    def _may_fit(self, waiting: Waiting) -> bool:
        admitted = waiting.admitted
        limit_tokens = capacity_tokens(admitted.spec.model, self._cluster.view)
        return limit_tokens is None or len(admitted.prompt_ids) + admitted.sampling.max_tokens <= limit_tokens

    def _late(self) -> Waiting | None:
        """The one whose deadline passed first, if any has."""
        if self._clock_s() < self._first_deadline_s:
            return None
        first = min(self._waiting, key=lambda waiting: waiting.admitted.job.deadline_s)
        self._first_deadline_s = first.admitted.job.deadline_s
        return first if self._is_late(first) else None

    def _is_late(self, waiting: Waiting) -> bool:
        return self._clock_s() >= waiting.admitted.job.deadline_s

    async def _settle(self, waiting: Waiting) -> Settled | None:
        """None: there is no room for it now."""
        is_late = self._is_late(waiting)
        try:
            if not is_late and (placed := await self._place_by_recent_view(waiting)) is not None:
                return placed
            decision = NoRoomNow() if is_late else await self._decide(waiting)
            if isinstance(decision, Chosen):
                return await self._take_credits(waiting, decision)
            # It may be placed already, by an ingest that died or by a call whose answer was lost, and what leaves no
            # room may be its own credits: nobody else would ever give them back.
            standing = await self._state.find_placement(_key(waiting))
        except StateUnavailable as error:
            self._log.warning("placement waits for the state", error=str(error))
            if is_late:
                return Expired()
            await asyncio.sleep(STATE_RETRY_S)
            return None
        if standing is not None:
            return Placed(standing, None)
        if is_late:
            return Expired()
        return decision if isinstance(decision, NeverFits) else None

    async def _place_by_recent_view(self, waiting: Waiting) -> Placed | None:
        """Place without asking who is there: whether a worker still takes it is the store's to say."""
        view = self._cluster.recent()
        if view is None:
            return None
        decision = self._decide_by(view, waiting)
        return await self._take_credits(waiting, decision) if isinstance(decision, Chosen) else None

    async def _decide(self, waiting: Waiting) -> Decision:
        return self._decide_by(await self._cluster.refresh(), waiting)

    def _decide_by(self, view: ClusterView, waiting: Waiting) -> Decision:
        return place(self._request_view(waiting), view, self._cluster.holders, RULES, tie_break=self._num_placed)

    def _request_view(self, waiting: Waiting) -> RequestView:
        admitted = waiting.admitted
        max_new_tokens = admitted.sampling.max_tokens - len(waiting.accepted_ids)
        likely_new_tokens = min(max_new_tokens, LIKELY_NEW_TOKENS)
        return RequestView(
            request_id=admitted.job.request_id,
            choice=waiting.choice,
            model=admitted.spec.model,
            num_tokens=len(admitted.prompt_ids) + len(waiting.accepted_ids),
            max_new_tokens=max_new_tokens,
            expected_new_tokens=likely_new_tokens,
            reserve_new_tokens=likely_new_tokens,
            blocks=self._blocks(waiting),
        )

    def _blocks(self, waiting: Waiting) -> tuple[BlockHash, ...]:
        """Hashes of its full blocks; kept while it is asked about again and again, as the first in line is."""
        fingerprint = self._cluster.fingerprints.get(waiting.admitted.spec.model, "")
        if self._hashed is None or self._hashed[0] is not waiting or self._hashed[1] != fingerprint:
            root = root_hash(fingerprint, waiting.admitted.cache_salt)
            self._hashed = (waiting, fingerprint, tuple(hash_chain(root, waiting.ids)))
        return self._hashed[2]

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
        return Placed(placement, chosen, self._cluster.fetch_ticket(chosen))


def _key(waiting: Waiting) -> PlacementKey:
    return PlacementKey(waiting.admitted.job.request_id, waiting.choice, waiting.epoch)
