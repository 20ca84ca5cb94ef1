"""What ingest knows of the workers: registry and credits, read afresh; block announcements, gathered over time."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from shared.blocks import PAGE_TOKENS
from shared.observe.metrics import IngestMetrics
from shared.policy.holders import Holders
from shared.policy.placement import Chosen
from shared.policy.views import ClusterView, WorkerView
from shared.request import Incarnation
from shared.state import keys
from shared.state.port import LiveWorker, Role, State
from shared.wire.topics import NUM_SLOTS

FEED_START = "0"

VIEW_MAX_AGE_S = 0.25
"""A view that was read longer ago than this is not recent."""


class Cluster:
    """The live workers and the blocks that they hold.

    Args:
        clock_s: unix seconds.
    """

    def __init__(self, state: State, metrics: IngestMetrics, clock_s: Callable[[], float]) -> None:
        self._state = state
        self._metrics = metrics
        self._clock_s = clock_s
        self._read_s = -math.inf
        self._cursors: dict[Incarnation, str] = {}
        self.view = ClusterView((), ())
        self.holders = Holders()
        self.fingerprints: dict[str, str] = {}

    async def refresh(self) -> ClusterView:
        """Read registry, loads and credits. Raises StateUnavailable.

        A store that came up less than a lease ago may not know all workers and credits yet: then nobody is there.
        """
        asked_s = self._clock_s()
        workers, up_ms = await asyncio.gather(
            self._state.workers(num_slots=NUM_SLOTS), self._state.up_ms(lease_ms=keys.LEASE_MS)
        )
        self._read_s = asked_s
        if up_ms < keys.LEASE_MS:
            self.view = ClusterView((), ())
            return self.view
        alive = {worker.card.incarnation for worker in workers}
        self._cursors = {incarnation: self._cursors.get(incarnation, FEED_START) for incarnation in alive}
        self.holders.keep_only(alive)
        self.fingerprints = {worker.card.model: worker.card.model_fingerprint for worker in workers}
        self.view = ClusterView(
            tuple(worker_view(worker) for worker in workers if worker.card.role is Role.PREFILL),
            tuple(worker_view(worker) for worker in workers if worker.card.role is Role.DECODE),
        )
        return self.view

    def recent(self) -> ClusterView | None:
        """The view, if it was read lately. What it promises the store may refuse."""
        return self.view if self._clock_s() - self._read_s <= VIEW_MAX_AGE_S else None

    def count(self, chosen: Chosen) -> None:
        """Note a placement of ours in the view, until the next reading tells of it."""
        self.view = ClusterView(
            tuple(
                _with_credit(w, chosen.num_prefill_pages) if w.ref == chosen.prefill else w for w in self.view.prefill
            ),
            tuple(_with_credit(w, chosen.num_decode_pages) if w.ref == chosen.decode else w for w in self.view.decode),
        )

    async def follow_feeds(self) -> None:
        """Take what the workers announced since the last time. Raises StateUnavailable."""
        for entry in await self._state.read_block_feeds(self._cursors):
            news = entry.news
            complete = self.holders.update(
                entry.incarnation,
                entry.sequence,
                news.stored,
                news.evicted,
                news.host_stored,
                news.host_evicted,
                is_full=news.is_full,
            )
            if not complete:
                self._metrics.feed_gaps.inc()
            if entry.incarnation in self._cursors:
                self._cursors[entry.incarnation] = entry.cursor


def _with_credit(worker: WorkerView, num_pages: int) -> WorkerView:
    return replace(
        worker,
        num_credit_pages=worker.num_credit_pages + num_pages,
        num_credits=worker.num_credits + 1,
        num_context_tokens=worker.num_context_tokens + num_pages * PAGE_TOKENS,
    )


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
