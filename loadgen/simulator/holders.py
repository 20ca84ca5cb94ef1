"""Which worker holds what, counted in segments: gives the same answers as `shared.policy.holders` gives by page."""

from collections import defaultdict
from collections.abc import Sequence

from loadgen.simulator.pages import PagePath
from shared.blocks import BlockHash
from shared.policy.holders import Holders
from shared.request import Incarnation


class SegmentHolders(Holders):
    """Stands where a policy asks for holders of a `PagePath`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self._lengths = lengths
        self._on_gpu: defaultdict[int, dict[Incarnation, int]] = defaultdict(dict)
        self._on_host: defaultdict[int, dict[Incarnation, int]] = defaultdict(dict)

    def note(self, holder: Incarnation, segment: int, num_pages: int, *, on_host: bool) -> None:
        """The holder has the segment up to this page now; on its host, behind what is on its GPU."""
        held = (self._on_host if on_host else self._on_gpu)[segment]
        if num_pages:
            held[holder] = num_pages
        else:
            held.pop(holder, None)

    def overlap(self, holder: Incarnation, blocks: Sequence[BlockHash]) -> tuple[int, int]:
        return self.matches(blocks).get(holder, (0, 0))

    def matches(self, blocks: Sequence[BlockHash]) -> dict[Incarnation, tuple[int, int]]:
        assert isinstance(blocks, PagePath), "the simulator's requests name segments"
        if not blocks:
            return {}
        limit = len(blocks)
        on_gpu = self._pages_from_first(blocks, anywhere=False)
        if not self._on_host:
            return {holder: (min(num, limit), min(num, limit)) for holder, num in on_gpu.items()}
        return {
            holder: (min(on_gpu.get(holder, 0), limit), min(num, limit))
            for holder, num in self._pages_from_first(blocks, anywhere=True).items()
        }

    def _pages_from_first(self, blocks: PagePath, *, anywhere: bool) -> dict[Incarnation, int]:
        """Of each holder, without a gap; counted on to the end of the last segment."""
        runs: dict[Incarnation, int] = {}
        unbroken: list[Incarnation] | None = None
        for segment in blocks.segments:
            held = self._held(segment, anywhere=anywhere)
            length = self._lengths[segment]
            going_on: list[Incarnation] = []
            for holder in held if unbroken is None else unbroken:
                here = held.get(holder, 0)
                runs[holder] = runs.get(holder, 0) + here
                if here == length:
                    going_on.append(holder)
            if not going_on:
                break
            unbroken = going_on
        return runs

    def _held(self, segment: int, *, anywhere: bool) -> dict[Incarnation, int]:
        on_gpu = self._on_gpu.get(segment, {})
        if not anywhere or segment not in self._on_host:
            return on_gpu
        on_host = self._on_host[segment]
        return {holder: max(on_gpu.get(holder, 0), on_host.get(holder, 0)) for holder in {*on_gpu, *on_host}}
