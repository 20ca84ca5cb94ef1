"""Only what lies below everything unfinished is committed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.low_water import NAMED_AFTER_S, TIME_STEP_S, Left, LowWater, read_commit
from shared.bus.port import MAX_NOTE_BYTES, Committed


def test_it_waits_for_the_oldest():
    low_water = LowWater(Left(5))
    assert low_water.offset == 5
    for offset in (5, 6, 8):
        low_water.begin(offset, 0.0)
    low_water.end(6)
    assert low_water.offset == 5
    low_water.end(5)
    assert low_water.offset == 8
    low_water.end(8)
    assert low_water.offset == 9


@given(st.permutations(range(20)))
def test_any_order_of_ends_gives_the_lowest_unfinished(order):
    low_water = LowWater(Left(0))
    for offset in range(20):
        low_water.begin(offset, 0.0)
    unfinished = set(range(20))
    for offset in order:
        low_water.end(offset)
        unfinished.discard(offset)
        assert low_water.offset == min(unfinished, default=20)


def test_a_successor_reads_neither_what_ended_behind_one_that_waits_long_nor_misses_any():
    low_water = LowWater(Left(100))
    for offset in range(100, 200):
        low_water.begin(offset, now_s=offset / 10)
    for offset in set(range(100, 200)) - {103, 150, 198}:
        low_water.end(offset)
    statement = low_water.statement(NAMED_AFTER_S + 15.1)
    assert statement == Committed(103, "95:0,47@0")
    assert read_commit(statement) == Left(198, (103, 150)), "the last one came a moment ago"
    successor = LowWater(read_commit(statement))
    assert successor.statement(0.0) == Committed(103, "95:0,47@0"), "and its successor's too"
    successor.end(103)
    successor.begin(198, 30.0)
    successor.end(198)
    assert successor.statement(31.0) == Committed(150, "49:0@0")
    successor.end(150)
    assert successor.statement(31.0) == Committed(199)
    assert read_commit(Committed(199)) == Left(199)
    assert read_commit(None) == Left(0)


def test_a_commit_says_since_when_some_of_those_that_wait_may_have_ended():
    now_s = 100.0 * TIME_STEP_S
    low_water = LowWater(Left(0))
    low_water.begin(0, 1.0)
    assert read_commit(low_water.statement(now_s)) == Left(1, (0,), now_s), "not before: it is in hand"
    assert low_water.statement(now_s + TIME_STEP_S - 1) == low_water.statement(now_s), "nothing new to commit"
    low_water.begin(1, now_s - NAMED_AFTER_S + 1)
    low_water.begin(2, now_s)
    low_water.end(2)
    assert read_commit(low_water.statement(now_s)).since_s == now_s - TIME_STEP_S, "who is read again may have ended"

    successor = LowWater(read_commit(low_water.statement(now_s)))
    later_s = now_s + 50 * TIME_STEP_S
    assert read_commit(successor.statement(later_s)).since_s == now_s - TIME_STEP_S, "the one before may have ended it"
    successor.begin(1, later_s, others_had_since_s=7.0)
    assert read_commit(successor.statement(later_s + 60)) == Left(2, (0, 1), 0)
    successor.end(0)
    assert read_commit(successor.statement(later_s + 60)).since_s == 0
    successor.end(1)
    successor.begin(2, later_s)
    assert read_commit(successor.statement(later_s + 60)) == Left(3, (2,), later_s + 60)


@settings(max_examples=20)
@given(st.sets(st.integers(0, 4000)), st.integers(0, 4000), st.integers(0, 2**60))
def test_whatever_is_named_nothing_that_waits_is_passed_over_and_the_note_fits(waiting, num_old, base):
    low_water = LowWater(Left(base))
    for offset in range(4001):
        low_water.begin(base + offset, 0.0 if offset < num_old else 100.0)
    for offset in set(range(4001)) - waiting:
        low_water.end(base + offset)
    statement = low_water.statement(100.0)
    assert len(statement.note.encode()) <= MAX_NOTE_BYTES
    left = read_commit(statement)
    assert {base + offset for offset in waiting} <= {*left.named, *range(left.begins, base + 4001)}
    assert all(offset < left.begins for offset in left.named)
