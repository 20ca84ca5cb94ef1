"""Tells the store which blocks this worker has: what came and went, or all of them to who lost track."""

import asyncio

from shared.observe.log import Logger
from shared.request import Incarnation
from shared.state.port import BlockNews, State, StateUnavailable, pieces
from shared.worker.engine_thread import EngineThread

ANNOUNCE_INTERVAL_S = 0.25
"""Blocks that came and went are told so often."""


class BlockAnnouncer:
    """One worker's news of blocks.

    Attributes:
        num_announced: pieces of news so far; their numbers follow one another.
    """

    def __init__(self, state: State, incarnation: Incarnation, log: Logger) -> None:
        self.num_announced = 0
        self._state = state
        self._incarnation = incarnation
        self._log = log
        self._is_all_wanted = False

    def tell_all(self) -> None:
        """Somebody has lost track: the next news are the full list."""
        self._is_all_wanted = True

    async def run(self, engine: EngineThread) -> None:
        """Announce for ever. Apart from the beats: asking the engine waits for the end of its step, and a beat must
        not."""
        while True:
            await self._announce(engine)
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    async def _announce(self, engine: EngineThread) -> None:
        is_full, self._is_all_wanted = self._is_all_wanted, False
        changes = await engine.call(lambda owned: owned.take_all_blocks() if is_full else owned.take_block_changes())
        news_of_all = BlockNews(
            changes.stored, changes.evicted, changes.host_stored, changes.host_evicted, is_full=is_full
        )
        if news_of_all == BlockNews():
            return
        for news in pieces(news_of_all):
            sequence, self.num_announced = self.num_announced, self.num_announced + 1
            try:
                await self._state.announce_blocks(self._incarnation, sequence, news)
            except StateUnavailable as error:
                self._log.warning("block announcement lost; the full list follows", error=str(error))
                self._is_all_wanted = True  # who reads sees the gap only behind it, and there may be no more news
                return
