"""Which blocks the workers hold, from what they announce; one that was lost track of is asked for its full list."""

import asyncio
from collections.abc import Callable, Iterable

from shared.observe.metrics import IngestMetrics
from shared.policy.holders import Holders
from shared.request import Incarnation
from shared.state.port import BlockFeedEntry, State

FEED_START = "0"

ASK_AGAIN_S = 2.0
"""A full list that has not come by then is asked for again: the store may have lost the question, or the worker its
answer."""


class BlockFeeds:
    """A cursor into the feed of each live worker.

    Args:
        clock_s: unix seconds.

    Attributes:
        holders: what was read adds up to.
    """

    def __init__(self, state: State, metrics: IngestMetrics, clock_s: Callable[[], float]) -> None:
        self.holders = Holders()
        self._state = state
        self._metrics = metrics
        self._clock_s = clock_s
        self._cursors: dict[Incarnation, str] = {}
        self._asked_s: dict[Incarnation, float | None] = {}
        """Who was lost track of, and when it was asked."""

    def keep_only(self, alive: Iterable[Incarnation]) -> None:
        """Follow these workers, the others are gone."""
        self._cursors = {incarnation: self._cursors.get(incarnation, FEED_START) for incarnation in alive}
        self._asked_s = {each: asked_s for each, asked_s in self._asked_s.items() if each in self._cursors}
        self.holders.keep_only(self._cursors)

    async def follow(self) -> None:
        """Take what was announced since the last time. Raises StateUnavailable."""
        followed = dict(self._cursors)
        while entries := await self._state.read_block_feeds(self._cursors):
            for entry in entries:
                self._take(entry)
                await asyncio.sleep(0)  # between any two a placement may be made
        for incarnation in followed:
            if self._cursors.get(incarnation) == FEED_START:
                # It has announced nothing yet, or the store forgot what it has.
                self._asked_s.setdefault(incarnation, None)
        await self._ask()

    def _take(self, entry: BlockFeedEntry) -> None:
        incarnation, news = entry.incarnation, entry.news
        if incarnation not in self._cursors:
            return
        self._cursors[incarnation] = entry.cursor
        is_complete = self.holders.update(
            incarnation,
            entry.sequence,
            news.stored,
            news.evicted,
            news.host_stored,
            news.host_evicted,
            is_full=news.is_full,
        )
        if news.is_full:
            self._asked_s.pop(incarnation, None)
        elif not is_complete:
            self._metrics.feed_gaps.inc()
            self._asked_s.setdefault(incarnation, None)

    async def _ask(self) -> None:
        now_s = self._clock_s()
        for incarnation, asked_s in list(self._asked_s.items()):
            if asked_s is None or now_s - asked_s >= ASK_AGAIN_S:
                await self._state.ask_for_blocks(incarnation)
                self._asked_s[incarnation] = now_s
                self._metrics.block_list_requests.inc()
