"""What may be committed: all records below the offset are dealt with, whatever order that happened in."""


class LowWater:
    """Of one partition.

    Attributes:
        position: of the record that is dealt with next.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self._pending: dict[int, None] = {}

    def begin(self, offset: int) -> None:
        """The record at `offset`, the next in order, is being dealt with."""
        self.position = offset + 1
        self._pending[offset] = None

    def end(self, offset: int) -> None:
        """It is dealt with."""
        self._pending.pop(offset, None)

    @property
    def offset(self) -> int:
        """All below are dealt with."""
        return next(iter(self._pending), self.position)
