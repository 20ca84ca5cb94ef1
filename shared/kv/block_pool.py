"""Who holds which page of one engine's cache, and which pages hold a block that others may use.

Every page is in exactly one of three states:

    free ──acquire──> in use (1 or more references) ──last release──> free        if its block has no hash here
                        ^                            └──────────────> evictable   if it has: still found by its hash
                        ├──────────acquire (found)──────────────────────┤
                        └──────────acquire (new: its hash is evicted)───┘

`publish` gives a page in use the hash of the block it holds. A hash names one page: if another page has it already,
the later page stays private to its sequence and is free at the end. (Swapping it for the first would change page
tables under a running batch, to save a page in a case that the scheduler makes rare.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile

from shared.blocks import BlockHash, BlockKey, name_of


class BlockPool:
    """Owns the numbers of `num_pages` pages; knows nothing of their contents."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, it must be 1 or more")
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[BlockHash, int] = {}
        self._page_named: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        # Changes since last taken, net: a hash stored and evicted in between is in neither. Dicts keep the order.
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken: free plus evictable."""
        return len(self._free) + len(self._evictable)

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
        if `cost(found, num_new)` exceeds `num_free`.
        """
        if self.cost(found, num_new) > self.num_free:
            raise ValueError(f"{len(found)} found and {num_new} new pages wanted, {self.num_free} can be taken")
        for page in found:
            if self._references[page] == 0:
                del self._evictable[page]
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
            if page in self._hash_of:
                self._evictable[page] = None
            else:
                self._free.append(page)

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
        if block_hash in self._evicted:
            del self._evicted[block_hash]
        else:
            self._stored[block_hash] = None

    def withdraw(self, pages: Iterable[int]) -> None:
        """Make pages in use unfindable, because what they hold is not to be trusted."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is withdrawn but nobody holds it")
            if page in self._hash_of:
                self._forget(page)

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes that became findable and hashes that went, since the last call."""
        changes = tuple(self._stored), tuple(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return changes

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the pages add up and `holders` (one entry a holder) explain all references."""
        expected = [0] * self._num_pages
        for pages in holders:
            for page in pages:
                expected[page] += 1
        assert self._references == expected, "references differ from what the holders hold"

        free, evictable = set(self._free), set(self._evictable)
        in_use = {page for page, count in enumerate(expected) if count}
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(evictable) + len(in_use) == self._num_pages, "the three states do not cover all pages"
        assert free | evictable | in_use == set(range(self._num_pages)), "a page is in two states or in none"

        hashed = set(self._hash_of)
        assert not hashed & free, "a free page has a hash"
        assert evictable <= hashed, "an evictable page has no hash"
        assert self._page_of == {block_hash: page for page, block_hash in self._hash_of.items()}, "hashes disagree"
        assert not self._stored.keys() & self._evicted.keys(), "a hash is both stored and evicted"
        assert self._stored.keys() <= self._page_of.keys(), "a hash is stored but not findable"
        assert not self._evicted.keys() & self._page_of.keys(), "a hash is evicted but findable"

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def _forget(self, page: int) -> None:
        block_hash = self._hash_of.pop(page)
        del self._page_of[block_hash]
        del self._page_named[name_of(block_hash)]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._evicted[block_hash] = None
