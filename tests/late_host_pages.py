"""Host memory whose copies end as late as a device's may."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shared.kv.host_pages import PinnedPages
from shared.kv.paged_cache import PagedCache


@dataclass(eq=False)
class LateCopy:
    """One of a lane's; ended by those that wait for it or look often, or by `LateHostPages.end`."""

    owner: "LateHostPages"
    is_down: bool
    froms: tuple[int, ...]
    tos: tuple[int, ...]
    has_ended: bool = False
    num_looks: int = 0

    def query(self) -> bool:
        self.num_looks += 1
        if self.num_looks == self.owner.max_looks:
            self.synchronize()
        return self.has_ended

    def synchronize(self) -> None:
        self.owner.end_until(self)


class LateHostPages(PinnedPages):
    """Real memory; nothing is copied before the copy is said to have ended, in the order of each lane.

    Whoever overwrites what is still to be read, or reads what is still to be written, is found out.

    Args:
        max_looks: a copy that was looked at so often has ended; None: however often.

    Attributes:
        memory: `[num_slots, page_bytes]`, uint8.
    """

    def __init__(self, cache: PagedCache, num_slots: int, max_looks: int | None = None) -> None:
        super().__init__(cache, num_slots)
        self.max_looks = max_looks
        self.memory = self._host_bytes.view(num_slots, -1)
        self.lanes: dict[bool, deque[LateCopy]] = {True: deque(), False: deque()}

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> LateCopy:
        return self._begin(True, pages, slots)

    def restore(self, slots: Sequence[int], pages: Sequence[int]) -> LateCopy:
        return self._begin(False, slots, pages)

    def end(self, *, is_down: bool) -> None:
        """The oldest copy of a lane, if there is one, has ended."""
        if self.lanes[is_down]:
            self.end_until(self.lanes[is_down][0])

    def end_until(self, copy: LateCopy) -> None:
        """A copy and those before it have ended."""
        lane = self.lanes[copy.is_down]
        while not copy.has_ended:
            oldest = lane.popleft()
            (super().save if oldest.is_down else super().restore)(oldest.froms, oldest.tos)
            oldest.has_ended = True

    def _begin(self, is_down: bool, froms: Sequence[int], tos: Sequence[int]) -> LateCopy:
        copy = LateCopy(self, is_down, tuple(froms), tuple(tos))
        self.lanes[is_down].append(copy)
        return copy
