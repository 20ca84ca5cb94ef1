"""Who holds which page of one engine's cache, and which pages hold a block that others may use.

Every page is in exactly one of three states:

    free ──acquire──> in use (1 or more references) ──last release──> free        if its block has no hash here
                        ^                            └──────────────> evictable   if it has: still found by its hash
                        ├──────────acquire (found)──────────────────────┤
                        └──────────acquire (new: its hash is evicted)───┘

`publish` gives a page in use the hash of the block it holds. A hash names one page: if another page has it already,
the later page stays private to its sequence and is free at the end. (Swapping it for the first would change page
tables under a running batch, to save a page in a case that the scheduler makes rare.)

Where there is a second tier (`shared.kv.host_tier`), an evictable page is also unsaved, being saved or saved: what it
holds is nowhere else, is on its way, or has a copy. While it is being saved nobody else gets it. Free pages are taken
first, then saved ones, then unsaved ones, of each the least recently used first.
"""

from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Sequence
from itertools import islice, takewhile

from shared.blocks import BlockHash, BlockKey, name_of
from shared.kv.net_changes import NetChanges


class BlockPool:
    """Owns the numbers of `num_pages` pages; knows nothing of their contents."""

    def __init__(self, num_pages: int, copies: Container[BlockHash] = ()) -> None:
        """`copies`: the blocks that the second tier has."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, it must be 1 or more")
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._unsaved: OrderedDict[int, None] = OrderedDict()  # evictable ones; least recently used first
        self._saving: dict[int, None] = {}
        self._saved: OrderedDict[int, None] = OrderedDict()
        self._being_read: set[int] = set()  # by copies to the other tier; those in `_saving`, and some in use
        self._page_of: dict[BlockHash, int] = {}
        self._page_named: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._changes = NetChanges()
        self._copies = copies
        self._num_lost = 0

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken, if need be when they are saved: free plus evictable."""
        return self.num_free_at_once + len(self._saving)

    @property
    def num_free_at_once(self) -> int:
        """Pages that can be taken now: those that are being saved are not among them."""
        return len(self._free) + len(self._saved) + len(self._unsaved)

    @property
    def num_free_of_loss(self) -> int:
        """Pages that can be taken, now or when they are saved, without losing a block: free, saved and being saved."""
        return len(self._free) + len(self._saved) + len(self._saving)

    @property
    def num_lost(self) -> int:
        """Blocks evicted that had no copy, ever."""
        return self._num_lost

    @property
    def hashes(self) -> Collection[BlockHash]:
        """All that `find` knows."""
        return self._page_of.keys()

    def find(self, hashes: Iterable[BlockHash]) -> tuple[int, ...]:
        """Pages of the longest run of known `hashes` from the first on. Takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            page = self._page_of.get(block_hash)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def find_named(self, names: Iterable[BlockHash]) -> tuple[int, ...]:
        """As `find`, by what the blocks are announced as."""
        return tuple(takewhile(lambda page: page >= 0, (self._page_named.get(name, -1) for name in names)))

    def key_of(self, page: int) -> BlockKey:
        """Of the block in a page that was found."""
        return BlockKey(self._hash_of[page])

    def cost(self, found: Sequence[int], num_new: int) -> int:
        """By how much `acquire(found, num_new)` would lower `num_free`."""
        return num_new + sum(self._references[page] == 0 for page in found)

    def acquire(self, found: Sequence[int], num_new: int) -> tuple[int, ...]:
        """Add a reference to each page of `found`, then take `num_new` more pages; returns all in that order.

        `found` comes from `find`, with nothing acquired or released since. Raises ValueError, having changed nothing,
        if `cost(found, num_new)` exceeds `num_free`, or if pages are lacking that are being saved.
        """
        num_found_saving = sum(page in self._saving for page in found) if self._saving else 0
        if self.cost(found, num_new) > self.num_free_at_once + num_found_saving:
            raise ValueError(f"{len(found)} found and {num_new} new pages wanted, {self.num_free_at_once} can be taken")
        for page in found:
            if self._references[page] == 0:
                self._leave_evictable(page)
            self._references[page] += 1
        return (*found, *(self._take() for _ in range(num_new)))

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's pages, given in order of position.

        The last page becomes evictable first: a block is of no use without those before it.
        """
        for page in reversed(pages):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._references[page] -= 1
            if self._references[page] > 0:
                continue
            if page not in self._hash_of:
                self._free.append(page)
            elif page in self._being_read:
                self._saving[page] = None
            else:
                self._unsaved[page] = None

    def publish(self, page: int, block_hash: BlockHash) -> None:
        """`page`, in use and from now on unchanging, holds the block `block_hash`: others may find it.

        Does nothing if another page holds that block already.
        """
        if self._references[page] < 1:
            raise ValueError(f"page {page} is published but nobody holds it")
        if block_hash in self._page_of:
            return
        if page in self._hash_of:
            raise ValueError(f"page {page} is published twice with different hashes")
        self._page_of[block_hash] = page
        self._page_named[name_of(block_hash)] = page
        self._hash_of[page] = block_hash
        self._changes.add(block_hash)

    def withdraw(self, pages: Iterable[int]) -> tuple[BlockHash, ...]:
        """Make pages in use unfindable, because what they hold is not to be trusted; the hashes of those that were."""
        withdrawn: list[BlockHash] = []
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is withdrawn but nobody holds it")
            if page in self._hash_of:
                withdrawn.append(self._hash_of[page])
                self._forget(page)
        return tuple(withdrawn)

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes that became findable and hashes that went, since the last call."""
        return self._changes.take()

    # What the second tier asks.

    def oldest_unsaved(self, num_pages: int) -> list[tuple[int, BlockKey]]:
        """Up to so many unsaved pages, with what they hold, in the order in which they would be evicted."""
        return [(page, self.key_of(page)) for page in islice(self._unsaved, num_pages)]

    def begin_save(self, page: int) -> None:
        """An unsaved page is being copied: until `end_save` nobody else gets it."""
        del self._unsaved[page]
        self._saving[page] = None
        self._being_read.add(page)

    def end_save(self, page: int, *, is_saved: bool) -> bool:
        """The copy has ended; `is_saved`: it holds what `page` holds. Returns whether the page is evictable."""
        self._being_read.remove(page)
        if page not in self._saving:
            return False
        del self._saving[page]
        if is_saved:
            self._saved[page] = None
        else:
            self._unsaved[page] = None
            self._unsaved.move_to_end(page, last=False)
        return True

    def has_copy(self, page: int) -> None:
        """What an unsaved page holds has a copy already."""
        del self._unsaved[page]
        self._saved[page] = None

    def lost_copy(self, block_hash: BlockHash) -> None:
        """The copy of a block is gone."""
        page = self._page_of.get(block_hash)
        if page is not None and page in self._saved:
            del self._saved[page]
            self._unsaved[page] = None
            self._unsaved.move_to_end(page, last=False)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the pages add up and `holders` (one entry a holder) explain all references."""
        expected = [0] * self._num_pages
        for pages in holders:
            for page in pages:
                expected[page] += 1
        assert self._references == expected, "references differ from what the holders hold"

        free, groups = set(self._free), (self._unsaved, self._saving, self._saved)
        evictable = {page for group in groups for page in group}
        in_use = {page for page, count in enumerate(expected) if count}
        assert len(free) == len(self._free), "a page is free twice"
        assert sum(map(len, groups)) == len(evictable), "a page is both saved and not"
        assert len(free) + len(evictable) + len(in_use) == self._num_pages, "the three states do not cover all pages"
        assert free | evictable | in_use == set(range(self._num_pages)), "a page is in two states or in none"

        hashed = set(self._hash_of)
        assert not hashed & free, "a free page has a hash"
        assert evictable <= hashed, "an evictable page has no hash"
        assert self._page_of == {block_hash: page for page, block_hash in self._hash_of.items()}, "hashes disagree"
        assert set(self._saving) == self._being_read & evictable, "a page that is being saved can be taken"
        self._changes.check(self._page_of)

    def check_saved(self, being_read: Collection[int]) -> None:
        """Raise AssertionError unless the second tier and this one agree on what is saved and what is being saved."""
        assert self._being_read == set(being_read), "pages are read by nobody"
        assert all(self._hash_of[page] in self._copies for page in self._saved), "a saved page has no copy"

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._saved:
            page, _ = self._saved.popitem(last=False)
            self._forget(page)
        else:
            page, _ = self._unsaved.popitem(last=False)
            self._num_lost += self._hash_of[page] not in self._copies
            self._forget(page)
        self._references[page] = 1
        return page

    def _leave_evictable(self, page: int) -> None:
        for group in (self._unsaved, self._saved, self._saving):
            if page in group:
                del group[page]
                return

    def _forget(self, page: int) -> None:
        block_hash = self._hash_of.pop(page)
        del self._page_of[block_hash]
        del self._page_named[name_of(block_hash)]
        self._changes.remove(block_hash)
