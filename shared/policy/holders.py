"""Which worker holds which block, on its GPU or in its host memory: a hint, built from the workers' announcements;
the holder checks again.

One table for all workers: block -> the set of its holders, as bits of an integer. A prompt is walked once, whoever
holds it. Two million blocks of 64 workers take 200 MiB on CPython 3.11 (105 bytes a block, of which its hash is 64), a
prompt of 1,000 tokens is matched in a few microseconds (`python -m benchmarks.placement`).
"""

from collections.abc import Iterable, Sequence

from shared.blocks import BlockHash
from shared.request import Incarnation

NUM_SHARDS = 256
"""The table is split by a block's first byte, so that neither growing nor sweeping it takes long at a time."""

MAX_KNOWN_MASKS = 1 << 16


class Holders:
    """Blocks held, by worker incarnation and tier.

    Each holder has two bits: an even one for its GPU, the next for its host memory. The bits of one that was
    forgotten stand for nobody, until every shard has been swept clean of them (one shard an update).
    """

    def __init__(self) -> None:
        self._shards: list[dict[BlockHash, int]] = [{} for _ in range(NUM_SHARDS)]
        self._bits: dict[Incarnation, int] = {}
        self._names: dict[int, Incarnation] = {}
        self._next_sequence: dict[Incarnation, int] = {}
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._next_shard = 0
        self._known_masks: dict[int, int] = {}

    def update(
        self,
        holder: Incarnation,
        sequence: int,
        stored: Iterable[BlockHash],
        evicted: Iterable[BlockHash],
        host_stored: Iterable[BlockHash] = (),
        host_evicted: Iterable[BlockHash] = (),
        *,
        is_full: bool = False,
    ) -> bool:
        """Take the holder's next announcement; one that `is_full` says all that it holds, up to those behind it.

        False: one is missing, so what was known of it has been forgotten.
        """
        complete = is_full or sequence == self._next_sequence.get(holder, 0)
        if is_full or not complete:
            self._forget(holder)
        self._next_sequence[holder] = sequence + 1
        on_gpu = self._bit_of(holder)
        self._add(stored, on_gpu)
        self._take(evicted, on_gpu)
        self._add(host_stored, on_gpu << 1)
        self._take(host_evicted, on_gpu << 1)
        self._sweep()
        return complete

    def keep_only(self, holders: Iterable[Incarnation]) -> None:
        """Forget all other holders: they are gone."""
        gone = self._next_sequence.keys() - set(holders)
        for holder in gone:
            self._forget(holder)
            del self._next_sequence[holder]

    def overlap(self, holder: Incarnation, blocks: Sequence[BlockHash]) -> tuple[int, int]:
        """How many of `blocks`, from the first on without a gap, the holder has on its GPU, and has at all."""
        return self.matches(blocks).get(holder, (0, 0))

    def matches(self, blocks: Sequence[BlockHash]) -> dict[Incarnation, tuple[int, int]]:
        """`overlap` of each holder that has the first of `blocks` at all."""
        shards = self._shards
        on_gpu = anywhere = begun = 0
        gpu_ends: list[tuple[int, int]] = []
        ends: list[tuple[int, int]] = []
        last = None
        for index, block in enumerate(blocks):
            mask = shards[block[0]].get(block, 0)
            if mask is last:
                continue
            last = mask
            if index == 0:
                on_gpu = mask & self._live
                anywhere = begun = (mask | mask >> 1) & self._live
            if lost := on_gpu & ~mask:
                gpu_ends.append((lost, index))
                on_gpu ^= lost
            if lost := anywhere & ~(mask | mask >> 1):
                ends.append((lost, index))
                anywhere ^= lost
            if not anywhere:
                break
        if not begun:
            return {}
        gpu_ends.append((on_gpu, len(blocks)))
        ends.append((anywhere, len(blocks)))
        return self._runs(gpu_ends, ends)

    def _runs(self, gpu_ends: list[tuple[int, int]], ends: list[tuple[int, int]]) -> dict[Incarnation, tuple[int, int]]:
        num_on_gpu = {bit: length for bits, length in gpu_ends for bit in _each(bits)}
        names = self._names
        return {names[bit]: (num_on_gpu.get(bit, 0), length) for bits, length in ends for bit in _each(bits)}

    def _bit_of(self, holder: Incarnation) -> int:
        bit = self._bits.get(holder)
        if bit is None:
            taken = self._live | self._retired | self._sweeping
            bit = next(bit for bit in _even_bits() if not bit & taken)
            self._bits[holder] = bit
            self._names[bit] = holder
            self._live |= bit
        return bit

    def _forget(self, holder: Incarnation) -> None:
        bit = self._bits.pop(holder, None)
        if bit is not None:
            del self._names[bit]
            self._live ^= bit
            self._retired |= bit

    def _add(self, blocks: Iterable[BlockHash], bit: int) -> None:
        shards = self._shards
        for block in blocks:
            shard = shards[block[0]]
            shard[block] = self._known(shard.get(block, 0) | bit)

    def _take(self, blocks: Iterable[BlockHash], bit: int) -> None:
        for block in blocks:
            shard = self._shards[block[0]]
            mask = shard.get(block, 0) & ~bit
            if mask:
                shard[block] = self._known(mask)
            else:
                shard.pop(block, None)

    def _known(self, mask: int) -> int:
        """The one object that stands for this set: millions of blocks have few sets of holders."""
        if len(self._known_masks) >= MAX_KNOWN_MASKS:
            self._known_masks.clear()
        return self._known_masks.setdefault(mask, mask)

    def _sweep(self) -> None:
        """Clean one shard of bits that stand for nobody; after the last, they are free again."""
        if not self._sweeping:
            self._sweeping, self._retired = self._retired, 0
            self._next_shard = 0
            if not self._sweeping:
                return
        keep = ~(self._sweeping | self._sweeping << 1)
        shard = self._shards[self._next_shard]
        swept = {block: self._known(mask & keep) for block, mask in shard.items() if mask & keep}
        self._shards[self._next_shard] = swept
        self._next_shard += 1
        if self._next_shard == NUM_SHARDS:
            self._sweeping = 0


def _even_bits() -> Iterable[int]:
    bit = 1
    while True:
        yield bit
        bit <<= 2


def _each(bits: int) -> Iterable[int]:
    while bits:
        bit = bits & -bits
        yield bit
        bits ^= bit
