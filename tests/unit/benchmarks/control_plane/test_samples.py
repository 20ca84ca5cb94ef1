import pytest

from benchmarks.control_plane.loads import Load
from benchmarks.control_plane.samples import (
    Sample,
    added,
    distribution_ms,
    hops,
    mean_in_flight,
    served_itl_mean_ms,
    summary,
    tokens_in_window,
)

LOAD = Load(name="2", streams=2, rate_per_s=1.0, lead_s=1.0, seconds=4.0, trail_s=1.0, pause_s=0.0, first_index=0)


def sample(at_s=1.0, late_s=0.0, ttft_s=0.1, gaps_s=(0.2, 0.1), output_tokens=3, **fields) -> Sample:
    return Sample(at_s, at_s + late_s, at_s + ttft_s, gaps_s, output_tokens, **fields)


def test_distribution_is_in_milliseconds():
    assert distribution_ms([0.001, 0.003, 0.002]) == {
        "count": 3,
        "mean": 2.0,
        "p50": 2.0,
        "p90": 2.8,
        "p99": 2.98,
        "max": 3.0,
    }
    assert distribution_ms([]) is None


def test_only_requests_of_the_middle_count():
    outside = [sample(at_s=0.5, ttft_s=9.0), sample(at_s=5.0, ttft_s=9.0)]
    figures = summary([*outside, sample(ttft_s=0.1), sample(at_s=4.9, ttft_s=0.3)], LOAD)
    assert figures["requests"] == 2
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)


def test_ttft_counts_from_the_intended_time_and_from_the_send():
    figures = summary([sample(late_s=0.04, ttft_s=0.1)], LOAD)
    assert figures["ttft_ms"]["mean"] == pytest.approx(100)
    assert figures["ttft_from_send_ms"]["mean"] == pytest.approx(60)
    assert figures["send_lateness_ms"]["mean"] == pytest.approx(40)


def test_mean_itl_is_over_gaps_between_tokens_even_where_pieces_hold_several():
    figures = summary([sample(gaps_s=(0.4,), output_tokens=5), sample(gaps_s=(0.1, 0.1), output_tokens=3)], LOAD)
    assert figures["itl_mean_ms"] == pytest.approx(1000 * (0.4 + 0.2) / (4 + 2))
    assert figures["gap_ms"]["max"] == pytest.approx(400)
    assert figures["tokens_per_piece"] == pytest.approx((2.5 + 1.0) / 2)


def test_an_answer_of_one_token_has_no_gaps():
    figures = summary([sample(gaps_s=(), output_tokens=1)], LOAD)
    assert figures["itl_mean_ms"] is None
    assert figures["gap_ms"] is None


def test_tokens_in_the_window_belong_to_whoever():
    early = sample(at_s=0.5, ttft_s=0.4, gaps_s=(0.2, 0.1))  # tokens at 0.9, 1.1, 1.2
    late = sample(at_s=4.7, ttft_s=0.2, gaps_s=(0.2, 0.1))  # tokens at 4.9, 5.1, 5.2
    assert tokens_in_window([early, late], LOAD) == pytest.approx(3)


def test_streams_in_flight_are_averaged_over_the_window():
    inside = Sample(2.0, 2.0, 3.0, (1.0,), 2)  # 2 s of 4
    across = Sample(0.0, 0.0, 1.0, (9.0,), 2)  # all 4 s
    outside = Sample(5.5, 5.5, 6.0, (1.0,), 2)
    assert mean_in_flight([inside, across, outside], LOAD) == pytest.approx(1.5)


def test_hops_are_differences_of_stamps_that_are_there():
    stamps = {"sent": 10.0, "accepted": 10.002, "first_token": 10.05, "first_piece": 10.054, "finished": 10.2}
    found = hops([sample(stamps=stamps), sample(at_s=0.0, stamps=stamps | {"accepted": 19.0})], LOAD)
    assert found.keys() == {"sent → accepted", "first_token → first_piece"}
    assert found["sent → accepted"]["p50"] == pytest.approx(2.0)
    assert found["first_token → first_piece"]["p50"] == pytest.approx(4.0)


def test_the_servers_time_between_tokens_begins_at_the_second_token():
    stamps = {"decoding": 1.0, "finished": 1.9}
    assert served_itl_mean_ms([sample(output_tokens=11, stamps=stamps)], LOAD) == pytest.approx(100)
    assert served_itl_mean_ms([sample(output_tokens=2, stamps=stamps)], LOAD) is None
    assert served_itl_mean_ms([sample()], LOAD) is None


def test_added_is_path_less_bare():
    bare = {"itl_mean_ms": 8.0, "ttft_ms": {"p50": 10.0, "p99": 20.0}, "output_tokens_per_s": 200.0}
    path = {"itl_mean_ms": 8.4, "ttft_ms": {"p50": 13.5, "p99": 32.0}, "output_tokens_per_s": 190.0}
    assert added(path, bare, 7.0) == {
        "ttft_p50_ms": 3.5,
        "ttft_p99_ms": 12.0,
        "itl_mean_percent_of_bare": 5.0,
        "itl_mean_percent_of_bare_decode": 20.0,
        "throughput_percent": -5.0,
    }


def test_added_says_nothing_of_what_was_not_measured():
    nothing = {"itl_mean_ms": None, "ttft_ms": None, "output_tokens_per_s": 0.0}
    assert set(added(nothing, nothing, 7.0).values()) == {None}
