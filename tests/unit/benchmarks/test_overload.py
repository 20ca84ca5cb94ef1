import pytest

from benchmarks.overload import Samples, fate, goodput, growth, memory, problems, read_queues, spread, summary, told
from tests.faults.capture import Attempt, Capture, Manner, Outcome, Received


def capture(sent_s, ended_s, outcome=Outcome.DONE, status=200):
    events = [Received(sent_s + 0.5, "r:0.0", "{}")] if outcome is Outcome.DONE else []
    attempts = [Attempt(sent_s, "post", "http://edge", status, ended_s)]
    return Capture(
        "c",
        Manner.STREAM,
        sent_s,
        10.0,
        events=events,
        attempts=attempts,
        ended_s=ended_s,
        outcome=outcome,
        status=status,
    )


CAPTURES = [
    capture(0.0, 4.0),
    capture(1.0, 10.5),
    capture(1.0, 12.0),
    capture(2.0, 2.1, Outcome.REFUSED, 503),
    capture(2.0, 2.2, Outcome.REFUSED, 429),
    capture(2.0, 5.0, Outcome.ERROR, 503),
    capture(3.0, 13.5, Outcome.ERROR, 504),
    capture(3.0, 43.0, Outcome.NO_END, None),
]


def test_fates():
    assert [fate(each) for each in CAPTURES] == [
        *("in time", "in time", "late", "refused 503", "refused 429", "refused 503", "error", "no end")
    ]


def test_goodput_counts_good_ends_in_the_window():
    assert goodput(CAPTURES, 0.0, 10.0) == 0.1
    assert goodput(CAPTURES, 0.0, 20.0) == 0.1
    assert goodput(CAPTURES, 10.0, 20.0) == 0.1


def test_a_summary():
    seen = summary(CAPTURES, 0.0, 20.0, peak=0.1)
    assert seen["offered"] == 8
    assert seen["fates"] == {"in time": 2, "late": 1, "refused 503": 2, "refused 429": 1, "error": 1, "no end": 1}
    assert seen["num_not_refused"] == 5
    assert seen["refusal_s"] == {"p50": 0.2, "p99": 3.0, "max": 3.0}
    assert seen["first_event_s"] == {"p50": 0.5, "p99": 0.5, "max": 0.5}
    assert (seen["share_of_peak"], seen["share_of_peak_by_10_s"]) == (1.0, [1.0, 1.0])


def test_a_spread_of_nothing():
    assert spread([]) is None


def test_memory_is_looked_at_from_when_it_has_settled():
    samples = Samples([0.0, 60.0, 120.0], {"edge-0": [10.0, 50.0, 52.0]})
    assert memory(samples, 30.0) == {
        "edge-0": {"first_mib": 50.0, "last_mib": 52.0, "max_mib": 52.0, "mib_per_minute": 2.0}
    }
    assert growth([0.0], [5.0])["mib_per_minute"] == 0.0


def test_samples_are_told_from_the_first_on():
    samples = Samples([1000.0, 1002.04], {"edge-0": [10.04, 50.06]}, {"q": [1, 2]})
    assert told(samples) == {"at_s": [0.0, 2.0], "rss_mib": {"edge-0": [10.0, 50.1]}, "queues": {"q": [1, 2]}}


GOOD = {"fates": {"in time": 5, "refused 503": 3}, "share_of_peak": 0.95, "refusal_s": {"p99": 0.1}}
FLAT = {"edge-0": {"first_mib": 50.0, "last_mib": 52.0}, "kafka": {"first_mib": 50.0, "last_mib": 400.0}}


@pytest.mark.parametrize(
    ("overload", "grown", "said"),
    [
        ({"fates": {"in time": 5, "late": 1}}, {}, "neither answered in time nor refused: {'late': 1}"),
        ({"share_of_peak": 0.89}, {}, "goodput was 89% of the peak"),
        ({"refusal_s": {"p99": 1.1}}, {}, "refusals took up to 1.1 s"),
        ({}, {"edge-0": {"first_mib": 50.0, "last_mib": 60.0}}, "edge-0 grew from 50.0 to 60.0 MiB"),
    ],
)
def test_problems(overload, grown, said):
    (problem,) = problems(GOOD | overload, FLAT | grown, [])
    assert said in problem


def test_no_problems():
    assert problems(GOOD, FLAT, []) == []
    assert problems(GOOD, FLAT, ["r1: was lost"]) == ["r1: was lost"]
    assert problems(GOOD | {"refusal_s": None}, FLAT, []) == []


def test_queues_of_a_page():
    page = """# HELP baton_backlog_requests x
baton_backlog_requests 7.0
vllm:num_requests_running{model_name="fake"} 3.0
vllm:num_requests_waiting{model_name="fake"} 2.0
other 5.0
"""
    assert read_queues(page) == {
        "baton_backlog_requests": 7,
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
    }
