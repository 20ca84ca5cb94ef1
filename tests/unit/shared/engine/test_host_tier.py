"""Blocks that went to host memory, as the scheduler and the engine see them."""

from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from shared.blocks import PAGE_TOKENS, key_chain, name_of, pages_for, root_hash, token_ids
from shared.engine.fake import fake_answer, fake_engine, fake_model
from shared.engine.port import EngineLimits
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import SequenceState
from shared.kv.paged_cache import PagedCache
from tests.engine_driver import Driver, greedy, request
from tests.late_host_pages import LateHostPages
from tests.unit.shared.engine.test_scheduler import FAMILIES, AheadMachine, prompt, run, spans, take

POISON = 13


class Tiered:
    """A scheduler with host memory, whose copies end when the test says so."""

    def __init__(self, num_pages=8, num_host_pages=16, max_running=4, max_batch_tokens=512):
        self.cache = PagedCache(fake_model().layout, num_pages, torch.device("cpu"))
        self.host = LateHostPages(self.cache, num_host_pages)
        limits = EngineLimits(4096, num_pages, max_running, max_batch_tokens, num_host_pages)
        self.engine = Scheduler(limits, "model", self.host)

    def serve(self, key, length, first=0):
        """A request of one token, on an idle engine; what it leaves is saved as far as the tier does."""
        self.engine.add(request(key, prompt(length, first), greedy(1)))
        while self.engine.has_work():
            self.advance()
            run(self.engine)
        self.advance()

    def advance(self, num_computed=0):
        """All copies that are on their way end."""
        for is_down in (True, False):
            while self.host.lanes[is_down]:
                self.host.end(is_down=is_down)
        self.engine.blocks.advance(num_computed)
        self.engine.check()


def keys(length, first=0):
    return key_chain(root_hash("model", ""), prompt(length, first))


@pytest.fixture
def gone() -> Tiered:
    """Two blocks of `prompt(129)` are in host memory, one of which is on the device too."""
    tiered = Tiered(num_pages=4)
    tiered.serve("a", 129)
    for _ in range(2):
        tiered.advance()
    tiered.serve("b", 3 * PAGE_TOKENS - 1, first=1000)
    assert len(tiered.engine.blocks.pool.find(keys(129))) == 1
    assert tiered.engine.blocks.tier.num_found(keys(129)) == 2
    return tiered


def test_a_prompt_waits_for_its_blocks_and_starts_behind_them(gone):
    engine = gone.engine
    engine.add(request("again", prompt(150), greedy(1)))
    assert engine.schedule().rows == ()
    assert engine.has_work()
    assert engine.num_waiting == 1
    gone.advance()
    assert run(engine) == [("again", 128, 150)]
    assert (engine.blocks.num_host_hits, engine.num_prefix_hits) == (PAGE_TOKENS, 128)
    gone.advance()
    assert engine.blocks.pool.num_free == 4


def test_others_go_on_beside_the_copies(gone):
    gone.engine.add(request("again", prompt(129), greedy(1)))
    gone.engine.add(request("other", prompt(9, 700), greedy(1)))
    assert run(gone.engine) == [("other", 0, 9)]
    gone.advance()
    assert run(gone.engine) == [("again", 128, 129)]


def test_two_who_want_the_same_blocks_wait_for_one_copy(gone):
    gone.engine.add(request("first", prompt(129), greedy(1)))
    gone.engine.add(request("second", prompt(130), greedy(1)))
    assert run(gone.engine) == []
    assert len(gone.host.lanes[False]) == 1
    gone.advance()
    assert run(gone.engine) == [("first", 128, 129), ("second", 128, 130)]


def test_who_is_given_up_meanwhile_leaves_its_blocks_to_others(gone):
    engine = gone.engine
    engine.add(request("again", prompt(129), greedy(1)))
    run(engine)
    engine.abort("again")
    engine.check()
    gone.advance()
    assert not engine.has_work()
    assert engine.blocks.pool.num_free == 4
    assert len(engine.blocks.pool.find(keys(129))) == 2


def test_no_more_come_than_could_be_seated():
    tiered = Tiered(num_pages=8, max_running=2)
    for index in range(4):
        tiered.serve(f"a{index}", 65, first=1000 * index)
    tiered.serve("b", 8 * PAGE_TOKENS - 1, first=9000)
    assert not tiered.engine.blocks.pool.find(keys(65))
    for index in range(4):
        tiered.engine.add(request(f"again{index}", prompt(65, 1000 * index), greedy(1)))
    assert run(tiered.engine) == []
    assert [len(copy.froms) for copy in tiered.host.lanes[False]] == [1, 1]
    tiered.advance()
    assert [key for key, _, _ in run(tiered.engine)] == ["again0", "again1"]


def test_what_host_memory_has_is_not_asked_of_a_peer(gone):
    fill = gone.engine.fill(request("again", prompt(193), greedy(1)), 3)
    assert fill.keys == tuple(keys(193)[2:3])
    gone.engine.add(request("again", prompt(193), greedy(1)))
    gone.advance()
    assert run(gone.engine) == []
    gone.engine.blocks.filled(fill, 1)
    assert run(gone.engine) == [("again", 192, 193)]


def test_what_comes_from_both_needs_room_for_both(gone):
    engine = gone.engine
    loan = engine.blocks.lend([name_of(keys(193)[0])])
    engine.add(request("held", prompt(100, 700), greedy(1), hold_kv=True))
    run(engine)
    engine.blocks.give_back(loan)
    assert (len(engine.blocks.pool.find(keys(193))), engine.blocks.pool.num_free) == (1, 2)
    assert engine.fill(request("again", prompt(193), greedy(1)), 3) is None
    engine.check()
    gone.advance()
    assert len(engine.blocks.pool.find(keys(193))) == 2, "what is here comes all the same"


def test_a_peer_gets_what_host_memory_has(gone):
    names = list(map(name_of, keys(200)))
    loans = []
    gone.engine.bring(names, lambda: loans.append(gone.engine.blocks.lend(names)))
    assert not loans
    assert gone.engine.has_work()
    gone.advance()
    (loan,) = loans
    assert loan.keys == tuple(keys(129))
    gone.engine.blocks.give_back(loan)
    gone.engine.bring(names, lambda: loans.append(gone.engine.blocks.lend(names)))
    assert len(loans) == 2, "all is here: it is told at once"
    gone.engine.blocks.give_back(loans[1])
    assert gone.engine.blocks.pool.num_free == 4


@pytest.mark.parametrize("who_is_first", ["another peer", "a request"])
def test_a_peer_gets_what_is_being_brought_for_others(gone, who_is_first):
    names = list(map(name_of, keys(200)))
    loans = []
    if who_is_first == "a request":
        gone.engine.add(request("again", prompt(129), greedy(1)))
        run(gone.engine)
    else:
        gone.engine.bring(names, lambda: loans.append(gone.engine.blocks.lend(names)))
    gone.engine.bring(names, lambda: loans.append(gone.engine.blocks.lend(names)))
    assert not loans
    gone.advance()
    assert {loan.keys for loan in loans} == {tuple(keys(129))}
    assert len(gone.host.lanes[False]) == 0
    assert gone.engine.blocks.tier.num_restored_bytes == gone.cache.layout.page_bytes


def test_a_peer_does_not_wait_for_what_another_peer_is_to_send():
    tiered = Tiered(num_pages=4)
    engine = tiered.engine
    fill = engine.fill(request("a", prompt(65), greedy(1)), 1)
    engine.reserve(request("import", prompt(64), greedy(9)))
    engine.imported("import", 7, exact=True)
    engine.abort("import")
    tiered.advance()
    tiered.serve("b", 3 * PAGE_TOKENS - 1, first=1000)
    assert (engine.blocks.pool.find(keys(64)), engine.blocks.tier.num_found(keys(64))) == ((), 1)
    told = []
    engine.bring(list(map(name_of, keys(64))), lambda: told.append(True))
    assert told == [True]
    engine.blocks.filled(fill, 0)
    engine.check()


@pytest.mark.parametrize("is_first", ["peer", "host"])
def test_an_import_takes_from_host_memory_what_it_has_and_runs_when_all_is_there(gone, is_first):
    engine = gone.engine
    reservation = engine.reserve(request("import", prompt(190), greedy(9)))
    assert reservation.num_cached_pages == 2
    assert engine.num_importing == 1
    if is_first == "peer":
        engine.imported("import", 7, exact=True)
        with pytest.raises(KeyError):
            engine.imported("import", 7, exact=True)
        assert (run(engine), engine.num_importing) == ([], 1)
        gone.advance()
    else:
        gone.advance()
        engine.imported("import", 7, exact=True)
    assert run(engine) == [("import", 190, 191)]
    assert engine.num_prefix_hits == engine.blocks.num_host_hits + PAGE_TOKENS == 128
    assert len(engine.blocks.pool.find(keys(190))) == 2


def test_an_import_that_is_given_up_does_not_touch_the_next_of_its_name(gone):
    engine = gone.engine
    engine.reserve(request("import", prompt(190), greedy(9)))
    engine.imported("import", 7, exact=True)
    engine.abort("import")
    engine.check()
    assert engine.reserve(request("import", prompt(100, 700), greedy(9))) is not None
    gone.advance()
    assert run(engine) == []
    engine.imported("import", 8, exact=True)
    assert run(engine) == [("import", 100, 101)]


def test_nothing_is_brought_for_a_peer_into_pages_that_the_line_needs(gone):
    engine = gone.engine
    engine.add(request("held", prompt(190, 700), greedy(1), hold_kv=True))
    run(engine)
    engine.add(request("next", prompt(65, 800), greedy(1)))
    told = []
    engine.bring(list(map(name_of, keys(129))), lambda: told.append(True))
    assert told == [True]
    assert not gone.host.lanes[False]


def test_what_failed_is_not_found_in_host_memory_either(gone):
    engine = gone.engine
    engine.add(request("again", prompt(129), greedy(9)))
    engine.schedule()
    gone.advance()
    batch = engine.schedule()
    assert spans(batch) == [("again", 128, 129)]
    engine.fail(batch.sequences[0])
    take(engine, batch)
    assert engine.blocks.tier.num_found(keys(129)) == 0
    changes = engine.blocks.take_changes()
    assert not set(map(name_of, keys(129))) & {*changes.stored, *changes.host_stored}


def test_changes_tell_of_both_tiers():
    tiered = Tiered(num_pages=2)
    names = list(map(name_of, keys(128)))
    tiered.serve("a", 128)
    tiered.advance()
    changes = tiered.engine.blocks.take_changes()
    assert (set(changes.stored), changes.evicted) == (set(names), ())
    assert (set(changes.host_stored), changes.host_evicted) == (set(names), ())
    tiered.serve("b", 70, first=900)
    changes = tiered.engine.blocks.take_changes()
    assert (set(changes.evicted), changes.host_evicted) == (set(names), ())


def test_pages_that_are_being_saved_are_waited_for_if_there_are_no_others():
    tiered = Tiered(num_pages=2)
    engine = tiered.engine
    engine.add(request("a", prompt(128), greedy(1)))
    run(engine)
    engine.blocks.advance()
    assert (engine.blocks.pool.num_free, engine.blocks.pool.num_free_at_once) == (2, 0)
    engine.add(request("b", prompt(128, 900), greedy(1)))
    assert run(engine) == [("b", 0, 128)]
    assert engine.blocks.tier.num_found(keys(128)) == 2


def test_others_are_let_in_while_a_step_waits_for_host_memory_alone():
    engine = fake_engine(num_pages=4, num_host_pages=9, host_pages=partial(LateHostPages, max_looks=4))
    driver = Driver(engine)
    names = list(map(name_of, key_chain(root_hash(engine.model.fingerprint, ""), prompt(192))))
    for number, first in enumerate((0, 300, 600)):
        driver.serve(request(f"r{number}", prompt(193, first), greedy(1)))
    lent = []

    @contextmanager
    def others():
        lent.append(engine.lend(names))
        yield

    engine.let_in(others)
    engine.add(request("again", prompt(193), greedy(1)))
    engine.step()
    (loan,) = lent
    assert (len(loan.pages), engine.stats().num_host_hits > 0) == (0, True)
    engine.give_back(loan)
    engine.check()


def talks(num_host_pages, num_turns=3):
    """Conversations on an engine whose pages hold two of them; each turn's tokens, and the driver."""
    driver = Driver(
        fake_engine(
            num_pages=9, max_running=2, num_host_pages=num_host_pages, host_pages=partial(LateHostPages, max_looks=3)
        )
    )
    histories = [prompt(70, 100 * talk) for talk in range(4)]
    said = []
    for turn in range(num_turns):
        for talk, history in enumerate(histories):
            history.extend(prompt(20, 10 * turn + talk))
            (tokens,) = driver.serve(request(f"{talk}.{turn}", history[:], greedy(60, ignore_eos=True)))
            assert tokens == fake_answer(history, len(history), greedy(60, ignore_eos=True))
            history.extend(tokens)
            said.append(tokens)
    driver.assert_all_free()
    return said, driver


def test_tokens_are_the_same_with_host_memory_of_any_size():
    expected, without = talks(0)
    hits = [without.engine.stats().num_prefix_hits]
    for num_host_pages in (1, 3, 12, 60):
        said, driver = talks(num_host_pages)
        assert said == expected
        hits.append(driver.engine.stats().num_prefix_hits)
    assert hits == sorted(hits)
    assert hits[-1] > 2 * hits[0]


def test_without_host_memory_nothing_goes_there():
    _, driver = talks(0)
    stats = driver.engine.stats()
    assert (stats.num_host_pages, stats.num_host_hits, stats.num_saved_bytes, stats.num_restored_bytes) == (0, 0, 0, 0)
    assert stats.num_lost_blocks > 0
    assert not driver.host_blocks


def test_bytes_are_counted_both_ways():
    _, driver = talks(60)
    stats = driver.engine.stats()
    page_bytes = driver.engine.model.layout.page_bytes
    assert stats.num_host_pages == len(driver.host_blocks) > 0
    assert stats.num_saved_bytes >= stats.num_host_pages * page_bytes
    assert stats.num_restored_bytes == stats.num_host_hits // PAGE_TOKENS * page_bytes > 0


def conversations(num_requests):
    """Prompts of which most go on with an earlier one, sooner rather than later."""
    rng = Random(3)
    open_talks = []
    for _ in range(num_requests):
        talk = token_ids([])
        if open_talks and rng.random() < 0.8:
            talk = open_talks.pop(max(0, len(open_talks) - 1 - int(rng.expovariate(1 / 20))))
        talk = talk + token_ids(rng.randrange(900) for _ in range(PAGE_TOKENS * rng.randrange(1, 4)))
        if len(talk) < 10 * PAGE_TOKENS:
            open_talks.append(talk)
        yield talk


def hits_of_one_lru(prompts, num_pages):
    """Blocks found by one cache, the last block of a prompt going before its first."""
    cache = OrderedDict()
    num_hits = 0
    for ids in prompts:
        blocks = key_chain(root_hash("model", ""), ids)
        num_hits += sum(1 for _ in takewhile(cache.__contains__, blocks))
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_pages:
            cache.popitem(last=False)
    return num_hits


def test_both_tiers_together_find_almost_what_one_of_their_size_would():
    prompts = list(conversations(500))
    tiered = Tiered(num_pages=100, num_host_pages=100, max_batch_tokens=256)
    engine = tiered.engine
    for number, ids in enumerate(prompts):
        engine.add(request(str(number), ids + token_ids([5]), greedy(1)))
        while engine.has_work():
            batch = engine.schedule()
            tiered.advance(pages_for(batch.num_tokens))
            if batch.rows:
                take(engine, batch)
    found = engine.num_prefix_hits // PAGE_TOKENS
    assert found > 1.3 * hits_of_one_lru(prompts, 100)
    assert found > 0.95 * hits_of_one_lru(prompts, 200)


def test_what_a_failed_request_wrote_is_never_restored():
    make = partial(LateHostPages, max_looks=2)
    driver = Driver(fake_engine(num_pages=4, num_host_pages=9, poison_token_id=POISON, host_pages=make))
    bad = prompt(128, 400)
    bad[5] = POISON
    driver.serve(request("bad", bad, greedy(1)))
    for index in range(3):
        driver.serve(request(f"r{index}", prompt(128, 500 + 100 * index), greedy(1)))
    driver.serve(request("again", bad, greedy(1)))
    assert driver.num_cached_tokens("again") == 0


def test_a_page_that_arrived_rounded_never_goes_to_host_memory():
    driver = Driver(fake_engine(num_pages=4, num_host_pages=9))
    engine = driver.engine
    engine.reserve(request("a", prompt(128), greedy(9)))
    engine.imported("a", 7, exact=False)
    engine.cache.pages.zero_()
    engine.abort("a")
    for index in range(3):
        driver.serve(request(f"r{index}", prompt(128, 500 + 100 * index), greedy(1)))
    assert not driver.host_blocks & set(map(name_of, key_chain(root_hash(engine.model.fingerprint, ""), prompt(128))))


EMPTY, ROUNDED, UNFINISHED, SPOILT = -1, -2, -3, -4


class Contents:
    """What stands in the pages of a scheduler that has no model: a page that holds a block is full of its number.

    Whoever gets a page writes to it at once; a batch reads and writes when it is collected; copies between the tiers
    are done when they are said to have ended. So who reads too early, or writes too soon, is found out.
    """

    def __init__(self, tiered: Tiered) -> None:
        self.engine, self.host = tiered.engine, tiered.host
        self._pages = tiered.cache.pages.view(tiered.cache.num_pages, -1)
        acquire = self.engine.blocks.pool.acquire

        def acquire_and_write(found, num_new):
            pages = acquire(found, num_new)
            self.write(pages[len(found) :], EMPTY)
            return pages

        self.engine.blocks.pool.acquire = acquire_and_write
        fail, self.failed = self.engine.fail, set()

        def fail_and_spoil(sequence):
            own = [page for page in sequence.pages if self.engine.blocks.pool._references[page] == 1]
            fail(sequence)
            self.write(own, SPOILT)
            self.failed.add(sequence)

        self.engine.fail = fail_and_spoil

    def write(self, pages, value):
        self._pages[list(pages)] = value

    def bring(self, pages, blocks):
        """Blocks, by key, are written to pages."""
        for page, key in zip(pages, blocks, strict=True):
            self.write([page], number_of(key))

    def check(self, pages, blocks, what):
        for page, key in zip(pages, blocks, strict=False):
            assert self._pages[page, 0] == self._pages[page, -1] == number_of(key), f"{what}: page {page}"

    def check_read(self, row, sequence, what):
        """A row needs all full blocks before it; those of a sequence that arrived rounded, or failed, are its own
        affair."""
        if sequence.is_exact and sequence not in self.failed:
            self.check(row.pages, blocks_of(sequence, row.start), what)

    def compute(self, row, sequence):
        blocks = blocks_of(sequence, row.end)
        for index in range(row.start // PAGE_TOKENS, pages_for(row.end)):
            value = number_of(blocks[index]) if index < len(blocks) else UNFINISHED
            is_right = sequence.is_exact and sequence not in self.failed
            self.write([row.pages[index]], value if is_right else ROUNDED)

    def check_found(self):
        """All that anybody could find now."""
        pool = self.engine.blocks.pool
        for key in pool.hashes:
            self.check(pool.find([key]), [key], "found")
        slots = self.engine.blocks.tier._slots
        for key in slots.hashes:
            copy = self.host.memory[slots.find([key])[0]].view(torch.float32)
            assert copy[0] == copy[-1] == number_of(key), "the copy of a block is of another"


def number_of(key):
    """Exact in float32."""
    return int.from_bytes(key[:3], "big")


def blocks_of(sequence, num_tokens):
    return [sequence.block_key(index) for index in range(min(num_tokens, len(sequence.ids)) // PAGE_TOKENS)]


class TieredMachine(AheadMachine):
    """The same with host memory, whose copies end when they like, and with what stands in the pages."""

    def __init__(self):
        tiered = Tiered(num_pages=6, num_host_pages=8, max_running=3, max_batch_tokens=100)
        super().__init__(tiered.engine)
        self.host = tiered.host
        self.contents = Contents(tiered)
        self.is_over = False
        self.num_brought = 0
        self.num_pushed = 0
        for first in range(3):
            self.add(130, first, 1, hold_kv=False)
        self.go_on(20)

    @rule(num_rounds=st.integers(1, 20))
    def go_on(self, num_rounds):
        """As when nothing is out of the ordinary."""
        for _ in range(num_rounds):
            if len(self.in_flight) < 2:
                self.launch()
            if self.in_flight:
                self.collect("go on")
            self.end_copy(True)
            self.end_copy(False)
            self.advance(2)

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def launch(self):
        if self.is_over:
            self.end_copy(True)
            self.end_copy(False)
            self.advance(0)
        num_before = len(self.in_flight)
        super().launch()
        if not num_before and self.in_flight:
            for row, sequence in zip(self.in_flight[0].rows, self.in_flight[0].sequences, strict=True):
                self.contents.check_read(row, sequence, "launched")

    @precondition(lambda self: self.in_flight)
    @rule(fate=st.sampled_from(["go on", "go on", "go on", "stop", "fail"]))
    def collect(self, fate):
        batch = self.in_flight[0]
        for row, sequence in zip(batch.rows, batch.sequences, strict=True):
            self.contents.check_read(row, sequence, "computed")
            self.contents.compute(row, sequence)
        super().collect(fate)

    @precondition(lambda self: self.importing)
    @rule(exact=st.booleans())
    def imported(self, exact):
        wanted = self.requests[self.importing[-1]]
        sequence = self.engine._sequences[wanted.key]
        own = sequence.pages[sequence.num_published :]
        self.contents.write(own, UNFINISHED if exact else ROUNDED)
        if exact:
            blocks = blocks_of(sequence, len(wanted.ids))[sequence.num_published :]
            self.contents.bring(own[: len(blocks)], blocks)
        super().imported(exact)

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def filled(self, data):
        fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        num_arrived = data.draw(st.integers(0, len(fill.keys)))
        self.contents.bring(fill.pages[:num_arrived], fill.keys[:num_arrived])
        self.engine.blocks.filled(fill, num_arrived)

    @rule(is_down=st.booleans())
    def end_copy(self, is_down):
        self.host.end(is_down=is_down)

    @rule(num_computed=st.integers(0, 2))
    def advance(self, num_computed):
        self.engine.blocks.advance(num_computed)

    @rule()
    def push_out(self):
        """Whatever nobody uses goes from the pages, most of it to host memory."""
        for _ in range(2):
            self.engine.blocks.advance(4)
            self.end_copy(True)
        self.engine.blocks.advance()
        num_pages = self.engine._spare_for_import()[1]
        self.num_pushed += 1
        length = max(0, num_pages) * PAGE_TOKENS + 1
        fill = self.engine.fill(request("r", prompt(length, 1000 * self.num_pushed), greedy(1)), num_pages)
        if fill is not None:
            self.engine.blocks.filled(fill, 0)

    @rule(length=st.sampled_from([65, 130, 200]), first=FAMILIES)
    def bring(self, length, first):
        names = list(map(name_of, keys(length, first)))
        self.num_brought += 1

        def over():
            self.num_brought -= 1
            self.loans.append(self.engine.blocks.lend(names))

        self.engine.bring(names, over)

    @invariant()
    def holds_what_it_says(self):
        self.contents.check_found()
        for loan in self.loans:
            self.contents.check(loan.pages, loan.keys, "lent")
        for sequence, pages in self.held.values():
            if sequence.state is SequenceState.HELD and sequence not in self.contents.failed:
                self.contents.check(pages[: sequence.num_published], sequence.keys, "held")

    def teardown(self):
        self.is_over = True
        while self.engine.blocks.tier.is_restoring:
            self.end_copy(False)
            self.engine.blocks.advance()
        assert self.num_brought == 0
        super().teardown()


TestTiered = TieredMachine.TestCase
TestTiered.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
