"""Blocks that come from elsewhere, as the scheduler sees them, and those that are lent."""

import pytest

from shared.blocks import PAGE_TOKENS, key_chain, name_of, root_hash
from tests.engine_driver import greedy, request
from tests.unit.shared.engine.test_scheduler import prompt, run, scheduler, spans


def asks(key="a", length=300, **options):
    return request(key, prompt(length), greedy(9), **options)


def keys(length=300, salt=""):
    return key_chain(root_hash("model", salt), prompt(length))


def test_who_waits_for_a_fill_starts_behind_what_it_brought():
    engine = scheduler(max_batch_tokens=512)
    fill = engine.fill(asks(), 3)
    engine.add(asks())
    assert (fill.keys, len(fill.pages)) == (tuple(keys()[:3]), 3)
    assert not engine.has_work()
    assert run(engine) == []
    engine.blocks.filled(fill, 3)
    engine.check()
    assert engine.has_work()
    assert run(engine) == [("a", 192, 300)]
    assert (engine.num_prefix_queries, engine.num_prefix_hits) == (300, 192)


@pytest.mark.parametrize("num_arrived", [0, 2])
def test_what_did_not_come_is_computed(num_arrived):
    engine = scheduler(max_batch_tokens=512)
    fill = engine.fill(asks(), 4)
    engine.add(asks())
    assert run(engine) == []
    engine.blocks.filled(fill, num_arrived)
    assert engine.blocks.pool.num_free == 16
    assert run(engine) == [("a", num_arrived * PAGE_TOKENS, 300)]


def test_others_go_on_beside_a_fill():
    engine = scheduler(max_batch_tokens=512)
    engine.fill(asks(), 3)
    engine.add(asks())
    engine.add(request("b", prompt(70, 900), greedy(9)))
    assert run(engine) == [("b", 0, 70)]
    assert run(engine) == [("b", 70, 71)]


def test_a_fill_brings_only_what_is_neither_here_nor_on_its_way_and_what_can_be_used():
    engine = scheduler(num_pages=32, max_batch_tokens=512)
    engine.add(request("here", prompt(PAGE_TOKENS), greedy(1)))
    run(engine)
    engine.add(request("coming", prompt(3 * PAGE_TOKENS), greedy(1)))
    in_flight = engine.schedule()
    fill = engine.fill(asks(), 99)
    assert fill.keys == tuple(keys()[3:4])
    again = engine.fill(asks("again"), 4)
    assert again.keys == ()
    engine.blocks.filled(again, 0)
    engine.collected(in_flight)
    engine.blocks.filled(fill, 1)
    engine.check()
    assert engine.fill(asks(length=4 * PAGE_TOKENS), 4).keys == ()  # the last token of a prompt is computed


def test_what_was_found_before_a_fill_is_not_evicted_under_it():
    engine = scheduler(num_pages=6, max_batch_tokens=512)
    engine.add(request("here", prompt(PAGE_TOKENS), greedy(1)))
    run(engine)
    fill = engine.fill(asks(length=140), 2)
    assert (len(fill.found), len(fill.pages)) == (1, 1)
    engine.add(request("b", prompt(4 * PAGE_TOKENS, 900), greedy(1)))
    assert run(engine) == [("b", 0, 256)]
    engine.blocks.filled(fill, 1)
    engine.add(asks(length=140))
    assert run(engine) == [("a", 128, 140)]


def test_one_fill_serves_all_who_want_its_blocks_and_outlives_who_asked_for_it():
    engine = scheduler(max_batch_tokens=512)
    fill = engine.fill(asks(), 3)
    engine.add(asks())
    engine.add(asks("b"))
    engine.abort("a")
    assert run(engine) == []
    engine.blocks.filled(fill, 3)
    assert run(engine) == [("b", 192, 300)]


def test_a_fill_takes_nothing_that_the_head_of_the_line_needs():
    engine = scheduler(num_pages=8, max_batch_tokens=512)
    engine.add(request("held", prompt(100, 5000), greedy(9), hold_kv=True))
    run(engine)
    engine.add(request("head", prompt(7 * PAGE_TOKENS, 900), greedy(9)))
    assert run(engine) == []
    assert engine.fill(asks(), 1) is None
    engine.abort("held")
    assert engine.fill(asks(), 1) is not None
    assert run(engine) == [("head", 0, 448)]


@pytest.mark.parametrize("num_arrived", [0, 4])
def test_what_comes_for_the_head_does_not_need_room_twice(num_arrived):
    engine = scheduler(num_pages=12, max_batch_tokens=512)
    fill = engine.fill(asks(), 4)
    engine.add(asks())  # needs one page more
    other = engine.fill(request("b", prompt(7 * PAGE_TOKENS, 900), greedy(1)), 6)
    assert len(other.pages) == 6
    assert engine.fill(request("c", prompt(3 * PAGE_TOKENS, 2000), greedy(1)), 2) is None
    assert engine.reserve(request("d", prompt(2 * PAGE_TOKENS, 3000), greedy(9))) is None
    engine.blocks.filled(fill, num_arrived)
    assert run(engine) == [("a", num_arrived * PAGE_TOKENS, 300)]
    engine.blocks.filled(other, 0)
    engine.check()


def test_a_fill_that_took_the_room_of_the_head_gives_it_back():
    engine = scheduler(num_pages=6, max_batch_tokens=512)
    fill = engine.fill(asks(), 4)
    engine.add(request("head", prompt(5 * PAGE_TOKENS, 900), greedy(1)))
    assert run(engine) == []
    assert not engine.has_work()
    engine.blocks.filled(fill, 4)
    assert run(engine) == [("head", 0, 320)]


def test_blocks_of_another_salt_are_others():
    engine = scheduler(max_batch_tokens=512)
    fill = engine.fill(asks(cache_salt="one"), 3)
    assert fill.keys == tuple(keys(salt="one")[:3])
    engine.add(asks("b", cache_salt="two"))
    assert run(engine) == [("b", 0, 300)]
    engine.blocks.filled(fill, 3)


def test_what_is_lent_stays_until_it_is_given_back():
    engine = scheduler(num_pages=4, max_batch_tokens=512)
    engine.add(request("a", prompt(2 * PAGE_TOKENS + 1), greedy(1)))
    run(engine)
    loan = engine.blocks.lend([name_of(key) for key in keys()])
    engine.check()
    assert loan.keys == tuple(keys()[:2])
    assert engine.blocks.pool.find(loan.keys) == loan.pages
    engine.add(request("b", prompt(3 * PAGE_TOKENS, 900), greedy(1)))
    assert spans(engine.schedule()) == []
    engine.blocks.give_back(loan)
    engine.check()
    assert run(engine) == [("b", 0, 192)]


def test_nothing_is_lent_of_a_run_whose_first_block_is_gone():
    engine = scheduler(max_batch_tokens=512)
    engine.add(request("a", prompt(2 * PAGE_TOKENS + 1), greedy(1)))
    run(engine)
    loan = engine.blocks.lend([name_of(keys(salt="other")[0]), name_of(keys()[1])])
    assert (loan.pages, loan.keys) == ((), ())
    engine.blocks.give_back(loan)
    assert engine.blocks.pool.num_free == 16


def test_a_name_tells_nothing_of_the_rest_of_the_key():
    first, second = keys()[:2]
    assert (len(first), len(name_of(first))) == (32, 16)
    assert first[16:] not in (name_of(first), name_of(second))
    assert key_chain(name_of(first), prompt(64, 64))[0] != second  # the parent's name is not enough to go on
