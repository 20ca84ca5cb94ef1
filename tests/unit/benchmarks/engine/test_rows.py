import pytest

from benchmarks.engine.build import SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.peer import BOUNDS, PEERS
from benchmarks.engine.rows import FULL, TINY, Bench


@pytest.fixture(scope="module")
def bench():
    plan = BenchPlan("cpu", "float32", "torch", TINY.num_pages, TINY.num_rows, max_batch_tokens=256)
    built, _ = start_engine("tiny", plan, SPEED_WEIGHTS)
    return Bench(built.engine, TINY, on_cuda=False, seed=1)


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("first", ["first request after ready"]),
        ("prefill", ["first token, 8", "first token, 70", "prefill 3 × 70"]),
        ("decode", ["decode step, 1 × 70", "decode step, 3 × 70"]),
        ("throughput", ["6 × 20 → 5"]),
        ("mixed", ["mixed step over its parts"]),
        ("sampling", ["filters", "penalties", "logprobs"]),
    ],
)
def test_each_group_gives_its_rows(bench, group, names):
    rows = bench.groups()[group]()
    assert [row.name for row in rows] == names
    assert all(row.all for row in rows)
    assert bench._engine.stats().num_free_pages == TINY.num_pages
    bench._engine.check()


def test_no_prefix_is_found_in_any_row(bench):
    assert bench._engine.stats().num_prefix_hits == 0


def test_every_row_of_the_tables_is_held_against_something():
    names = {f"first token, {length}" for length in FULL.first}
    names |= {f"prefill {number} × {length}" for number, length in FULL.prefill}
    names |= {f"decode step, {batch} × {context}" for batch, context in FULL.decode}
    names |= {f"{FULL.throughput[0]} × {FULL.throughput[1]} → {FULL.throughput[2]}", "start to ready"}
    assert PEERS["llama-3.1-8b"].keys() == names
    assert PEERS["llama-3.2-1b"].keys() == names - {"start to ready"}
    assert not BOUNDS.keys() & names


def test_pages_and_seats_suffice_for_the_largest_row():
    assert FULL.num_rows == 512
    assert FULL.num_pages >= 512 * 21
