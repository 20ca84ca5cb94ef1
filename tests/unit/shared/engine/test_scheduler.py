from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.blocks import PAGE_TOKENS, key_chain, name_of, root_hash, token_ids
from shared.engine.port import EngineLimits
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import TRANSITIONS, SequenceState
from tests.engine_driver import greedy, request


def scheduler(num_pages=16, max_running=4, max_batch_tokens=128):
    return Scheduler(EngineLimits(4096, num_pages, max_running, max_batch_tokens), "model")


def prompt(length, first=0):
    return token_ids(range(first, first + length))


def take(engine, batch, token_id=7):
    """What an engine does with a batch that is done, without a model: every row wanted gets `token_id`."""
    engine.collected(batch)
    for row, sequence in zip(batch.rows, batch.sequences, strict=True):
        if sequence.state in {SequenceState.ENDED, SequenceState.HELD}:
            continue
        engine.publish(sequence, row.end)
        if row.sample and sequence.request.hold_kv:
            engine.hold(sequence)
        elif row.sample and row.sampling.max_tokens == sequence.index + 1:
            engine.end(sequence)
        elif row.sample:
            sequence.ids.append(token_id)
    engine.check()


def spans(batch):
    return [(row.key, row.start, row.end) for row in batch.rows]


def run(engine, token_id=7):
    """One batch, with nothing else in flight. Returns (key, start, end) of the rows."""
    batch = engine.schedule()
    if batch.rows:
        take(engine, batch, token_id)
    return spans(batch)


def test_a_long_prompt_is_computed_in_chunks_beside_decode_rows():
    engine = scheduler(max_batch_tokens=100)
    engine.add(request("a", prompt(3), greedy(9)))
    assert run(engine) == [("a", 0, 3)]
    engine.add(request("b", prompt(230, 500), greedy(9)))
    assert run(engine) == [("a", 3, 4), ("b", 0, 99)]
    assert run(engine) == [("a", 4, 5), ("b", 99, 198)]
    engine.add(request("c", prompt(5, 900), greedy(9)))
    assert run(engine) == [("a", 5, 6), ("b", 198, 230), ("c", 0, 5)]
    assert run(engine) == [("a", 6, 7), ("b", 230, 231), ("c", 5, 6)]


def test_only_the_last_chunk_is_sampled():
    engine = scheduler(max_batch_tokens=100)
    engine.add(request("a", prompt(150), greedy(9, min_tokens=1)))
    (first,), (last,), (decode,) = (engine.schedule().rows for _ in range(3))
    assert [(row.sample, row.forbid_end) for row in (first, last, decode)] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    assert first.pages is last.pages is decode.pages
    assert len(first.pages) == 3


def test_seats_bound_what_runs_and_imports_count():
    engine = scheduler(max_running=2)
    for index in range(3):
        engine.add(request(f"a{index}", prompt(3, 10 * index), greedy(9)))
    assert len(run(engine)) == 2
    assert engine.num_waiting == 1
    assert engine.reserve(request("b", prompt(2, 70), greedy(9))) is None
    engine.abort("a2")
    engine.abort("a1")
    assert engine.reserve(request("b", prompt(2, 70), greedy(9))) is not None
    engine.add(request("c", prompt(3, 80), greedy(9)))
    assert run(engine) == [("a0", 3, 4)]
    engine.imported("b", 7, exact=True)
    assert run(engine) == [("a0", 4, 5), ("b", 2, 3)]


def test_an_import_does_not_take_what_the_head_of_the_line_needs():
    engine = scheduler(num_pages=4)
    engine.add(request("a", prompt(100), greedy(9), hold_kv=True))
    run(engine)
    engine.add(request("b", prompt(190, 500), greedy(9)))
    assert run(engine) == []
    assert engine.reserve(request("c", prompt(2, 70), greedy(9))) is None
    engine.abort("a")
    assert engine.reserve(request("c", prompt(2, 70), greedy(9))) is not None
    assert run(engine) == [("b", 0, 128)]


def test_a_hit_leaves_the_last_token_to_compute():
    engine = scheduler(num_pages=16)
    engine.add(request("a", prompt(2 * PAGE_TOKENS), greedy(1)))
    run(engine)
    engine.add(request("b", prompt(2 * PAGE_TOKENS), greedy(1)))
    assert run(engine) == [("b", 64, 128)]
    engine.add(request("c", prompt(2 * PAGE_TOKENS + 1), greedy(1)))
    assert run(engine) == [("c", 128, 129)]
    assert (engine.num_prefix_queries, engine.num_prefix_hits) == (128 + 128 + 129, 64 + 128)


def test_salts_do_not_share():
    engine = scheduler()
    engine.add(request("a", prompt(100), greedy(1), cache_salt="one"))
    run(engine)
    engine.add(request("b", prompt(100), greedy(1), cache_salt="two"))
    assert run(engine) == [("b", 0, 100)]


def test_a_page_is_published_when_its_last_token_is_computed():
    engine = scheduler(max_batch_tokens=63)
    hashes = key_chain(root_hash("model", ""), prompt(128))
    engine.add(request("a", prompt(126), greedy(9)))
    published = []
    for _ in range(4):
        run(engine, token_id=126)
        published.append(len(engine.blocks.pool.find(hashes)))
    # 63, 126 (and token 126), 127 computed; then token 127 is another one than in `hashes`.
    assert published == [0, 1, 1, 1]
    assert len(engine.blocks.pool.take_changes()[0]) == 2


def test_the_same_prefix_in_flight_is_waited_for():
    engine = scheduler(max_batch_tokens=128)
    engine.add(request("a", prompt(200), greedy(9)))
    engine.add(request("b", token_ids([*prompt(190), 999, 999, 999]), greedy(9)))
    engine.add(request("c", prompt(10, 300), greedy(9)))
    assert run(engine) == [("a", 0, 128)]
    # Block 2 (128..191) of a is no block of b: b needs nothing that is still on its way.
    assert run(engine) == [("a", 128, 200), ("b", 128, 184)]
    assert run(engine) == [("a", 200, 201), ("b", 184, 193), ("c", 0, 10)]


def test_who_waits_for_a_prefix_holds_up_nobody():
    engine = scheduler(max_batch_tokens=128)
    engine.add(request("a", prompt(100), greedy(9)))
    engine.add(request("b", prompt(90), greedy(9)))
    engine.add(request("c", prompt(10, 300), greedy(9)))
    assert run(engine) == [("a", 0, 100), ("c", 0, 10)]
    assert run(engine) == [("a", 100, 101), ("c", 10, 11), ("b", 64, 90)]


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_who_waits_for_a_prefix_computes_it_when_the_first_is_gone(how):
    engine = scheduler(max_batch_tokens=64)
    engine.add(request("a", prompt(200), greedy(9)))
    engine.add(request("b", prompt(200), greedy(9)))
    batch = engine.schedule()
    take(engine, batch)
    if how == "abort":
        engine.abort("a")
        assert run(engine) == [("b", 64, 128)]
    else:
        engine.fail(batch.sequences[0])  # what it computed is not found
        assert run(engine) == [("b", 0, 64)]


def test_the_youngest_is_preempted_and_served_first_afterwards():
    engine = scheduler(num_pages=3, max_batch_tokens=256)
    engine.add(request("old", prompt(62), greedy(70)))
    engine.add(request("young", prompt(100, 200), greedy(9)))
    assert run(engine) == [("old", 0, 62), ("young", 0, 100)]
    engine.add(request("new", prompt(3, 400), greedy(9)))
    assert run(engine) == [("old", 62, 63), ("young", 100, 101)]
    assert run(engine) == [("old", 63, 64), ("young", 101, 102)]
    # Old takes its second page from young; new, which would fit, does not overtake young.
    assert run(engine) == [("old", 64, 65)]
    assert (engine.num_preemptions, engine.num_waiting) == (1, 2)
    engine.abort("old")
    # Young's first block was still there; the tokens it had made are ids now.
    assert run(engine) == [("young", 64, 103), ("new", 0, 3)]


def test_a_preempted_sequence_is_a_new_one_to_the_runner_even_in_the_same_seat():
    """What a runner keeps of a seat may be old: the sequence may have gone on in another seat meanwhile."""
    engine = scheduler(num_pages=3)
    engine.add(request("held", prompt(100), greedy(9), hold_kv=True))
    run(engine)
    engine.add(request("a", prompt(64, 200), greedy(9)))
    batch = engine.schedule()
    (before,) = batch.rows
    take(engine, batch)
    assert run(engine) == []
    engine.abort("held")
    (after,) = engine.schedule().rows
    assert engine.num_preemptions == 1
    assert after.seat == before.seat
    assert after.sequence != before.sequence


def test_a_preempted_import_goes_before_an_older_request_that_is_new():
    engine = scheduler(num_pages=4, max_running=3)
    engine.add(request("old", prompt(62), greedy(70)))
    run(engine)
    engine.add(request("first", prompt(3, 300), greedy(9)))
    engine.add(request("second", prompt(3, 400), greedy(9)))
    assert engine.reserve(request("import", prompt(65, 200), greedy(9))) is not None
    engine.imported("import", 7, exact=True)
    assert run(engine) == [("old", 62, 63), ("import", 65, 66), ("first", 0, 3)]
    assert run(engine) == [("old", 63, 64), ("first", 3, 4), ("import", 66, 67)]
    # Old takes a page from the import. Second would fit into the seat and the page that are left.
    assert run(engine) == [("old", 64, 65), ("first", 4, 5)]
    assert (engine.num_preemptions, engine.num_waiting) == (1, 2)
    engine.abort("old")
    assert run(engine) == [("first", 5, 6), ("import", 64, 68), ("second", 0, 3)]


def test_who_is_alone_with_held_pages_gives_up_its_own_and_waits():
    engine = scheduler(num_pages=3)
    engine.add(request("held", prompt(100), greedy(9), hold_kv=True))
    run(engine)
    engine.add(request("a", prompt(64, 200), greedy(9)))
    assert run(engine) == [("a", 0, 64)]
    assert run(engine) == []
    assert (engine.num_preemptions, engine.has_work()) == (1, False)
    engine.abort("held")
    assert engine.has_work()
    assert run(engine) == [("a", 64, 65)]


def test_who_holds_its_kv_is_not_preempted_though_it_is_the_youngest():
    engine = scheduler(num_pages=5, max_batch_tokens=80)
    engine.add(request("old", prompt(62), greedy(70)))
    engine.add(request("middle", prompt(3, 200), greedy(70)))
    run(engine)
    engine.add(request("held", prompt(190, 300), greedy(9), hold_kv=True))
    assert run(engine) == [("old", 62, 63), ("middle", 3, 4), ("held", 0, 78)]
    assert run(engine) == [("old", 63, 64), ("middle", 4, 5), ("held", 78, 156)]
    # Old takes the page of middle, the youngest that may lose one, and held is launched to its end.
    assert run(engine) == [("old", 64, 65), ("held", 156, 190)]
    assert (engine.num_preemptions, engine.num_waiting, engine.num_held) == (1, 1, 1)


def test_who_lacks_a_page_beside_those_that_hold_theirs_gives_up_its_own():
    engine = scheduler(num_pages=4, max_batch_tokens=66)
    engine.add(request("old", prompt(63), greedy(70)))
    run(engine)
    engine.add(request("held", prompt(180, 300), greedy(9), hold_kv=True))
    assert run(engine) == [("old", 63, 64), ("held", 0, 65)]
    assert run(engine) == [("held", 65, 131)]
    assert (engine.num_preemptions, engine.num_waiting) == (1, 1)
    run(engine)
    assert (engine.num_held, engine.has_work()) == (1, False)
    engine.abort("held")
    assert run(engine) == [("old", 64, 65)]


def test_a_held_request_that_failed_keeps_its_pages_where_nobody_finds_them():
    engine = scheduler()
    engine.add(request("a", prompt(100), greedy(9), hold_kv=True))
    batch = engine.schedule()
    engine.collected(batch)
    (sequence,) = batch.sequences
    pages = sequence.pages
    engine.publish(sequence, 64)
    engine.fail(sequence)
    engine.check()
    assert (engine.num_held, sequence.pages, engine.blocks.pool.find(sequence.keys)) == (1, pages, ())
    engine.abort("a")
    assert engine.blocks.pool.num_free == 16


def test_importing_pages_are_never_taken():
    engine = scheduler(num_pages=3)
    reservation = engine.reserve(request("b", prompt(99), greedy(9)))
    assert reservation is not None
    assert (len(reservation.pages), reservation.num_cached_pages) == (2, 0)
    engine.add(request("a", prompt(64, 200), greedy(9)))
    run(engine)
    assert run(engine) == []
    engine.imported("b", 7, exact=True)
    assert engine.num_importing == 0


def test_a_reservation_has_the_pages_of_all_ids_and_may_find_them_all():
    engine = scheduler()
    engine.add(request("a", prompt(128), greedy(1)))
    run(engine)
    reservation = engine.reserve(request("b", prompt(128), greedy(9)))
    assert reservation is not None
    assert (len(reservation.pages), reservation.num_cached_pages) == (2, 2)
    engine.imported("b", 7, exact=True)
    assert run(engine) == [("b", 128, 129)]


def test_imported_pages_are_found_once_they_are_there():
    engine = scheduler()
    hashes = key_chain(root_hash("model", ""), prompt(128))
    engine.reserve(request("b", prompt(100), greedy(9)))
    assert engine.blocks.pool.find(hashes) == ()
    engine.imported("b", 7, exact=True)
    assert len(engine.blocks.pool.find(hashes)) == 1


def test_imported_pages_that_are_not_exact_are_never_found():
    engine = scheduler(num_pages=4)
    engine.add(request("before", prompt(70), greedy(1)))
    run(engine)
    engine.blocks.pool.take_changes()
    reservation = engine.reserve(request("b", prompt(128), greedy(200)))
    assert (len(reservation.pages), reservation.num_cached_pages) == (2, 1)
    engine.imported("b", 128, exact=False)
    engine.add(request("c", prompt(150), greedy(1)))
    assert run(engine)[0] == ("b", 128, 129)
    for token_id in range(129, 192):
        run(engine, token_id)
    (b,) = engine._active
    assert (b.num_launched, b.num_published) == (192, 1)
    assert engine.blocks.pool.find(key_chain(root_hash("model", ""), prompt(192))) == b.pages[:1]


def test_a_preempted_import_that_was_not_exact_is_computed_again_and_found():
    engine = scheduler(num_pages=4)
    engine.add(request("old", prompt(62, 500), greedy(70)))
    run(engine)
    assert engine.reserve(request("b", prompt(191), greedy(9))) is not None
    engine.imported("b", 191, exact=False)
    hashes = key_chain(root_hash("model", ""), prompt(192))
    assert run(engine, 192) == [("old", 62, 63), ("b", 191, 192)]
    while not engine.num_preemptions:
        assert engine.blocks.pool.find(hashes) == ()
        run(engine, 193)
    engine.abort("old")
    assert run(engine)[0] == ("b", 0, 128)
    run(engine)
    assert len(engine.blocks.pool.find(hashes)) == 3


def test_only_importing_requests_are_imported():
    engine = scheduler()
    engine.add(request("a", prompt(3), greedy(9)))
    with pytest.raises(KeyError):
        engine.imported("a", 7, exact=True)
    engine.abort("nobody")


@pytest.mark.parametrize(
    ("max_running", "max_batch_tokens", "message"), [(0, 8, "max_running is 0"), (9, 8, "max_batch_tokens is 8")]
)
def test_limits_that_make_no_sense_are_refused(max_running, max_batch_tokens, message):
    with pytest.raises(ValueError, match=message):
        scheduler(max_running=max_running, max_batch_tokens=max_batch_tokens)


def test_every_state_is_in_the_table():
    assert set(TRANSITIONS) == set(SequenceState)
    engine = scheduler(max_batch_tokens=4)
    engine.add(request("a", prompt(5), greedy(9)))
    (sequence,) = engine.schedule().sequences
    with pytest.raises(ValueError, match="cannot become HELD"):
        engine.hold(sequence)


# One batch ahead.


def test_a_row_goes_on_from_what_is_in_flight():
    engine = scheduler(max_batch_tokens=100)
    engine.add(request("a", prompt(150), greedy(3)))
    first, second = engine.schedule(), engine.schedule()
    assert spans(first) + spans(second) == [("a", 0, 100), ("a", 100, 150)]
    take(engine, first)
    third = engine.schedule()
    assert spans(third) == [("a", 150, 151)]
    assert len(third.rows[0].ids) == 150, "nobody has seen the token that it computes"
    take(engine, second)
    fourth = engine.schedule()
    assert spans(fourth) == [("a", 151, 152)]
    assert len(fourth.rows[0].ids) == 151
    take(engine, third)
    assert spans(engine.schedule()) == [], "the token that follows is not wanted"
    assert engine.has_work()
    take(engine, fourth)
    assert not engine.has_work()


def test_the_end_is_forbidden_by_the_index_of_tokens_not_seen():
    engine = scheduler()
    engine.add(request("a", prompt(10), greedy(9, min_tokens=2)))
    forbidden = []
    for _ in range(3):
        (row,) = engine.schedule().rows
        forbidden.append(row.forbid_end)
    assert forbidden == [True, True, False]


def test_who_is_to_be_held_is_launched_for_one_token():
    engine = scheduler()
    engine.add(request("a", prompt(10), greedy(9), hold_kv=True))
    batch = engine.schedule()
    assert spans(engine.schedule()) == []
    take(engine, batch)
    assert (engine.num_held, engine.has_work()) == (1, False)


def test_a_block_is_found_when_its_batch_has_been_collected():
    engine = scheduler(max_batch_tokens=64)
    hashes = key_chain(root_hash("model", ""), prompt(128))
    engine.add(request("a", prompt(129), greedy(9)))
    first, second = engine.schedule(), engine.schedule()
    assert engine.blocks.pool.find(hashes) == ()
    take(engine, first)
    assert len(engine.blocks.pool.find(hashes)) == 1
    take(engine, second)
    assert len(engine.blocks.pool.find(hashes)) == 2


@pytest.mark.parametrize("how", ["abort", "end", "fail"])
def test_who_ends_keeps_pages_and_seat_until_no_batch_has_a_row_of_it(how):
    engine = scheduler(num_pages=4, max_running=1)
    engine.add(request("a", prompt(100), greedy(9)))
    first, second = engine.schedule(), engine.schedule()
    (sequence,) = first.sequences
    if how != "abort":
        engine.collected(first)
    if how == "end":
        engine.end(sequence)
    elif how == "fail":
        engine.fail(sequence)
    else:
        engine.abort("a")
        engine.collected(first)
    engine.check()
    assert (engine.num_running, engine.blocks.pool.num_free) == (0, 2)
    engine.add(request("a", prompt(100), greedy(9)))  # its name is free, its seat is not
    assert spans(engine.schedule()) == []
    assert engine.reserve(request("b", prompt(2), greedy(9))) is None
    engine.collected(second)
    engine.check()
    assert engine.blocks.pool.num_free == 4
    assert spans(engine.schedule()) == [("a", 0, 100)]


def test_nobody_is_preempted_under_a_batch_in_flight():
    engine = scheduler(num_pages=3)
    engine.add(request("old", prompt(62), greedy(70)))
    engine.add(request("young", prompt(66, 200), greedy(9)))
    for _ in range(3):
        batch = engine.schedule()
        ahead = engine.schedule()
        if not ahead.rows:
            break
        take(engine, batch)
        batch = ahead
        take(engine, batch)
    assert (len(batch.rows), engine.num_preemptions) == (2, 0)
    take(engine, batch)
    assert spans(engine.schedule()) == [("old", 64, 65)]
    assert engine.num_preemptions == 1


FAMILIES = st.integers(0, 3)
"""First ids of prompts, which have no block in common."""


class AheadMachine(RuleBasedStateMachine):
    """A scheduler with up to two batches in flight, and all that may happen meanwhile."""

    def __init__(self, engine=None):
        super().__init__()
        self.engine = engine or scheduler(num_pages=9, max_running=3, max_batch_tokens=100)
        self.in_flight = deque()
        self.requests = {}
        self.importing = []
        self.num_tokens = Counter()
        self.started = Counter()
        self.ended_early = set()
        self.launched_to = {}
        self.held = {}
        self.fills = []
        self.loans = []

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def launch(self):
        batch = self.engine.schedule()
        if not batch.rows:
            return
        assert sum(row.end - row.start for row in batch.rows) <= 100
        assert len({row.seat for row in batch.rows}) == len(batch.rows)
        in_flight = {row.sequence for each in self.in_flight for row in each.rows}
        for row, sequence in zip(batch.rows, batch.sequences, strict=True):
            wanted = self.requests[row.key]
            assert 0 <= row.start < row.end <= len(row.ids) + (row.sequence in in_flight)
            assert len(row.pages) * PAGE_TOKENS >= row.end
            assert row.end - row.prompt_len < wanted.sampling.max_tokens
            assert row.sample == (row.end >= len(row.ids))
            if row.sequence in in_flight:
                assert row.start == self.launched_to[row.sequence]
            assert sequence.num_launched == row.end
            self.launched_to[row.sequence] = row.end
            if wanted.hold_kv:
                assert self.held.setdefault(row.key, (sequence, row.pages)) == (sequence, row.pages), "preempted"
        self.started.update(batch.started)
        self.in_flight.append(batch)

    @precondition(lambda self: self.in_flight)
    @rule(fate=st.sampled_from(["go on", "go on", "go on", "stop", "fail"]))
    def collect(self, fate):
        batch = self.in_flight.popleft()
        alive = [sequence for sequence in batch.sequences if sequence.state is not SequenceState.ENDED]
        sampled = {
            row.key for row, each in zip(batch.rows, batch.sequences, strict=True) if row.sample and each in alive
        }
        self.num_tokens.update(sampled)
        if fate != "go on" and alive:
            victim = alive[-1]
            if fate == "stop":
                self.ended_early.add(victim.request.key)
                self.engine.end(victim)
            elif victim.request.key in sampled:
                self.ended_early.add(victim.request.key)
                pages = victim.pages
                self.engine.fail(victim)
                assert not victim.request.hold_kv or victim.pages == pages
        take(self.engine, batch)

    @rule(
        length=st.sampled_from([1, 60, 64, 65, 130]),
        first=FAMILIES,
        max_tokens=st.sampled_from([1, 2, 70]),
        hold_kv=st.booleans(),
    )
    def add(self, length, first, max_tokens, hold_kv):
        added = request(f"r{len(self.requests)}", prompt(length, first), greedy(max_tokens), hold_kv=hold_kv)
        self.requests[added.key] = added
        self.engine.add(added)

    @rule(length=st.sampled_from([2, 65, 130]), first=FAMILIES)
    def reserve(self, length, first):
        wanted = request(f"r{len(self.requests)}", prompt(length, first), greedy(70))
        reservation = self.engine.reserve(wanted)
        if reservation is not None:
            used = {page for batch in self.in_flight for row in batch.rows for page in row.pages}
            assert not used & set(reservation.pages[reservation.num_cached_pages :])
            self.requests[wanted.key] = wanted
            self.importing.append(wanted.key)

    @precondition(lambda self: self.importing)
    @rule(exact=st.booleans())
    def imported(self, exact):
        key = self.importing.pop()
        self.num_tokens[key] = 1
        self.engine.imported(key, 7, exact=exact)

    @rule(length=st.sampled_from([65, 130, 200]), first=FAMILIES, num_pages=st.integers(0, 4))
    def fill(self, length, first, num_pages):
        fill = self.engine.fill(request("r", prompt(length, first), greedy(1)), num_pages)
        if fill is not None:
            used = {page for batch in self.in_flight for row in batch.rows for page in row.pages}
            assert not used & set(fill.pages)
            self.fills.append(fill)

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def filled(self, data):
        fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        self.engine.blocks.filled(fill, data.draw(st.integers(0, len(fill.keys))))

    @rule(length=st.sampled_from([65, 130, 200]), first=FAMILIES)
    def lend(self, length, first):
        keys = key_chain(root_hash("model", ""), prompt(length, first))
        loan = self.engine.blocks.lend(list(map(name_of, keys)))
        assert loan.keys == tuple(keys[: len(loan.pages)])
        self.loans.append(loan)

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def give_back(self, data):
        self.engine.blocks.give_back(self.loans.pop(data.draw(st.integers(0, len(self.loans) - 1))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        key = data.draw(st.sampled_from(sorted(self.requests)))
        self.ended_early.add(key)
        self.importing = [other for other in self.importing if other != key]
        self.engine.abort(key)

    @invariant()
    def adds_up(self):
        self.engine.check()
        for sequence, pages in self.held.values():
            assert sequence.state is SequenceState.ENDED or sequence.pages == pages, "held pages were given away"
        for batch in self.in_flight:
            for row, sequence in zip(batch.rows, batch.sequences, strict=True):
                assert sequence.pages[: len(row.pages)] == row.pages, "the batch's pages are not its sequence's"
                assert sequence.seat == row.seat

    def end_what_others_end(self):
        while self.importing:
            self.imported(True)
        while self.fills:
            self.engine.blocks.filled(self.fills.pop(), 0)
        while self.loans:
            self.engine.blocks.give_back(self.loans.pop())

    def teardown(self):
        self.end_what_others_end()
        while True:
            for key in [key for key, each in self.requests.items() if each.hold_kv and self.num_tokens[key]]:
                self.engine.abort(key)
            if not self.engine.has_work():
                break
            num_preemptions = self.engine.num_preemptions
            for _ in range(2 - len(self.in_flight)):
                self.launch()
            if self.in_flight:
                self.collect("go on")
            else:
                assert self.engine.num_preemptions > num_preemptions, "nothing can be done though there is work"
            self.adds_up()
        assert self.engine.blocks.pool.num_free == self.engine.blocks.pool.num_pages
        assert self.engine.num_waiting == 0
        assert all(count == 1 for count in self.started.values())
        for key, wanted in self.requests.items():
            if key not in self.ended_early:
                assert self.num_tokens[key] == (1 if wanted.hold_kv else wanted.sampling.max_tokens), key


TestAhead = AheadMachine.TestCase
TestAhead.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
