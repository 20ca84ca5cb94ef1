from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.blocks import BlockHash
from shared.kv.block_pool import BlockPool


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def published(pool: BlockPool, *numbers: int) -> tuple[int, ...]:
    """Pages in use that hold the blocks of these names."""
    pages = pool.acquire((), len(numbers))
    for page, number in zip(pages, numbers, strict=True):
        pool.publish(page, name(number))
    return pages


def test_a_page_without_hash_is_free_at_the_last_release():
    pool = BlockPool(3)
    pages = pool.acquire((), 2)
    assert pool.num_free == 1
    pool.check([pages])
    pool.release(pages)
    assert pool.num_free == 3
    pool.check([])


def test_a_published_page_is_found_while_held_and_after():
    pool = BlockPool(3)
    pages = published(pool, 1, 2)
    assert pool.find([name(1), name(2), name(3)]) == pages
    pool.release(pages)
    assert pool.find([name(1), name(2)]) == pages
    assert pool.num_free == 3
    pool.check([])


def test_find_stops_at_the_first_gap():
    pool = BlockPool(3)
    pages = published(pool, 1, 3)
    assert pool.find([name(1), name(2), name(3)]) == pages[:1]
    assert pool.find([name(2), name(3)]) == ()


def test_found_pages_are_shared_and_survive_one_holder():
    pool = BlockPool(2)
    first = published(pool, 1)
    second = pool.acquire(pool.find([name(1)]), 1)
    assert second[0] == first[0]
    pool.check([first, second])
    pool.release(first)
    assert pool.num_free == 0
    pool.check([second])


def test_found_pages_are_pinned_before_anything_is_taken():
    pool = BlockPool(2)
    pool.release(published(pool, 1, 2))
    # Page of 2 would be evicted first; being found it must not be.
    pages = pool.acquire(pool.find([name(2)]), 1)
    assert len(set(pages)) == 2
    assert pool.find([name(2)]) == pages[:1]
    assert pool.find([name(1)]) == ()
    pool.check([pages])


def test_the_least_recently_used_goes_first_and_the_last_block_before_those_it_needs():
    pool = BlockPool(4)
    pool.release(published(pool, 1, 2))
    pool.release(published(pool, 3, 4))
    pool.release(pool.acquire(pool.find([name(1), name(2)]), 0))  # now the most recently used
    gone: list[int] = []
    for _ in range(4):
        pool.acquire((), 1)
        gone += [number for number in (1, 2, 3, 4) if not pool.find([name(number)]) and number not in gone]
    assert gone == [4, 3, 2, 1]


def test_cost_counts_pages_that_are_found_but_not_in_use():
    pool = BlockPool(4)
    held = published(pool, 1)
    pool.release(published(pool, 2))
    assert pool.cost(pool.find([name(1)]), 2) == 2
    assert pool.cost(pool.find([name(2)]), 2) == 3
    pool.check([held])


def test_acquire_changes_nothing_when_there_are_too_few():
    pool = BlockPool(2)
    pool.release(published(pool, 1))
    with pytest.raises(ValueError, match="2 can be taken"):
        pool.acquire(pool.find([name(1)]), 2)
    assert pool.num_free == 2
    pool.check([])


def test_the_second_page_of_a_block_stays_private():
    pool = BlockPool(2)
    first, second = published(pool, 1), published(pool, 1)
    assert pool.find([name(1)]) == first
    pool.release(first)
    pool.release(second)
    assert pool.find([name(1)]) == first
    pool.check([])


def test_withdrawn_pages_are_found_no_more_and_free_at_the_end():
    pool = BlockPool(2)
    pages = published(pool, 1)
    pool.withdraw(pages)
    assert pool.find([name(1)]) == ()
    pool.release(pages)
    assert pool.take_changes() == ((), ())
    pool.check([])


def test_changes_are_net():
    pool = BlockPool(1)
    pool.release(published(pool, 1))
    assert pool.take_changes() == ((name(1),), ())
    pool.release(published(pool, 2))
    pool.release(published(pool, 3))
    assert pool.take_changes() == ((name(3),), (name(1),))
    pool.release(published(pool, 4))
    pool.release(published(pool, 3))
    assert pool.take_changes() == ((), ())


@pytest.mark.parametrize("misuse", ["release", "publish", "withdraw"])
def test_only_held_pages_are_released_published_or_withdrawn(misuse):
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.publish(0, name(1)) if misuse == "publish" else getattr(pool, misuse)((0,))


def test_one_page_holds_one_block():
    pool = BlockPool(1)
    (page,) = published(pool, 1)
    with pytest.raises(ValueError, match="published twice"):
        pool.publish(page, name(2))


def test_check_notices_a_lost_page():
    pool = BlockPool(2)
    pool.acquire((), 1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check([])


class PoolMachine(RuleBasedStateMachine):
    """Random holders beside a model: a multiset of held pages, a map of findable hashes, what a listener knows."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.holders: list[tuple[int, ...]] = []
        self.contents: dict[int, int] = {}  # block that a page in use or evictable holds
        self.listener: set[BlockHash] = set()

    @rule(chain=st.lists(st.integers(0, 7), max_size=4, unique=True), num_new=st.integers(0, 4))
    def acquire(self, chain, num_new):
        found = self.pool.find(name(number) for number in chain)
        assert [self.contents[page] for page in found] == chain[: len(found)]
        before = self.pool.num_free
        cost = self.pool.cost(found, num_new)
        if cost > before:
            with pytest.raises(ValueError):
                self.pool.acquire(found, num_new)
            return
        pages = self.pool.acquire(found, num_new)
        assert self.pool.num_free == before - cost
        in_use = {page for holder in self.holders for page in holder}
        assert len(set(pages)) == len(pages)
        assert not in_use & set(pages[len(found) :])
        for page in pages[len(found) :]:
            self.contents.pop(page, None)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), block=st.integers(0, 7))
    def publish(self, data, block):
        pages = data.draw(st.sampled_from(self.holders))
        private = [page for page in pages if page not in self.contents]
        if not private:
            return
        known = self.pool.find([name(block)])
        self.pool.publish(private[0], name(block))
        if known:
            assert self.pool.find([name(block)]) == known
        else:
            assert self.pool.find([name(block)]) == (private[0],)
            self.contents[private[0]] = block

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def withdraw(self, data):
        pages = data.draw(st.sampled_from(self.holders))
        self.pool.withdraw(pages)
        for page in pages:
            self.contents.pop(page, None)

    @rule()
    def listen(self):
        stored, evicted = self.pool.take_changes()
        assert not self.listener & set(stored)
        assert set(evicted) <= self.listener
        self.listener = (self.listener | set(stored)) - set(evicted)
        assert self.listener == {name(number) for number in range(8) if self.pool.find([name(number)])}

    @invariant()
    def adds_up(self):
        self.pool.check(self.holders)
        held = Counter(page for holder in self.holders for page in holder)
        assert self.pool.num_free == self.pool.num_pages - len(held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
