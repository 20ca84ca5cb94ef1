"""Prompts and answers as runs of pages that always come together.

A conversation's pages form a tree: a page stands for its tokens *and all before them*. Where the tree does not branch
and no prompt or answer ends, its pages are always looked up, computed, used and dropped together, so the simulator
counts such a run as one segment. This loses nothing and is thirty times less work than page by page.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from shared.blocks import BlockHash


class PagePath(Sequence[BlockHash]):
    """The full pages of a prompt, as segments; stands where a policy passes block hashes on without reading them.

    Attributes:
        segments: numbers, from the first page on.
    """

    __slots__ = ("_num_pages", "segments")

    def __init__(self, segments: tuple[int, ...], num_pages: int) -> None:
        self.segments = segments
        self._num_pages = num_pages

    def __len__(self) -> int:
        return self._num_pages

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> "PagePath": ...
    def __getitem__(self, index: int | slice) -> "BlockHash | PagePath":
        """A beginning of the path; raises TypeError for a single page, which has no hash here."""
        if not isinstance(index, slice) or index.start or index.step is not None:
            raise TypeError("the simulator counts pages in runs: of these only a beginning can be taken")
        return PagePath(self.segments, len(range(self._num_pages)[index]))


@dataclass(frozen=True, slots=True)
class Ends:
    """Where a row's prompt and its answer end on its path, in full pages."""

    num_prompt_pages: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Segmented:
    """Paths cut into segments.

    Attributes:
        lengths: pages of each segment.
        paths: of each row, prompt and answer.
        num_prompt_segments: how many of the path's segments are the prompt's.
    """

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    num_prompt_segments: tuple[int, ...]


def cut_into_segments(paths: Sequence[Sequence[int]], ends: Sequence[Ends]) -> Segmented:
    """Cut where a path ends, a prompt ends, or two paths part.

    Args:
        paths: names of pages; equal names have equal names before them.
    """
    follower: dict[int, int] = {}
    last_pages: set[int] = set()
    for path, end in zip(paths, ends, strict=True):
        last_pages.update(path[place - 1] for place in (end.num_prompt_pages, end.num_pages) if place)
        before = None
        for page in path:
            if before is not None and follower.setdefault(before, page) != page:
                last_pages.add(before)
            before = page
    lengths: list[int] = []
    segment_at: dict[int, int] = {}
    cut: list[tuple[int, ...]] = []
    num_prompt_segments: list[int] = []
    for path, end in zip(paths, ends, strict=True):
        segments: list[int] = []
        in_prompt = 0
        for start, stop in _runs(path, last_pages):
            segment = segment_at.get(path[start])
            if segment is None:
                segment = segment_at[path[start]] = len(lengths)
                lengths.append(stop - start)
            segments.append(segment)
            in_prompt += stop <= end.num_prompt_pages
        cut.append(tuple(segments))
        num_prompt_segments.append(in_prompt)
    return Segmented(tuple(lengths), tuple(cut), tuple(num_prompt_segments))


def _runs(path: Sequence[int], last_pages: set[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for index, page in enumerate(path, start=1):
        if page in last_pages:
            yield start, index
            start = index


class Pinned:
    """What one sequence has of a pool.

    Attributes:
        segments: those it uses together with others, in order of position.
        num_own: pages that nobody can find.
    """

    __slots__ = ("num_own", "segments")

    def __init__(self) -> None:
        self.segments: list[int] = []
        self.num_own = 0


class Found:
    """The longest run from a path's first page on that a pool has.

    Attributes:
        num_segments: of the path, of which at least one page is there.
        cost: pages of them that could be evicted until they are used.
    """

    __slots__ = ("cost", "num_pages", "num_segments")

    def __init__(self, num_segments: int, num_pages: int, cost: int) -> None:
        self.num_segments = num_segments
        self.num_pages = num_pages
        self.cost = cost


class Watcher:
    """Told of what changes in a pool; does nothing."""

    def held(self, segment: int, num_pages: int) -> None:
        """The pool has the first `num_pages` pages of the segment now, where others find them."""

    def evicted(self, segment: int, first: int, end: int) -> None:
        """Pages [first, end) of the segment were evicted to make room."""


class PagePool:
    """`shared.kv.block_pool.BlockPool`, counted in segments: the same pages are found, pinned, published and evicted in
    the same order. Of a segment that was evicted in part its first pages are left.

    Every page is unused, evictable, pinned (of a segment that a sequence uses) or a sequence's own.
    """

    def __init__(self, num_pages: int, lengths: Sequence[int], watcher: Watcher) -> None:
        self.num_pages = num_pages
        self._lengths = lengths
        self._watcher = watcher
        self._held: dict[int, int] = {}
        self._references: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_unused = num_pages
        self._num_evictable = 0

    @property
    def num_free(self) -> int:
        """Pages that can be taken: unused and evictable."""
        return self._num_unused + self._num_evictable

    @property
    def num_in_use(self) -> int:
        """Pages that cannot be taken."""
        return self.num_pages - self.num_free

    def held(self, segment: int) -> int:
        """Pages of the segment, from its first on, that are here."""
        return self._held.get(segment, 0)

    def find(self, segments: Sequence[int]) -> Found:
        """What is here of a path, from its first page on."""
        held, references, lengths = self._held, self._references, self._lengths
        num_segments = num_pages = cost = 0
        for segment in segments:
            here = held.get(segment)
            if here is None:
                break
            num_segments += 1
            num_pages += here
            if not references.get(segment):
                cost += here
            if here < lengths[segment]:
                break
        return Found(num_segments, num_pages, cost)

    def fits(self, found: Found, num_new: int) -> bool:
        """Whether `found` can be used and `num_new` pages taken beside it."""
        return found.cost + num_new <= self._num_unused + self._num_evictable

    def acquire(self, segments: Sequence[int], found: Found, num_new: int) -> Pinned:
        """Use what was found of the path and take `num_new` pages. Raises ValueError if they do not fit."""
        if not self.fits(found, num_new):
            raise ValueError(f"{found.cost} found and {num_new} new pages wanted, {self.num_free} can be taken")
        pinned = Pinned()
        for segment in segments[: found.num_segments]:
            self._pin(segment, pinned)
        self.take(pinned, num_new)
        return pinned

    def take(self, pinned: Pinned, num_pages: int) -> None:
        """Give a sequence more pages of its own. Raises ValueError if there are not so many."""
        if num_pages > self._num_unused:
            self._evict(num_pages - self._num_unused)
        self._num_unused -= num_pages
        pinned.num_own += num_pages

    def give_back(self, pinned: Pinned, num_pages: int) -> None:
        """Take back so many of a sequence's own pages."""
        pinned.num_own -= num_pages
        self._num_unused += num_pages

    def publish(self, pinned: Pinned, segment: int) -> None:
        """The sequence's own pages hold the whole segment: others may find it. What is there already stays."""
        here = self._held.get(segment, 0)
        length = self._lengths[segment]
        if here == length:
            return
        mine = segment in pinned.segments
        if not mine:
            if here:
                self._pin(segment, pinned)
            else:
                pinned.segments.append(segment)
                self._references[segment] = 1
        pinned.num_own -= length - here
        self._held[segment] = length
        self._watcher.held(segment, length)

    def release(self, pinned: Pinned) -> None:
        """The sequence uses nothing any more; the last page becomes evictable first."""
        self._num_unused += pinned.num_own
        pinned.num_own = 0
        references = self._references
        for segment in reversed(pinned.segments):
            references[segment] -= 1
            if not references[segment]:
                del references[segment]
                self._evictable[segment] = None
                self._num_evictable += self._held[segment]
        pinned.segments.clear()

    def check(self, holders: Iterable[Pinned]) -> None:
        """Raise AssertionError unless all pages add up and `holders` explain who uses what."""
        references: dict[int, int] = {}
        num_own = 0
        for pinned in holders:
            assert pinned.num_own >= 0, "a sequence owes pages"
            num_own += pinned.num_own
            for segment in pinned.segments:
                references[segment] = references.get(segment, 0) + 1
        assert references == self._references, "references differ from what the holders use"
        assert not references.keys() & self._evictable.keys(), "a segment in use can be evicted"
        assert self._held.keys() == references.keys() | self._evictable.keys(), (
            "a segment is neither used nor evictable"
        )
        assert self._num_evictable == sum(self._held[segment] for segment in self._evictable), "evictable pages"
        num_pinned = sum(self._held[segment] for segment in references)
        assert self._num_unused >= 0, "more pages in use than there are"
        assert self._num_unused + self._num_evictable + num_pinned + num_own == self.num_pages, "pages do not add up"

    def _pin(self, segment: int, pinned: Pinned) -> None:
        count = self._references.get(segment, 0)
        if not count:
            del self._evictable[segment]
            self._num_evictable -= self._held[segment]
        self._references[segment] = count + 1
        pinned.segments.append(segment)

    def _evict(self, num_pages: int) -> None:
        if num_pages > self._num_evictable:
            raise ValueError(f"{num_pages} more pages wanted, {self._num_evictable} can be evicted")
        self._num_evictable -= num_pages
        self._num_unused += num_pages
        while num_pages:
            segment = next(iter(self._evictable))
            here = self._held[segment]
            left = max(0, here - num_pages)
            if left:
                self._held[segment] = left
            else:
                del self._held[segment], self._evictable[segment]
            num_pages -= here - left
            self._watcher.held(segment, left)
            self._watcher.evicted(segment, left, here)


class HostTier:
    """Pages that fell out of a pool, in host memory: the longest unused ones make room.

    Of each segment it has one run of pages; what would leave a gap in it is dropped.
    """

    def __init__(self, num_pages: int, told: Watcher) -> None:
        self.num_pages = num_pages
        self._runs: OrderedDict[int, tuple[int, int]] = OrderedDict()  # least recently used first
        self._num_used = 0
        self._told = told

    def run(self, segment: int) -> tuple[int, int]:
        """Pages [first, end) of the segment that are here."""
        return self._runs.get(segment, (0, 0))

    def store(self, segment: int, first: int, end: int) -> None:
        """Take pages that the pool has evicted."""
        known_first, known_end = self._runs.pop(segment, (first, first))
        self._num_used -= known_end - known_first
        if known_first <= end and first <= known_end:
            first, end = min(first, known_first), max(end, known_end)
        self._runs[segment] = (first, end)
        self._num_used += end - first
        self._told.held(segment, end)
        while self._num_used > self.num_pages:
            self._drop_oldest()

    def use(self, segment: int) -> None:
        """The segment was read: it is young again."""
        run = self._runs.pop(segment, None)
        if run is not None:
            self._runs[segment] = run

    def _drop_oldest(self) -> None:
        segment = next(iter(self._runs))
        first, end = self._runs[segment]
        left = max(first, end - (self._num_used - self.num_pages))
        self._num_used -= end - left
        if left > first:
            self._runs[segment] = (first, left)
        else:
            del self._runs[segment]
            left = 0
        self._told.held(segment, left)
