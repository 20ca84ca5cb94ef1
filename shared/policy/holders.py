"""Which worker holds which block: a hint, built from the workers' announcements; the holder checks again."""

from collections.abc import Iterable, Sequence

from shared.blocks import BlockHash
from shared.request import Incarnation


class Holders:
    """Blocks held, by worker incarnation."""

    def __init__(self) -> None:
        self._blocks: dict[Incarnation, set[BlockHash]] = {}
        self._next_sequence: dict[Incarnation, int] = {}

    def update(
        self, holder: Incarnation, sequence: int, stored: Iterable[BlockHash], evicted: Iterable[BlockHash]
    ) -> bool:
        """Take the holder's next announcement. False: one is missing, so what was known of it has been forgotten."""
        complete = sequence == self._next_sequence.get(holder, 0)
        if not complete:
            self._blocks.pop(holder, None)
        self._next_sequence[holder] = sequence + 1
        blocks = self._blocks.setdefault(holder, set())
        blocks.update(stored)
        blocks.difference_update(evicted)
        return complete

    def keep_only(self, holders: Iterable[Incarnation]) -> None:
        """Forget all other holders: they are gone."""
        alive = set(holders)
        self._blocks = {holder: blocks for holder, blocks in self._blocks.items() if holder in alive}
        self._next_sequence = {holder: number for holder, number in self._next_sequence.items() if holder in alive}

    def overlap(self, holder: Incarnation, blocks: Sequence[BlockHash]) -> int:
        """How many of `blocks`, from the first on without a gap, the holder has."""
        held = self._blocks.get(holder)
        if not held:
            return 0
        for index, block in enumerate(blocks):
            if block not in held:
                return index
        return len(blocks)
