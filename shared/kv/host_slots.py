"""Which slot of host memory holds the copy of which block; knows nothing of their contents.

A copy is kept, if it is all there is of its block or soon will be, or spare, if the block is in use on the device as
well. A slot is found for a new copy where there is room, else in the place of a spare copy, else of a kept one, of each
the least recently used first. So nothing is held twice at the cost of what would be lost.

    free ──take──> being written ──put──> kept <──keep── spare
      ^                  │                  └──spare──────>┘ │
      └────give_back─────┴──────────── forget, or take ──────┘   (a slot that is pinned: when it is unpinned)
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, takewhile

from shared.blocks import BlockHash, BlockKey, name_of
from shared.kv.net_changes import NetChanges


class HostSlots:
    """Owns the numbers of `num_slots` slots, each of which has room for one page."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}, it must be 1 or more")
        self._num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[BlockHash, int] = {}
        self._key_of: dict[BlockHash, BlockHash] = {}  # by name
        self._kept: OrderedDict[BlockHash, None] = OrderedDict()  # least recently used first
        self._spare: OrderedDict[BlockHash, None] = OrderedDict()
        self._pins: Counter[int] = Counter()
        self._doomed: set[int] = set()  # pinned ones whose block is forgotten
        self._changes = NetChanges()

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._slot_of

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def num_used(self) -> int:
        """Slots that hold a copy."""
        return len(self._slot_of)

    @property
    def hashes(self) -> Collection[BlockHash]:
        """All blocks that have a copy."""
        return self._slot_of.keys()

    def find(self, hashes: Iterable[BlockHash]) -> tuple[int, ...]:
        """Slots of the longest run of known `hashes` from the first on. Pins nothing."""
        found: list[int] = []
        for block_hash in hashes:
            slot = self._slot_of.get(block_hash)
            if slot is None:
                break
            found.append(slot)
        return tuple(found)

    def find_named(self, names: Iterable[BlockHash]) -> tuple[BlockKey, ...]:
        """Keys of the longest run of known blocks from the first on, by what they are announced as."""
        keys = takewhile(lambda key: key is not None, (self._key_of.get(name) for name in names))
        return tuple(BlockKey(key) for key in keys if key is not None)

    def take(self) -> tuple[int, BlockHash | None] | None:
        """A slot to write to, and the block whose copy was in it; None if all are being written or pinned."""
        if self._free:
            return self._free.pop(), None
        for block_hash in chain(self._spare, self._kept):
            slot = self._slot_of[block_hash]
            if slot not in self._pins:
                self._drop(block_hash)
                return slot, block_hash
        return None

    def give_back(self, slot: int) -> None:
        """What was written to a slot that `take` gave is of no use."""
        self._free.append(slot)

    def put(self, block_hash: BlockHash, slot: int, *, is_spare: bool) -> None:
        """A slot that `take` gave holds the copy of a block that has none."""
        if block_hash in self._slot_of:
            raise ValueError("a block has two copies")
        self._slot_of[block_hash] = slot
        self._key_of[name_of(block_hash)] = block_hash
        (self._spare if is_spare else self._kept)[block_hash] = None
        self._changes.add(block_hash)

    def keep(self, block_hash: BlockHash) -> None:
        """The block goes from the device, or is wanted there: its copy is kept, as the one used last."""
        self._move(block_hash, self._kept)

    def spare(self, block_hash: BlockHash) -> None:
        """The block is in use on the device: its copy, if it has one, may go first."""
        if block_hash in self._slot_of:
            self._move(block_hash, self._spare)

    def forget(self, block_hash: BlockHash) -> None:
        """The copy of a block, if it has one, is not to be trusted."""
        slot = self._slot_of.get(block_hash)
        if slot is None:
            return
        self._drop(block_hash)
        if slot in self._pins:
            self._doomed.add(slot)
        else:
            self._free.append(slot)

    def pin(self, hashes: Sequence[BlockHash]) -> tuple[int, ...]:
        """The slots of these blocks, each of which has a copy: what they hold stays there until `unpin`.

        They are the ones used last, the first block behind all: who looks for a slot meets few that are pinned.
        """
        for block_hash in reversed(hashes):
            self.keep(block_hash)
        slots = tuple(self._slot_of[block_hash] for block_hash in hashes)
        self._pins.update(slots)
        return slots

    def unpin(self, slots: Iterable[int]) -> None:
        """The end of one `pin`."""
        for slot in slots:
            self._pins[slot] -= 1
            if self._pins[slot]:
                continue
            del self._pins[slot]
            if slot in self._doomed:
                self._doomed.remove(slot)
                self._free.append(slot)

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Blocks that got a copy and blocks that lost theirs, since the last call."""
        return self._changes.take()

    def check(self, writing: Collection[int], pinned: Iterable[int]) -> None:
        """Raise AssertionError unless the slots add up, with those being written and the pins that are held."""
        groups = (self._free, self._slot_of.values(), self._doomed, writing)
        slots = sorted(slot for group in groups for slot in group)
        assert slots == list(range(self._num_slots)), "a slot is in two states or in none"
        assert self._kept.keys() | self._spare.keys() == self._slot_of.keys(), "a copy is neither kept nor spare"
        assert self._key_of == {name_of(key): key for key in self._slot_of}, "names differ from what there is"
        assert not self._kept.keys() & self._spare.keys(), "a copy is kept and spare"
        assert self._pins == Counter(pinned), "pins differ from what the holders hold"
        assert not self._pins.keys() & {*self._free, *writing}, "a pinned slot is free or being written"
        assert self._doomed <= self._pins.keys(), "a slot of a forgotten block is kept for nobody"
        self._changes.check(self._slot_of)

    def _move(self, block_hash: BlockHash, group: "OrderedDict[BlockHash, None]") -> None:
        self._kept.pop(block_hash, None)
        self._spare.pop(block_hash, None)
        group[block_hash] = None

    def _drop(self, block_hash: BlockHash) -> None:
        del self._slot_of[block_hash]
        del self._key_of[name_of(block_hash)]
        self._kept.pop(block_hash, None)
        self._spare.pop(block_hash, None)
        self._changes.remove(block_hash)
