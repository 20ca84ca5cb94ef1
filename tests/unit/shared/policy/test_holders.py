"""Who holds a prompt's beginning, by worker and tier."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.blocks import BlockHash
from shared.policy.holders import NUM_SHARDS, Holders
from shared.request import Incarnation

BLOCKS = tuple(BlockHash(bytes([n]) * 16) for n in range(8))
W = Incarnation("w")


def test_holders_forget_after_a_gap_and_count_from_the_first_block():
    holders = Holders()
    assert holders.update(W, 0, BLOCKS[:4], ())
    assert holders.overlap(W, BLOCKS) == (4, 4)
    assert holders.update(W, 1, (), BLOCKS[1:2])
    assert holders.overlap(W, BLOCKS) == (1, 1)
    assert not holders.update(W, 3, BLOCKS[5:6], ())
    assert holders.overlap(W, BLOCKS) == (0, 0)
    assert holders.overlap(W, BLOCKS[5:6]) == (1, 1)
    holders.keep_only(())
    assert holders.overlap(W, BLOCKS[5:6]) == (0, 0)


def test_what_is_on_the_gpu_and_what_is_held_at_all():
    holders = Holders()
    holders.update(W, 0, BLOCKS[:2], (), host_stored=BLOCKS[1:5])
    assert holders.overlap(W, BLOCKS) == (2, 5)
    holders.update(W, 1, BLOCKS[3:4], BLOCKS[:1], host_stored=BLOCKS[:1])
    assert holders.overlap(W, BLOCKS) == (0, 5)
    holders.update(W, 2, (), (), host_evicted=BLOCKS[2:3])
    assert holders.overlap(W, BLOCKS) == (0, 2)


def test_a_full_list_takes_the_place_of_all_that_was_known():
    holders = Holders()
    holders.update(W, 0, BLOCKS[:4], ())
    assert holders.update(W, 7, BLOCKS[:1], (), is_full=True)
    assert holders.update(W, 8, BLOCKS[1:2], ()), "and others follow it"
    assert holders.overlap(W, BLOCKS) == (2, 2)


def test_matches_tells_of_all_who_have_the_first_block():
    holders = Holders()
    for name, count in (("a", 2), ("b", 5), ("c", 8)):
        holders.update(Incarnation(name), 0, BLOCKS[:count], ())
    holders.update(Incarnation("d"), 0, BLOCKS[1:], ())
    assert holders.matches(BLOCKS) == {"a": (2, 2), "b": (5, 5), "c": (8, 8)}
    assert holders.matches(()) == {}


class Announcements(RuleBasedStateMachine):
    """Against two sets a worker."""

    names = st.sampled_from("abc")
    some = st.lists(st.sampled_from(BLOCKS), max_size=8)

    def __init__(self):
        super().__init__()
        self.holders = Holders()
        self.held = {}
        self.sequences = {}

    @rule(name=names, stored=some, evicted=some, host_stored=some, host_evicted=some, full=st.booleans())
    def announce(self, name, stored, evicted, host_stored, host_evicted, full):
        gpu, host = (set(), set()) if full else self.held.get(name, (set(), set()))
        self.held[name] = ((gpu | set(stored)) - set(evicted), (host | set(host_stored)) - set(host_evicted))
        sequence = self.sequences.get(name, 0)
        self.sequences[name] = sequence + 1
        assert self.holders.update(name, sequence, stored, evicted, host_stored, host_evicted, is_full=full)

    @rule(name=names)
    def lose_one(self, name):
        sequence = self.sequences.get(name, 0) + 1
        self.sequences[name] = sequence + 1
        self.held[name] = (set(), set())
        assert not self.holders.update(name, sequence, (), ())

    @rule(name=names)
    def leave(self, name):
        self.holders.keep_only(set("abc") - {name})
        self.held.pop(name, None)
        self.sequences.pop(name, None)

    @rule()
    def sweep(self):
        """As many updates as clean the whole table."""
        for _ in range(NUM_SHARDS + 1):
            self.announce("a", [], [], [], [], False)

    @invariant()
    def matches_are_the_longest_runs(self):
        def run(blocks):
            return next((index for index, block in enumerate(BLOCKS) if block not in blocks), len(BLOCKS))

        expected = {name: (run(gpu), run(gpu | host)) for name, (gpu, host) in self.held.items()}
        matches = self.holders.matches(BLOCKS)
        assert matches == {name: runs for name, runs in expected.items() if runs[1]}
        for name in "abc":
            assert self.holders.overlap(name, BLOCKS) == expected.get(name, (0, 0))


Announcements.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestAnnouncements = Announcements.TestCase
