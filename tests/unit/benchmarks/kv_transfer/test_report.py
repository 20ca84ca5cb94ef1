import pytest

from benchmarks.kv_transfer.report import lines, percentile, pull_row, slowdown


def a_result(**changes):
    pull = pull_row(1024, 128 * 2**20, [0.5, 0.8, 2.0]) | {"equal": True, "phases_ms": {"wire": 0.4}, "timeline": []}
    return {
        "link": {
            "transport": "cuda_ipc",
            "speed": {"bytes_per_s": 3e11, "latency_s": 5e-5},
            "took_ms": 30.0,
            "warning": None,
        },
        "pulls": [pull],
        "together": pull_row(1024, 2**30, [3.0, 3.8]) | {"at_once": 8},
        "idle": {"source": 1.0, "puller": 2.0},
        "formats": [{"format": "int8", "share": 0.52, "pack_ms": 0.2, "unpack_ms": 0.3, "largest_error": 0.01}],
        "interference": [
            {"work": work, "stream": stream, "gb_per_s": 25.0} | slowdown([1.01, 1.01], [1.0, 1.0])
            for work, stream in (("decode", "none"), ("decode", "paced"), ("decode", "full"), ("prefill", "paced"))
        ],
    } | changes


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.9, 4), (0.25, 1), (1.0, 4)])
def test_a_percentile_is_one_of_the_values(share, expected):
    assert percentile([4, 1, 3, 2], share) == expected


def test_a_pull_goes_at_the_rate_of_its_median():
    row = pull_row(1024, 10**8, [1.0, 0.5, 2.0])
    assert (row["p50_ms"], row["p90_ms"], row["min_ms"], row["gb_per_s"]) == (1.0, 2.0, 0.5, 100.0)


def test_a_slowdown_is_of_medians_and_of_means():
    slower = slowdown([2.0, 2.0, 5.0], [1.0, 1.0, 1.0])
    assert slower["median_percent"] == pytest.approx(100.0)
    assert slower["mean_percent"] == pytest.approx(200.0)


def test_aims_that_are_met_are_not_marked():
    assert "(!)" not in "\n".join(lines(a_result()))


@pytest.mark.parametrize(
    ("part", "missed"),
    [
        ("pulls", [a_result()["pulls"][0] | {"p50_ms": 1.01}]),
        ("together", a_result()["together"] | {"p50_ms": 3.91}),
        ("idle", {"source": 1.0, "puller": 5.1}),
        ("formats", [a_result()["formats"][0] | {"pack_ms": 0.26}]),
        ("interference", [a_result()["interference"][1] | {"mean_percent": 3.1}]),
        ("interference", [a_result()["interference"][2] | {"mean_percent": 30.1}]),
        ("interference", [a_result()["interference"][3] | {"mean_percent": 5.1}]),
    ],
)
def test_an_aim_that_is_missed_is_marked(part, missed):
    marked = [line for line in lines(a_result(**{part: missed})) if "(!)" in line]
    assert len(marked) == 1


def test_what_was_not_measured_is_left_out():
    told = "\n".join(lines({"idle": {"source": 1.0}}))
    assert told == "idle, % of a core: source 1.0"
