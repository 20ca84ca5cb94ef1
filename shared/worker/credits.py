"""Gives credits back to the scheduler, and keeps at it while the store is away."""

import asyncio
from collections.abc import Awaitable, Callable

from shared.request import Incarnation, PlacementId, WorkerRef
from shared.state.keys import BEAT_INTERVAL_S
from shared.state.port import State, StateUnavailable

Tell = Callable[[PlacementId, Incarnation], Awaitable[None]]


class Credits:
    """What this worker still has to give back."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._due: asyncio.Queue[tuple[Tell, PlacementId, Incarnation]] = asyncio.Queue()

    def computed(self, placement: PlacementId, worker: WorkerRef) -> None:
        """The placement's prompt is computed; its pages are not free yet. Does not wait; again does no harm."""
        self._due.put_nowait((self._state.computed, placement, worker.incarnation))

    def give_back(self, placement: PlacementId, *workers: WorkerRef) -> None:
        """The placement needs nothing of these workers any more. Does not wait; again does no harm."""
        for worker in workers:
            self._due.put_nowait((self._state.give_back, placement, worker.incarnation))

    async def run(self) -> None:
        """Give back what is due, for ever."""
        while True:
            tell, placement, incarnation = await self._due.get()
            while True:
                try:
                    await tell(placement, incarnation)
                except StateUnavailable:
                    await asyncio.sleep(BEAT_INTERVAL_S)
                else:
                    break
