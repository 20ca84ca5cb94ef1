"""How many records are dealt with at a time: beyond that the log is the buffer."""

import asyncio

from services.ingest.work import InHand


class Hands:
    """Of one topic. One task takes; whoever has no room waits in the log.

    Args:
        max_records, max_bytes: one record more may be over the bytes.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._num_records = 0
        self._num_bytes = 0
        self._freed = asyncio.Event()

    @property
    def full(self) -> bool:
        return self._num_records >= self._max_records or self._num_bytes >= self._max_bytes

    async def take(self, in_hand: InHand) -> None:
        """Wait for room, and take it."""
        while self.full:
            self._freed.clear()
            await self._freed.wait()
        self.add(in_hand)

    def add(self, in_hand: InHand) -> None:
        """Take it, whether there is room or not."""
        self._num_records += 1
        self._num_bytes += in_hand.num_bytes

    def give_back(self, in_hand: InHand) -> None:
        """It needs no hand any more."""
        self._num_records -= 1
        self._num_bytes -= in_hand.num_bytes
        self._freed.set()
