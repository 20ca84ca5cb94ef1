import pytest

from benchmarks.engine.peer import Peer
from benchmarks.engine.profile import Profile
from benchmarks.engine.report import kernel_table, table, verdict
from benchmarks.engine.rows import Row

MS = Peer(vllm=5.0, limit=3.5, aim=4.2)
RATE = Peer(vllm=41_300, limit=52_400, aim=43_000)


@pytest.mark.parametrize(("value", "words"), [(4.2, "ok"), (4.3, "aim missed"), (5.1, "BEHIND vLLM")])
def test_times_are_better_below(value, words):
    assert verdict(Row("decode step", "ms", value, [value]), MS) == words


@pytest.mark.parametrize(("value", "words"), [(43_000, "ok"), (42_000, "aim missed"), (41_000, "BEHIND vLLM")])
def test_rates_are_better_above(value, words):
    assert verdict(Row("prefill", "tok/s", value, [value]), RATE) == words


@pytest.mark.parametrize(("value", "words"), [(2.9, "ok"), (3.1, "MISSED")])
def test_what_nobody_else_does_has_a_bound(value, words):
    assert verdict(Row("filters", "%", value, [value]), None) == words


def test_the_table_has_all_columns():
    row = Row("decode step, 1 × 1024", "ms", 4.1, [4.1], steady_ms=4.05, profile=Profile(4.0, 3.9, ()))
    lines = table([row], {row.name: MS}).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        row.name, "4.1 ms", "4.05 ms", "4 ms", "5", "3.5", "4.2", "ok",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_kernels_of_profiled_rows_are_listed():
    row = Row("decode step", "ms", 4.1, [4.1], profile=Profile(4.0, 3.9, (("gemm", 32.0, 2.5),)))
    assert kernel_table([row, Row("other", "ms", 1.0, [1.0])]).splitlines() == [
        "decode step: 4.000 ms, 3.900 of it in kernels",
        "     2.5000 ms    32.0 × gemm",
    ]
