import pytest

from loadgen.simulator.workload import SPREAD_S, build_workload, infer_parents
from shared.errors import StartupError
from tests.unit.loadgen.simulator.small import rows, workload

PARENT = (0.0, 1100, 100, (1, 2, 3))
CHILD = (60.0, 2000, 10, (1, 2, 4, 5))


def test_a_next_turn_begins_with_its_parents_full_blocks_and_has_room_for_the_answer():
    assert infer_parents(rows(PARENT, CHILD)) == [None, 0]
    assert infer_parents(rows(PARENT, (60.0, 1150, 10, (1, 2, 4)))) == [None, None], "no room for the answer"
    assert infer_parents(rows(PARENT, (0.0, 2000, 10, (1, 2, 4, 5)))) == [None, None], "not later"
    assert infer_parents(rows((0.0, 600, 9, (1, 2)), (9.0, 900, 9, (1, 3)))) == [None, None], "one block tells nothing"


def test_a_child_shares_its_parents_prompt_and_answer_page_by_page():
    parent, child = workload(PARENT, CHILD).rows
    # 1100 tokens are 17 full pages, 1199 computed ones 18; the child finds all 18.
    shared = [segment for segment in child.path if segment in parent.path]
    pages = workload(PARENT, CHILD).segment_pages
    assert sum(pages[segment] for segment in shared) == 18
    assert (len(parent.prompt), len(child.prompt)) == (17, 31)


def test_without_history_only_full_blocks_are_shared():
    load = build_workload([("t", rows(PARENT, CHILD))], history=False)
    shared = set(load.rows[0].path) & set(load.rows[1].path)
    assert sum(load.segment_pages[segment] for segment in shared) == 16


def test_copies_come_at_one_time_and_share_nothing():
    load = build_workload([("t", rows(PARENT, CHILD))], copies=2)
    assert [row.at_s for row in load.rows] == [0, 0, 60, 60]
    assert [row.parent for row in load.rows] == [None, None, 0, 1]
    assert not set(load.rows[0].path) & set(load.rows[1].path)
    assert set(load.rows[1].path) & set(load.rows[3].path)


def test_traces_mixed_share_nothing_and_are_in_order():
    load = build_workload([("a", rows(PARENT)), ("b", rows((5.0, 1100, 1, (1, 2, 3)), (-1.0, 64, 1)))])
    assert [(row.source, row.index) for row in load.rows] == [("b", 0), ("a", 1), ("b", 2)]
    assert not set(load.rows[1].path) & set(load.rows[2].path)


def test_a_conversation_that_gets_too_long_is_left_out_as_a_whole():
    short = (1.0, 900, 5, (7, 8))
    load = build_workload([("t", rows(PARENT, short, CHILD))], max_input=1500)
    assert [row.num_input for row in load.rows] == [900]
    with pytest.raises(StartupError, match="--max-input 10 leaves out every conversation"):
        build_workload([("t", rows(PARENT))], max_input=10)


def test_a_seed_moves_arrivals_within_the_tick_and_speed_divides_all():
    load = workload((0.0, 10, 1), (300.0, 10, 1))
    first, second = load.times(seed=1, speed=1.0)
    assert 0 <= first <= SPREAD_S
    assert 300 <= second <= 300 + SPREAD_S
    assert load.times(seed=1, speed=2.0) == [first / 2, second / 2]
    assert load.times(seed=2, speed=1.0) != [first, second]
