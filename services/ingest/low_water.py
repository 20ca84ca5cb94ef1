"""What may be committed: all records below the offset are dealt with, whatever order that happened in.

A job may wait for hours (batch does) while those behind it come and go. A successor must not read all of these again:
who ended long ago is forgotten, and would run twice. So the commit's note says more than its offset: from where on to
read, which records below that are not dealt with, and since when some of all these may have been. Those that wait for a
short time only are not named: from the first of them on all is read again, which is quicker than to look each up.
"""

import math
from dataclasses import dataclass

from shared.bus.port import MAX_NOTE_BYTES, Committed

NAMED_AFTER_S = 10.0
"""A record that has waited for so long is named in the note."""

TIME_STEP_S = 30
"""The note's time is rounded down to these, so that while nothing happens it is written again so often only."""

_REST_BYTES = 64
"""Of a note: all but the names."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a commit says of a partition.

    Attributes:
        begins: read from here on.
        named: records below that which are not dealt with.
        since_s: none of all these was dealt with before (unix seconds by the writer's clock; 0: it does not tell).
    """

    begins: int
    named: tuple[int, ...] = ()
    since_s: float = 0.0


class LowWater:
    """Of one partition.

    Args:
        left: as whoever had the partition before left it.

    Attributes:
        position: of the record that is dealt with next.
    """

    def __init__(self, left: Left) -> None:
        self.position = left.begins
        self._pending: dict[int, float] = dict.fromkeys(sorted(left.named), -math.inf)
        self._unsure = set(left.named)
        """Others had these before, and may have dealt with them since `_unsure_since_s`."""
        self._unsure_since_s = left.since_s

    def begin(self, offset: int, now_s: float, others_had_since_s: float | None = None) -> None:
        """The record at `offset`, the next in order, is being dealt with."""
        self.position = offset + 1
        self._pending[offset] = now_s
        if others_had_since_s is not None:
            since_s = min(self._unsure_since_s, others_had_since_s) if self._unsure else others_had_since_s
            self._unsure_since_s = since_s
            self._unsure.add(offset)

    def end(self, offset: int) -> None:
        """It is dealt with."""
        self._pending.pop(offset, None)
        self._unsure.discard(offset)

    @property
    def offset(self) -> int:
        """All below are dealt with."""
        return next(iter(self._pending), self.position)

    def statement(self, now_s: float) -> Committed:
        """What to commit; see `read_commit`."""
        first, begins, named, num_bytes = self.offset, self.position, list[str](), 0
        since_s = self._unsure_since_s if self._unsure else now_s
        for offset, begun_s in self._pending.items():
            name = str(offset - first)
            num_bytes += len(name) + 1
            if begun_s > now_s - NAMED_AFTER_S or num_bytes > MAX_NOTE_BYTES - _REST_BYTES:
                begins = offset
                if offset not in self._unsure:
                    since_s = min(since_s, begun_s)
                break
            named.append(name)
        if not named:
            return Committed(first)
        time_s = max(0, int(since_s // TIME_STEP_S * TIME_STEP_S))
        return Committed(first, f"{begins - first}:{','.join(named)}@{time_s}")


def read_commit(committed: Committed | None) -> Left:
    """What stands in a commit."""
    if committed is None or not committed.note:
        return Left(0 if committed is None else committed.offset)
    begins, _, rest = committed.note.partition(":")
    named, _, time_s = rest.partition("@")
    offsets = tuple(committed.offset + int(name) for name in named.split(","))
    return Left(committed.offset + int(begins), offsets, float(time_s or 0))
