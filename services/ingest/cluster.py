"""What ingest knows of the workers: registry and credits, read afresh; block announcements, gathered over time."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from services.ingest.feeds import BlockFeeds
from shared.blocks import PAGE_TOKENS
from shared.observe.metrics import IngestMetrics
from shared.policy.holders import Holders
from shared.policy.placement import Chosen
from shared.policy.views import ClusterView, WorkerView
from shared.request import Incarnation, WorkerRef
from shared.state import keys
from shared.state.port import LiveWorker, Role, State
from shared.wire.to_worker import FetchTicket
from shared.wire.topics import NUM_SLOTS

VIEW_MAX_AGE_S = 0.25
"""A view that was read longer ago than this is not recent."""

NUM_WORK_DIGITS = 6
"""Credits keep work to the microsecond."""


class Cluster:
    """The live workers and the blocks that they hold.

    Args:
        clock_s: unix seconds.
    """

    def __init__(self, state: State, metrics: IngestMetrics, clock_s: Callable[[], float]) -> None:
        self._state = state
        self._clock_s = clock_s
        self._read_s = -math.inf
        self._feeds = BlockFeeds(state, metrics, clock_s)
        self._num_asked = 0
        self._num_taken = 0
        self._counted: deque[tuple[int, Chosen]] = deque()
        """Own placements since the last reading was asked for, each with the number of the reading asked for before."""
        self._kept: dict[Incarnation, tuple[LiveWorker, WorkerView]] = {}
        self._pools: dict[Role, dict[Incarnation, WorkerView]] = {role: {} for role in Role}
        self.view = ClusterView((), ())
        self.fingerprints: dict[str, str] = {}

    @property
    def holders(self) -> Holders:
        """Who has which blocks, as far as the feeds tell."""
        return self._feeds.holders

    async def refresh(self) -> ClusterView:
        """Read registry, loads and credits. Raises StateUnavailable.

        A store that came up less than a lease ago may not know all workers and credits yet: then nobody is there.
        """
        asked_s = self._clock_s()
        number = self._num_asked = self._num_asked + 1
        workers, up_ms = await asyncio.gather(
            self._state.workers(num_slots=NUM_SLOTS), self._state.up_ms(lease_ms=keys.LEASE_MS)
        )
        if number < self._num_taken:
            return self.view  # one that was asked for later came first
        self._num_taken = number
        self._read_s = asked_s
        if up_ms < keys.LEASE_MS:
            self._show([])
            return self.view
        self._feeds.keep_only(worker.card.incarnation for worker in workers)
        self.fingerprints = {worker.card.model: worker.card.model_fingerprint for worker in workers}
        self._show(workers)
        # The store may have answered before it took these: counted twice at worst, until the next reading.
        while self._counted and self._counted[0][0] < number:
            self._counted.popleft()
        for _, chosen in self._counted:
            self._add(chosen)
        self._gather()
        return self.view

    def recent(self) -> ClusterView | None:
        """The view, if it was read lately. What it promises the store may refuse."""
        return self.view if self._clock_s() - self._read_s <= VIEW_MAX_AGE_S else None

    def count(self, chosen: Chosen) -> None:
        """Note a placement of ours in the view, until the next reading tells of it."""
        self._counted.append((self._num_asked, chosen))
        self._add(chosen)
        self._gather()

    def fetch_ticket(self, chosen: Chosen) -> FetchTicket | None:
        """What whoever computes the prompt is told of a fetch; None: there is none, or its source has gone."""
        if chosen.fetch is None or chosen.fetch.source.incarnation not in self._kept:
            return None
        worker, _ = self._kept[chosen.fetch.source.incarnation]
        return FetchTicket(worker.ref, worker.card.transfer_address, chosen.fetch.num_pages)

    async def follow_feeds(self) -> None:
        """Take what the workers announced since the last time. Raises StateUnavailable."""
        await self._feeds.follow()

    def _show(self, workers: Sequence[LiveWorker]) -> None:
        """Make the view anew, of the views of those workers that did not change."""
        known, self._kept = self._kept, {}
        self._pools = {role: {} for role in Role}
        for worker in workers:
            incarnation, role = worker.card.incarnation, worker.card.role
            view = _view(worker, known.get(incarnation))
            self._kept[incarnation] = worker, view
            self._pools[role][incarnation] = view
        self._gather()

    def _add(self, chosen: Chosen) -> None:
        if chosen.prefill == chosen.decode:
            num_pages = chosen.num_prefill_pages + chosen.num_decode_pages
            self._take(Role.DECODE, chosen.decode, num_pages, chosen.prefill_s)
        else:
            self._take(Role.PREFILL, chosen.prefill, chosen.num_prefill_pages, chosen.prefill_s)
            self._take(Role.DECODE, chosen.decode, chosen.num_decode_pages, 0.0)

    def _take(self, role: Role, ref: WorkerRef, num_pages: int, work_s: float) -> None:
        pool = self._pools[role]
        view = pool.get(ref.incarnation)
        if view is not None:
            pool[ref.incarnation] = replace(
                view,
                num_credit_pages=view.num_credit_pages + num_pages,
                num_credits=view.num_credits + 1,
                num_context_tokens=view.num_context_tokens + num_pages * PAGE_TOKENS,
                queued_prefill_s=round(view.queued_prefill_s + work_s, NUM_WORK_DIGITS),
            )

    def _gather(self) -> None:
        self.view = ClusterView(*(tuple(self._pools[role].values()) for role in (Role.PREFILL, Role.DECODE)))


def _view(worker: LiveWorker, known: tuple[LiveWorker, WorkerView] | None) -> WorkerView:
    return known[1] if known is not None and known[0] == worker else worker_view(worker)


def worker_view(worker: LiveWorker) -> WorkerView:
    """A worker as decisions see it."""
    return WorkerView(
        ref=worker.ref,
        model=worker.card.model,
        num_pages=worker.card.num_pages,
        num_credit_pages=worker.num_credit_pages,
        num_credits=worker.num_credits,
        max_running=worker.card.max_running,
        max_context=worker.card.max_context,
        layout_fingerprint=worker.card.layout_fingerprint,
        max_batch_tokens=worker.card.max_batch_tokens,
        page_bytes=worker.card.page_bytes,
        profile=worker.load.profile,
        links=worker.load.links,
        queued_prefill_s=worker.credit_work_s,
        num_context_tokens=worker.num_credit_pages * PAGE_TOKENS,
        takes_work=worker.load.takes_work,
    )
