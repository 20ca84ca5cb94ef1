"""The second tier: copies in host memory of blocks that go from the pages of the device.

    evictable page ── save, before anybody else gets the page ──> slot ── restore, to a page that was acquired ──> page

- Saving runs ahead of eviction, so that nobody waits for it: pages are copied when they come near the end of the line
  of those that may be evicted, and a page that is being read stays where it is until then. It keeps so many pages free
  of loss as the pool may have to give at once. What has to go before its turn came is lost; it is computed again, and
  counted.
- All blocks are saved, each once: which turns come back nobody knows yet, and a copy costs little. A page of an 8B
  model takes 0.15 ms of the link (8 MiB at 55 GB/s) and took 1.4 ms to compute.
- So that the steps keep the link and the memory to themselves for most of the time, no more pages are on their way down
  than IDLE_PAGES and twice those that the step beside them computes. At 55 GB/s that is 1.5 ms of a decode step of 64
  rows, which takes 7 ms, and 40 ms of a step of 8192 tokens of prompt, which takes 210 ms.
- Restoring takes its turn by the order of asking, up to MAX_RESTORING_BYTES on their way.
- Who starts a copy learns of its end by asking: `advance`, between steps. No stream waits for another: a page is used
  when its copy has been seen to have ended.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.blocks import BlockHash, BlockKey
from shared.kv.block_pool import BlockPool
from shared.kv.host_slots import HostSlots

IDLE_PAGES = 8
"""May be on their way down beside a step that computes nothing."""

MAX_RESTORING_BYTES = 2 * 2**30
"""On their way up at once: 40 ms at 55 GB/s, so that no step has to queue more copies than it can hide."""


class Copied(Protocol):
    """A copy that was started."""

    def query(self) -> bool:
        """Whether it has ended; does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait for its end."""
        ...


class HostPages(Protocol):
    """The memory of the slots, and the copies between them and the pages; see `shared.kv.host_pages`."""

    @property
    def num_slots(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> Copied:
        """Begin to copy each of `pages` to the slot beside it, behind what was begun before."""
        ...

    def restore(self, slots: Sequence[int], pages: Sequence[int]) -> Copied:
        """Begin to copy each of `slots` to the page beside it, behind what was begun before."""
        ...


@dataclass(slots=True, eq=False)
class Restore:
    """A run of blocks on its way to pages.

    Attributes:
        num_started, num_done: of its pages, the first ones.
    """

    slots: tuple[int, ...]
    pages: tuple[int, ...]
    num_started: int = 0
    num_done: int = 0

    @property
    def is_done(self) -> bool:
        return self.num_done == len(self.pages)


@dataclass(slots=True, eq=False)
class _Save:
    """A page on its way to a slot.

    Attributes:
        is_void: what the page holds is not to be trusted.
    """

    page: int
    slot: int
    key: BlockKey
    is_void: bool = False


@dataclass(frozen=True, slots=True)
class _Saving:
    copied: Copied
    saves: list[_Save]


@dataclass(frozen=True, slots=True)
class _Restoring:
    copied: Copied
    parts: list[tuple[Restore, int]]


class HostTier:
    """Moves blocks between one pool's pages and slots of host memory. The engine's thread owns it."""

    def __init__(self, pool: BlockPool, slots: HostSlots, pages: HostPages, *, num_ahead: int) -> None:
        """`num_ahead`: so many pages of the pool are kept free of loss, as far as the slots reach."""
        self._pool = pool
        self._slots = slots
        self._pages = pages
        self._num_ahead = min(num_ahead, slots.num_slots, pool.num_pages)
        self._saving: deque[_Saving] = deque()  # oldest first
        self._restoring: deque[_Restoring] = deque()  # oldest first
        self._queued: deque[Restore] = deque()  # with pages whose copies are not started
        self._unfinished: dict[Restore, None] = {}
        self._num_saved = 0
        self._num_restored = 0

    @property
    def num_used(self) -> int:
        """Blocks that have a copy."""
        return self._slots.num_used

    @property
    def hashes(self) -> Collection[BlockHash]:
        """Of the blocks that have a copy."""
        return self._slots.hashes

    @property
    def num_saved_bytes(self) -> int:
        """Copied to the host, ever."""
        return self._num_saved * self._pages.page_bytes

    @property
    def num_restored_bytes(self) -> int:
        """Copied from the host, ever."""
        return self._num_restored * self._pages.page_bytes

    @property
    def is_restoring(self) -> bool:
        """Whether anybody waits for blocks from here."""
        return bool(self._unfinished)

    def num_found(self, keys: Iterable[BlockKey]) -> int:
        """Length of the longest run of blocks from the first of `keys` on that have a copy."""
        return len(self._slots.find(keys))

    def find_named(self, names: Iterable[BlockHash]) -> tuple[BlockKey, ...]:
        """Keys of the longest run of blocks that have a copy from the first of `names` on."""
        return self._slots.find_named(names)

    def used(self, keys: Iterable[BlockKey]) -> None:
        """These blocks are in use on the device: their copies, if they have any, may go first."""
        for key in keys:
            self._slots.spare(key)

    def forget(self, keys: Iterable[BlockHash]) -> None:
        """What these blocks hold is not to be trusted."""
        forgotten = set(keys)
        for key in forgotten:
            self._slots.forget(key)
        for save in self._saves:
            save.is_void |= save.key in forgotten

    def restore(self, keys: Sequence[BlockKey], pages: Sequence[int]) -> Restore:
        """Bring one or more blocks, each of which has a copy, to pages that nobody else uses until `advance` tells of
        the end."""
        num_found = self.num_found(keys)
        if not 0 < num_found == len(keys) == len(pages):
            raise ValueError(f"of {len(keys)} blocks {num_found} have a copy, for {len(pages)} pages")
        restore = Restore(self._slots.pin(keys), tuple(pages))
        self._unfinished[restore] = None
        self._queued.append(restore)
        self._start_restoring()
        return restore

    def advance(self, num_computed: int = 0) -> list[Restore]:
        """Take note of the copies that have ended, and begin others; returns the restores that are done.

        Args:
            num_computed: pages that the step beside the copies computes.
        """
        self._collect_saves()
        self._start_saving(IDLE_PAGES + 2 * num_computed)
        done: list[Restore] = []
        while self._restoring and self._restoring[0].copied.query():
            done += self._end_restoring(self._restoring.popleft())
        self._start_restoring()
        return done

    def wait(self) -> None:
        """Wait for the oldest copies from the host that are on their way; there are some if `is_restoring`."""
        self._restoring[0].copied.synchronize()

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Blocks that got a copy and blocks that lost theirs, since the last call."""
        return self._slots.take_changes()

    def settle(self) -> None:
        """Wait until no page is being saved."""
        if self._saving:
            self._saving[-1].copied.synchronize()
            self._collect_saves()

    def check(self) -> None:
        """Raise AssertionError unless slots and pages add up."""
        pinned = [slot for restore in self._unfinished for slot in restore.slots]
        self._slots.check([save.slot for save in self._saves], pinned)
        assert all(restore in self._unfinished for restore in self._queued), "a restore is queued that has ended"
        self._pool.check_saved({save.page for save in self._saves})

    @property
    def _saves(self) -> Iterator[_Save]:
        return (save for saving in self._saving for save in saving.saves)

    def _collect_saves(self) -> None:
        """In the order in which they were begun, which is that of their streams."""
        while self._saving and self._saving[0].copied.query():
            for save in self._saving.popleft().saves:
                is_good = not save.is_void and save.key not in self._slots
                is_evictable = self._pool.end_save(save.page, is_saved=is_good)
                if is_good:
                    self._slots.put(save.key, save.slot, is_spare=not is_evictable)
                else:
                    self._slots.give_back(save.slot)

    def _start_saving(self, max_pages: int) -> None:
        num_on_way = sum(len(saving.saves) for saving in self._saving)
        num_wanted = min(max_pages - num_on_way, self._num_ahead - self._pool.num_free_of_loss)
        if num_wanted <= 0:
            return
        saves: list[_Save] = []
        for page, key in self._pool.oldest_unsaved(num_wanted):
            if key in self._slots:
                self._slots.keep(key)
                self._pool.has_copy(page)
                continue
            taken = self._slots.take()
            if taken is None:
                break
            slot, dropped = taken
            if dropped is not None:
                self._pool.lost_copy(dropped)
            self._pool.begin_save(page)
            saves.append(_Save(page, slot, key))
        if saves:
            self._num_saved += len(saves)
            copied = self._pages.save([save.page for save in saves], [save.slot for save in saves])
            self._saving.append(_Saving(copied, saves))

    def _start_restoring(self) -> None:
        num_on_way = sum(num_pages for restoring in self._restoring for _, num_pages in restoring.parts)
        room = max(1, MAX_RESTORING_BYTES // self._pages.page_bytes) - num_on_way
        slots: list[int] = []
        pages: list[int] = []
        parts: list[tuple[Restore, int]] = []
        while self._queued and room > len(slots):
            restore = self._queued[0]
            start = restore.num_started
            end = restore.num_started = min(len(restore.slots), start + room - len(slots))
            slots += restore.slots[start:end]
            pages += restore.pages[start:end]
            parts.append((restore, end - start))
            if end == len(restore.slots):
                self._queued.popleft()
        if slots:
            self._num_restored += len(slots)
            self._restoring.append(_Restoring(self._pages.restore(slots, pages), parts))

    def _end_restoring(self, restoring: _Restoring) -> Iterator[Restore]:
        """Those of its restores that are done."""
        for restore, num_pages in restoring.parts:
            restore.num_done += num_pages
            if restore.is_done:
                del self._unfinished[restore]
                self._slots.unpin(restore.slots)
                yield restore
