from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.blocks import BlockHash, BlockKey
from shared.kv import host_tier
from shared.kv.block_pool import BlockPool
from shared.kv.host_slots import HostSlots
from shared.kv.host_tier import IDLE_PAGES, HostTier, Restore
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from tests.late_host_pages import LateHostPages

LAYOUT = KvLayout("model", num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")


def key(number: int) -> BlockKey:
    return BlockKey(BlockHash(number.to_bytes(32, "little")))


class Tiers:
    """A pool, its second tier, and what they say they hold; a page that holds block n is full of n."""

    def __init__(self, num_pages: int, num_slots: int, num_ahead: int) -> None:
        self.cache = PagedCache(LAYOUT, num_pages, torch.device("cpu"))
        self.slots = HostSlots(num_slots)
        self.pool = BlockPool(num_pages, self.slots)
        self.host = LateHostPages(self.cache, num_slots)
        self.tier = HostTier(self.pool, self.slots, self.host, num_ahead=num_ahead)
        self.holders: list[tuple[int, ...]] = []

    def hold(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        self.holders.append(pages)
        return pages

    def acquire(self, found: tuple[int, ...], num_new: int) -> tuple[int, ...]:
        pages = self.hold(self.pool.acquire(found, num_new))
        self.cache.pages[list(pages[len(found) :])] = -1  # whoever gets a page writes to it
        return pages

    def store(self, *numbers: int) -> None:
        """Compute blocks, and let go of them."""
        pages = self.acquire((), len(numbers))
        for page, number in zip(pages, numbers, strict=True):
            self.cache.pages[page] = number
            self.pool.publish(page, key(number))
        self.release(pages)

    def release(self, pages: tuple[int, ...]) -> None:
        self.holders.remove(pages)
        self.pool.release(pages)

    def on_device(self) -> set[int]:
        return {number for number in range(50) if self.pool.find([key(number)])}

    def on_host(self) -> set[int]:
        return {number for number in range(50) if key(number) in self.slots}

    def end_all(self) -> list[Restore]:
        """Until no copy is on its way."""
        done: list[Restore] = []
        while any(self.host.lanes.values()):
            self.host.end(is_down=True)
            self.host.end(is_down=False)
            done += self.tier.advance()
            self.check()
        return done

    def check(self) -> None:
        self.pool.check(self.holders)
        self.tier.check()
        for number in self.on_device():
            (page,) = self.pool.find([key(number)])
            assert (self.cache.pages[page] == number).all(), f"the page of block {number} holds another"
        for number in self.on_host():
            (slot,) = self.slots.find([key(number)])
            copy = self.host.memory[slot].view(torch.float32)
            assert (copy == number).all(), f"the copy of block {number} is of another"


def test_what_is_next_to_go_is_saved_and_nothing_else():
    tiers = Tiers(num_pages=6, num_slots=6, num_ahead=3)
    tiers.store(1, 2)
    tiers.store(3)
    assert tiers.tier.advance() == []
    assert not tiers.host.lanes[True], "three pages are free"
    tiers.store(4, 5, 6)
    tiers.tier.advance()
    tiers.end_all()
    assert tiers.on_host() == {2, 1, 3}, "the least recently used, of a sequence the last block first"
    assert tiers.tier.num_saved_bytes == 3 * LAYOUT.page_bytes


def test_saved_blocks_go_from_the_device_without_loss_and_come_back():
    tiers = Tiers(num_pages=4, num_slots=8, num_ahead=2)
    tiers.store(1, 2, 3, 4)
    tiers.tier.advance()
    tiers.end_all()
    tiers.store(5, 6)
    assert tiers.on_device() == {1, 2, 5, 6}
    assert tiers.pool.num_lost == 0
    assert tiers.tier.num_found([key(3), key(4), key(5)]) == 2
    tiers.tier.advance()
    tiers.end_all()
    pages = tiers.acquire((), 2)
    restore = tiers.tier.restore([key(3), key(4)], pages)
    assert tiers.tier.is_restoring
    assert tiers.end_all() == [restore]
    assert not tiers.tier.is_restoring
    for page, number in zip(pages, (3, 4), strict=True):
        tiers.pool.publish(page, key(number))
    tiers.check()
    assert tiers.tier.num_restored_bytes == 2 * LAYOUT.page_bytes


def test_what_goes_before_its_turn_is_counted_as_lost():
    tiers = Tiers(num_pages=2, num_slots=2, num_ahead=1)
    tiers.store(1, 2)
    tiers.store(3, 4)
    assert tiers.pool.num_lost == 2


def test_a_page_that_is_being_saved_is_not_given_away():
    tiers = Tiers(num_pages=2, num_slots=2, num_ahead=1)
    tiers.store(1, 2)
    tiers.tier.advance()
    assert (tiers.pool.num_free, tiers.pool.num_free_at_once) == (2, 1)
    with pytest.raises(ValueError, match="1 can be taken"):
        tiers.pool.acquire((), 2)
    tiers.tier.settle()
    assert tiers.pool.num_free_at_once == 2
    assert tiers.on_host() == {2}
    tiers.acquire((), 2)
    tiers.check()


def test_a_page_that_is_being_saved_is_found_and_its_copy_is_spare():
    tiers = Tiers(num_pages=2, num_slots=2, num_ahead=1)
    tiers.store(1, 2)
    tiers.tier.advance()
    found = tiers.hold(tiers.pool.acquire(tiers.pool.find([key(1), key(2)]), 0))
    tiers.end_all()
    tiers.release(found)
    tiers.store(3, 4)  # the copy of 2 is not lost with its page
    assert tiers.pool.num_lost == 1
    assert tiers.on_host() == {2}
    tiers.check()


def test_a_block_that_was_restored_is_not_copied_again():
    tiers = Tiers(num_pages=2, num_slots=4, num_ahead=2)
    tiers.store(1, 2)
    for _ in range(3):
        tiers.tier.advance()
        tiers.end_all()
        found = tiers.hold(tiers.pool.acquire(tiers.pool.find([key(1), key(2)]), 0))
        tiers.tier.used([key(1), key(2)])
        tiers.release(found)
    assert tiers.tier.num_saved_bytes == 2 * LAYOUT.page_bytes


def test_no_more_is_saved_at_once_than_the_step_beside_it_allows():
    tiers = Tiers(num_pages=40, num_slots=40, num_ahead=40)
    tiers.store(*range(40))
    tiers.tier.advance()
    tiers.tier.advance()
    assert [len(copy.froms) for copy in tiers.host.lanes[True]] == [IDLE_PAGES]
    tiers.tier.advance(num_computed=5)
    assert [len(copy.froms) for copy in tiers.host.lanes[True]] == [IDLE_PAGES, 10]
    tiers.end_all()
    assert len(tiers.on_host()) == 40


def test_restores_take_turns_within_their_bound(monkeypatch):
    monkeypatch.setattr(host_tier, "MAX_RESTORING_BYTES", 3 * LAYOUT.page_bytes)
    tiers = Tiers(num_pages=12, num_slots=12, num_ahead=12)
    tiers.store(1, 2, 3, 4, 5, 6)
    tiers.tier.advance()
    tiers.end_all()
    first = tiers.tier.restore([key(1), key(2)], tiers.acquire((), 2))
    second = tiers.tier.restore([key(3), key(4), key(5), key(6)], tiers.acquire((), 4))
    assert [len(copy.froms) for copy in tiers.host.lanes[False]] == [2, 1]
    tiers.tier.wait()
    assert tiers.tier.advance() == [first]
    assert (second.num_started, second.num_done) == (3, 0)
    tiers.tier.wait()
    assert tiers.tier.advance() == []
    assert (second.num_started, second.num_done) == (4, 1)
    assert tiers.end_all() == [second]
    tiers.check()


def test_restores_name_blocks_that_have_copies():
    tiers = Tiers(num_pages=2, num_slots=2, num_ahead=2)
    with pytest.raises(ValueError, match="of 1 blocks 0 have a copy"):
        tiers.tier.restore([key(1)], tiers.acquire((), 1))
    with pytest.raises(ValueError, match="of 0 blocks"):
        tiers.tier.restore([], ())


def test_what_is_withdrawn_has_no_copy_whether_saved_or_being_saved():
    tiers = Tiers(num_pages=4, num_slots=4, num_ahead=2)
    tiers.store(1, 2, 3, 4)
    tiers.tier.advance()
    tiers.end_all()
    tiers.pool.release(tiers.pool.acquire((), 2))  # 3 and 4 are on the host alone
    tiers.store(5, 6)
    tiers.tier.advance()
    found = tiers.hold(tiers.pool.acquire(tiers.pool.find([key(1), key(2)]), 0))
    tiers.tier.forget(tiers.pool.withdraw(found))
    tiers.tier.forget([key(3)])
    tiers.release(found)
    tiers.acquire((), 2)
    tiers.end_all()
    assert tiers.on_host() == {4, 5, 6}


def test_slots_below_what_is_kept_free_of_loss_do_not_churn():
    tiers = Tiers(num_pages=8, num_slots=2, num_ahead=8)
    tiers.store(*range(8))
    for _ in range(5):
        tiers.tier.advance()
        tiers.end_all()
    assert tiers.tier.num_saved_bytes == 2 * LAYOUT.page_bytes
    assert tiers.on_host() == {6, 7}


def test_a_page_that_is_found_and_let_go_while_it_is_being_saved_is_still_not_given_away():
    tiers = Tiers(num_pages=2, num_slots=2, num_ahead=1)
    tiers.store(1, 2)
    tiers.tier.advance()
    tiers.release(tiers.hold(tiers.pool.acquire(tiers.pool.find([key(1), key(2)]), 0)))
    assert (tiers.pool.num_free, tiers.pool.num_free_at_once) == (2, 1)
    tiers.check()


def test_a_page_whose_copy_had_to_go_is_saved_no_more():
    tiers = Tiers(num_pages=3, num_slots=2, num_ahead=2)
    tiers.store(1, 2, 3)
    tiers.tier.advance()
    tiers.end_all()
    assert tiers.on_host() == {2, 3}
    tiers.hold(tiers.pool.acquire(tiers.pool.find([key(1), key(2)])[1:], 0))
    tiers.tier.advance()  # another block takes the place of the oldest copy, that of 3
    tiers.check()
    assert tiers.on_host() == {2}
    tiers.end_all()
    tiers.acquire((), 2)
    assert tiers.on_host() == {1, 3}
    assert tiers.pool.num_lost == 0


class TierMachine(RuleBasedStateMachine):
    """Random work on few pages and slots; every page and every copy that anybody could find is looked at each time."""

    NUM_BLOCKS = 9

    def __init__(self) -> None:
        super().__init__()
        self.tiers = Tiers(num_pages=6, num_slots=4, num_ahead=3)
        self.restoring: dict[Restore, tuple[tuple[int, ...], list[int]]] = {}
        self.listener: set[BlockHash] = set()

    @property
    def idle(self) -> list[tuple[int, ...]]:
        busy = [pages for pages, _ in self.restoring.values()]
        return [pages for pages in self.tiers.holders if pages not in busy]

    @rule(first=st.integers(0, NUM_BLOCKS - 1), length=st.integers(1, 4))
    def compute(self, first, length):
        """A sequence finds what there is of its blocks, and computes and publishes the rest."""
        numbers = [(first + step) % self.NUM_BLOCKS for step in range(length)]
        pool = self.tiers.pool
        found = pool.find(key(number) for number in numbers)
        if pool.cost(found, length - len(found)) > pool.num_free:
            return
        if pool.cost(found, length - len(found)) > pool.num_free_at_once:
            self.tiers.tier.settle()
        pages = self.tiers.acquire(found, length - len(found))
        self.tiers.tier.used([key(number) for number in numbers[: len(found)]])
        for page, number in zip(pages[len(found) :], numbers[len(found) :], strict=True):
            self.tiers.cache.pages[page] = number
            pool.publish(page, key(number))

    @rule(first=st.integers(0, NUM_BLOCKS - 1), length=st.integers(1, 4))
    def restore(self, first, length):
        numbers = [(first + step) % self.NUM_BLOCKS for step in range(length)]
        numbers = numbers[: self.tiers.tier.num_found([key(number) for number in numbers])]
        if not numbers or len(numbers) > self.tiers.pool.num_free_at_once:
            return
        pages = self.tiers.acquire((), len(numbers))
        self.restoring[self.tiers.tier.restore([key(number) for number in numbers], pages)] = pages, numbers

    @precondition(lambda self: self.idle)
    @rule(data=st.data(), is_withdrawn=st.booleans())
    def release(self, data, is_withdrawn):
        pages = data.draw(st.sampled_from(self.idle))
        if is_withdrawn:
            self.tiers.tier.forget(self.tiers.pool.withdraw(pages))
            self.tiers.cache.pages[list(pages)] = -2
        self.tiers.release(pages)

    @rule(is_down=st.booleans())
    def end_copy(self, is_down):
        self.tiers.host.end(is_down=is_down)

    @rule(num_computed=st.integers(0, 2))
    def advance(self, num_computed):
        for restore in self.tiers.tier.advance(num_computed):
            pages, numbers = self.restoring.pop(restore)
            for page, number in zip(pages, numbers, strict=True):
                assert (self.tiers.cache.pages[page] == number).all()
                self.tiers.pool.publish(page, key(number))

    @precondition(lambda self: self.restoring)
    @rule()
    def wait(self):
        self.tiers.tier.wait()

    @rule()
    def listen(self):
        stored, evicted = self.tiers.slots.take_changes()
        assert not self.listener & set(stored)
        assert set(evicted) <= self.listener
        self.listener = (self.listener | set(stored)) - set(evicted)
        assert self.listener == {key(number) for number in self.tiers.on_host()}

    @invariant()
    def adds_up(self):
        self.tiers.check()
        assert self.tiers.tier.is_restoring == bool(self.restoring)
        assert self.tiers.tier.num_used <= self.tiers.slots.num_slots
        held = Counter(page for holder in self.tiers.holders for page in holder)
        assert self.tiers.pool.num_free == self.tiers.pool.num_pages - len(held)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
