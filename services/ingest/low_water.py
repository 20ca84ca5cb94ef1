"""What may be committed: all records below the offset are dealt with, whatever order that happened in.

A job may wait for hours (batch does) while those behind it come and go. A successor must not read all of these again:
who ended long ago is forgotten, and would run twice. So the commit's note says more than its offset: from where on to
read, and which records below that are not dealt with. Those that wait for a short time only are not named: from the
first of them on all is read again, which is quicker than to look each up, and recent enough to do no harm.
"""

import math
from collections.abc import Iterable

from shared.bus.port import MAX_NOTE_BYTES, Committed

NAMED_AFTER_S = 10.0
"""A record that has waited for so long is named in the note."""


class LowWater:
    """Of one partition.

    Args:
        left: records below `position` that are not dealt with either.

    Attributes:
        position: of the record that is dealt with next.
    """

    def __init__(self, position: int, left: Iterable[int] = ()) -> None:
        self.position = position
        self._pending: dict[int, float] = dict.fromkeys(sorted(left), -math.inf)

    def begin(self, offset: int, now_s: float) -> None:
        """The record at `offset`, the next in order, is being dealt with."""
        self.position = offset + 1
        self._pending[offset] = now_s

    def end(self, offset: int) -> None:
        """It is dealt with."""
        self._pending.pop(offset, None)

    @property
    def offset(self) -> int:
        """All below are dealt with."""
        return next(iter(self._pending), self.position)

    def statement(self, now_s: float) -> Committed:
        """What to commit; see `read_note`."""
        first, begins, named, num_bytes = self.offset, self.position, list[str](), 0
        for offset, begun_s in self._pending.items():
            name = str(offset - first)
            num_bytes += len(name) + 1
            if begun_s > now_s - NAMED_AFTER_S or num_bytes > MAX_NOTE_BYTES - 32:
                begins = offset
                break
            named.append(name)
        return Committed(first, f"{begins - first}:{','.join(named)}" if named else "")


def read_note(committed: Committed) -> tuple[int, list[int]]:
    """From where on to read, and the records below that which are not dealt with."""
    if not committed.note:
        return committed.offset, []
    begins, _, named = committed.note.partition(":")
    return committed.offset + int(begins), [committed.offset + int(name) for name in named.split(",")]
