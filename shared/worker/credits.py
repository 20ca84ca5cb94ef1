"""Gives credits back to the scheduler, and keeps at it while the store is away."""

import asyncio

from shared.request import Incarnation, PlacementId, WorkerRef
from shared.state.keys import BEAT_INTERVAL_S
from shared.state.port import State, StateUnavailable


class Credits:
    """What this worker still has to give back."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._due: asyncio.Queue[tuple[PlacementId, Incarnation]] = asyncio.Queue()

    def give_back(self, placement: PlacementId, *workers: WorkerRef) -> None:
        """The placement needs nothing of these workers any more. Does not wait; again does no harm."""
        for worker in workers:
            self._due.put_nowait((placement, worker.incarnation))

    async def run(self) -> None:
        """Give back what is due, for ever."""
        while True:
            placement, incarnation = await self._due.get()
            while True:
                try:
                    await self._state.give_back(placement, incarnation)
                except StateUnavailable:
                    await asyncio.sleep(BEAT_INTERVAL_S)
                else:
                    break
