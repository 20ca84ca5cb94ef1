from dataclasses import replace

import pytest

from benchmarks.engine.build import SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.drive import Work, greedy
from benchmarks.host_tier import TINY, FirstToken, crossover, decode_steps, first_tokens, push_out, settle, table
from shared.engine.fake import fake_engine


@pytest.fixture
def engine():
    return fake_engine(num_pages=48, max_running=8, max_batch_tokens=256, num_host_pages=48)


@pytest.fixture
def work(engine):
    return Work(engine.model.vocab_size, seed=1)


def test_prompts_are_computed_then_restored_then_found(engine, work):
    rows = list(first_tokens(engine, work, TINY))
    assert [row.num_tokens for row in rows] == [64, 256]
    assert all(min(row.computed_s, row.restored_s, row.found_s) > 0 for row in rows)
    assert engine.stats().num_host_hits == (64 + 256) * (TINY.repeats + 1)


def test_what_is_pushed_out_is_in_host_memory_alone(engine, work):
    engine.add(work.requests(1, 300, greedy(1))[0])
    while engine.has_work():
        engine.step()
    push_out(engine, work)
    settle(engine)
    stats = engine.stats()
    assert (stats.num_host_pages, stats.num_lost_blocks, stats.num_free_pages) == (4, 0, 48)


def test_an_engine_without_host_memory_is_told_apart(work):
    with pytest.raises(RuntimeError, match="not brought back"):
        next(first_tokens(fake_engine(num_pages=48, max_running=8), work, TINY))


def test_steps_run_beside_copies_of_both_directions():
    plan = BenchPlan("cpu", "float32", "torch", num_pages=16, max_running=3, max_batch_tokens=128)
    engine = start_engine("tiny", plan, SPEED_WEIGHTS)[0].engine
    work = Work(engine.model.vocab_size, seed=1)
    steps = list(decode_steps(engine, work, TINY))
    assert [each.direction for each in steps] == ["none", "down", "up", "both"]
    assert [each.bytes_per_s > 0 for each in steps] == [False, True, True, True]
    engine.check()
    assert engine.stats().num_free_pages == 16


def test_the_crossover_is_where_restoring_begins_to_win_for_good():
    row = FirstToken(64, computed_s=2.0, restored_s=1.0, found_s=0.5)
    rows = [row, replace(row, num_tokens=128, restored_s=3.0), replace(row, num_tokens=256)]
    assert crossover(rows) == 256
    assert crossover(rows[:1]) == 64
    assert crossover(rows[:2]) is None
    assert "| 64 | 2000.00 | 1000.00 | 500.00 | 0.0 |" in table(rows, [], page_bytes=1000)
