"""Which blocks one engine has, which are on their way to it, and which pages are set aside or kept for that.

    nowhere ──expect──> a sequence computes it ──publish──> here ──evicted──> in host memory, or nowhere
       │                                                    ↑  ↑                   │
       └──fill──> a peer sends it ──filled──────────────────┘  └── filled <──restore
    here ──lend──> here, and kept for a peer ──give_back──> here

- A block is on its way while a sequence computes it, or while a fill brings it from elsewhere: from a peer, or from
  host memory. Whoever needs it waits for that.
- A fill has pages of its own from its start, found as any others once they are written; who waits for them has none,
  so that a fill that fails leaves nothing behind, and what it brought serves every sequence alike. It takes no more
  pages than the caller can spare, and none that nobody gives back: it must end by itself.
- What comes from host memory ends with its copies (`advance`).
"""

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Names
from dataclasses import dataclass, field
from itertools import takewhile

from shared.blocks import PAGE_TOKENS, BlockHash, BlockKey, name_of, pages_for
from shared.engine.port import BlockChanges, EngineLimits, Fill
from shared.engine.sequence import Sequence
from shared.kv.block_pool import BlockPool
from shared.kv.host_slots import HostSlots
from shared.kv.host_tier import HostPages, HostTier, Restore
from shared.kv.loan import Loan

SHARE_FREE_OF_LOSS = 1 / 8
"""Of the pages, how many are kept free of loss where there is host memory: room for a long prompt that comes at once.
More would have copies of more blocks that are not going yet, and have room for fewer that are gone."""


@dataclass(slots=True)
class _Bringing:
    """A fill from host memory, and whom to tell when it is over."""

    fill: Fill
    told: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])


class BlockBook:
    """The pages of one engine, by what stands in them or will.

    Attributes:
        pool: owns the pages.
        tier: what goes from the pages; None: it is gone.
        coming: blocks on their way, and who brings them.
        num_host_hits: tokens whose KV was brought back from host memory.
    """

    def __init__(self, limits: EngineLimits, host: HostPages | None) -> None:
        self.tier: HostTier | None = None
        if host is None:
            self.pool = BlockPool(limits.num_pages)
        else:
            slots = HostSlots(host.num_slots)
            self.pool = BlockPool(limits.num_pages, slots)
            num_ahead = max(2 * pages_for(limits.max_batch_tokens), int(limits.num_pages * SHARE_FREE_OF_LOSS))
            most = max(1, host.num_slots // 2)  # with more it would hold little else than what is not gone
            self.tier = HostTier(self.pool, slots, host, num_ahead=min(num_ahead, most))
        self.coming: dict[BlockKey, Sequence | Fill] = {}
        self.num_host_hits = 0
        self._fills: set[Fill] = set()
        self._restores: dict[Restore, _Bringing] = {}
        self._loans: set[Loan] = set()

    @property
    def num_restores(self) -> int:
        """Fills from host memory that are under way."""
        return len(self._restores)

    # What stands in pages.

    def acquire(self, found: tuple[int, ...], num_new: int) -> tuple[int, ...]:
        """`BlockPool.acquire`, for which there must be pages free."""
        if self.tier is not None and self.pool.cost(found, num_new) > self.pool.num_free_at_once:
            self.tier.settle()
        return self.pool.acquire(found, num_new)

    def publish(self, page: int, key: BlockKey, sequence: Sequence) -> None:
        """`BlockPool.publish` of a page of `sequence`."""
        self.pool.publish(page, key)
        if self.coming.get(key) is sequence:
            del self.coming[key]

    def distrust(self, pages: Iterable[int]) -> None:
        """Nobody shall find what these pages in use hold, nor a copy of it."""
        withdrawn = self.pool.withdraw(pages)
        if self.tier is not None:
            self.tier.forget(withdrawn)

    def used(self, keys: Iterable[BlockKey]) -> None:
        """These blocks are in use."""
        if self.tier is not None:
            self.tier.used(keys)

    # What comes.

    def expect(self, keys: Iterable[BlockKey], bringer: Sequence | Fill) -> None:
        """Those of these blocks that nobody else brings are on their way."""
        for key in keys:
            self.coming.setdefault(key, bringer)

    def expect_no_more(self, keys: Iterable[BlockKey], bringer: Sequence | Fill) -> None:
        """What it has not brought of these blocks `bringer` does not bring."""
        for key in keys:
            if self.coming.get(key) is bringer:
                del self.coming[key]

    def fill(self, keys: Names[BlockKey], num_spare: int) -> Fill | None:
        """Pages for those of a prompt's first blocks, `keys`, that are neither here nor on their way; None if that
        takes more than `num_spare`.

        The pages are the caller's until `filled`, and so is all of the run behind the first block that lacks.
        """
        found = self.pool.find(keys)
        copied = self.copied(keys, len(found), len(keys))
        cost = self.pool.cost(found, len(copied))
        if copied and cost <= num_spare:
            self.restore(copied, found)  # from now on those found cost nothing
            num_spare -= cost
        lacking = tuple(keys[len(found) + self.num_coming(keys[len(found) :]) :])
        if not lacking:
            return Fill((), ())
        if self.pool.cost(found, len(lacking)) > num_spare:
            return None
        return self._set_aside(lacking, found)

    def filled(self, fill: Fill, num_arrived: int) -> None:
        """See `Engine.filled`."""
        if not fill.keys:
            return
        self._fills.remove(fill)
        for page, key in zip(fill.pages[:num_arrived], fill.keys, strict=False):
            self.pool.publish(page, key)
        self.expect_no_more(fill.keys, fill)
        self.pool.release(fill.found + fill.pages)

    def num_coming(self, keys: Iterable[BlockKey]) -> int:
        """Length of the longest run of blocks on their way from the first of `keys` on."""
        return sum(1 for _ in takewhile(self.coming.__contains__, keys))

    def copied(self, keys: Names[BlockKey], first: int, end: int) -> tuple[BlockKey, ...]:
        """The longest run of blocks from `keys[first]` on, before `keys[end]`, that are in host memory and that nobody
        brings."""
        if self.tier is None:
            return ()
        wanted = keys[first:end]
        return tuple(takewhile(lambda key: key not in self.coming, wanted[: self.tier.num_found(wanted)]))

    def restore(
        self, keys: tuple[BlockKey, ...], found: tuple[int, ...], over: Callable[[], None] | None = None
    ) -> Fill:
        """Begin to bring blocks from host memory that follow those found; there must be pages free."""
        if self.tier is None:
            raise AssertionError("blocks are brought from nowhere")
        fill = self._set_aside(keys, found)
        bringing = self._restores[self.tier.restore(keys, fill.pages)] = _Bringing(fill)
        if over is not None:
            bringing.told.append(over)
        self.num_host_hits += len(keys) * PAGE_TOKENS
        return fill

    def bring(self, names: Names[BlockHash], num_spare: int, over: Callable[[], None]) -> None:
        """See `Engine.bring`; no more than `num_spare` pages are taken."""
        found = self.pool.find_named(names)
        copied = () if self.tier is None else self.tier.find_named(names[len(found) :])
        if not copied:
            over()
        elif copied[0] in self.coming:
            self._tell_when_brought(copied[0], over)
        elif self.pool.cost(found, len(copied)) > num_spare:
            over()
        else:
            self.restore(copied, found, over)

    def advance(self, num_computed: int = 0) -> None:
        """Take note of what came from host memory, and go on with what goes there beside a step that computes so many
        pages."""
        if self.tier is None:
            return
        for restore in self.tier.advance(num_computed):
            bringing = self._restores.pop(restore)
            self.filled(bringing.fill, len(bringing.fill.keys))
            for over in bringing.told:
                over()

    # What is lent, and told.

    def lend(self, names: Names[BlockHash]) -> Loan:
        """See `Engine.lend`."""
        pages = self.acquire(self.pool.find_named(names), 0)
        loan = Loan(pages, tuple(map(self.pool.key_of, pages)))
        self._loans.add(loan)
        return loan

    def give_back(self, loan: Loan) -> None:
        """See `Engine.give_back`."""
        self._loans.remove(loan)
        self.pool.release(loan.pages)

    def take_changes(self) -> BlockChanges:
        """See `Engine.take_block_changes`."""
        self.advance()
        stored, evicted = self.pool.take_changes()
        host_stored, host_evicted = ((), ()) if self.tier is None else self.tier.take_changes()
        return BlockChanges(*(tuple(map(name_of, keys)) for keys in (stored, evicted, host_stored, host_evicted)))

    def take_all(self) -> BlockChanges:
        """See `Engine.take_all_blocks`."""
        self.take_changes()
        host_stored = () if self.tier is None else self.tier.hashes
        return BlockChanges(stored=tuple(map(name_of, self.pool.hashes)), host_stored=tuple(map(name_of, host_stored)))

    def check(self, holders: Iterable[Names[int]], computing: Collection[Sequence]) -> None:
        """Raise AssertionError unless the pages add up with those of sequences (one entry each), and what comes comes
        from somebody: `computing` are the sequences that may compute."""
        own = [fill.found + fill.pages for fill in self._fills] + [loan.pages for loan in self._loans]
        self.pool.check([*holders, *own])
        if self.tier is not None:
            self.tier.check()
            assert self.tier.is_restoring == bool(self._restores), "blocks are awaited from the host that do not come"
        assert all(each.fill in self._fills for each in self._restores.values()), "a fill from the host is over early"
        for bringer in self.coming.values():
            is_alive = bringer in self._fills if isinstance(bringer, Fill) else bringer in computing
            assert is_alive, "a block is awaited from nobody"

    def _set_aside(self, keys: tuple[BlockKey, ...], found: tuple[int, ...]) -> Fill:
        """A fill of pages for blocks that follow those found; there must be pages free."""
        fill = Fill(keys, self.acquire(found, len(keys))[len(found) :], found)
        self._fills.add(fill)
        self.expect(keys, fill)
        return fill

    def _tell_when_brought(self, key: BlockKey, over: Callable[[], None]) -> None:
        """When the fill that brings a block from host memory is over; at once if another fill or a sequence does."""
        fill = self.coming[key]
        for bringing in self._restores.values():
            if bringing.fill is fill:
                bringing.told.append(over)
                return
        over()
