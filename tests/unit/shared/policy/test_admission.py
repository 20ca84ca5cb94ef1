import pytest

from shared.policy.admission import (
    BacklogReport,
    Budget,
    Verdict,
    WaitingLine,
    estimated_tokens,
    max_wait_s,
    predicted_wait_s,
)


def test_where_nobody_had_to_wait_lately_nothing_is_predicted():
    assert predicted_wait_s([], 1000) == 0
    assert predicted_wait_s([BacklogReport(50, 0.2, None), BacklogReport(0, 0.0, None)], 1000) == 0


def test_all_lines_and_what_they_do_not_count_yet_over_all_rates():
    backlogs = [BacklogReport(30, 5.0, 2.0), BacklogReport(10, 4.0, None), BacklogReport(20, 9.0, 3.0)]
    assert predicted_wait_s(backlogs, 15) == pytest.approx(75 / 5)


def test_who_waited_long_behind_a_longer_line_says_nothing_of_a_line_that_moves():
    assert predicted_wait_s([BacklogReport(10, 60.0, 5.0)], 0) == pytest.approx(2)


def test_where_nothing_is_placed_one_waits_as_long_as_the_first_in_line_at_least():
    assert predicted_wait_s([BacklogReport(1, 45.0, 0.0)], 0) == 45
    assert predicted_wait_s([BacklogReport(8, 1.0, 0.0)], 1) == 90


def test_half_of_a_requests_time_is_for_running():
    assert max_wait_s(600, 30) == 30
    assert max_wait_s(10, 30) == 5


def test_a_rate_is_known_only_while_somebody_always_waits():
    line = WaitingLine(0.0)
    for beat in range(1, 5):
        line.join(3)
        for _ in range(3):
            line.place()
        assert line.beat(beat / 2) is None, "demand, and not capacity"
    line.join(10)
    line.place()
    assert line.beat(2.5) is None, "the line was empty when it began"
    line.place()
    line.place()
    assert line.beat(3.0) == pytest.approx(4.0)
    line.place()
    assert line.beat(3.5) == pytest.approx(3.0)
    assert line.num_waiting == 6
    line.leave(6)
    line.join(1)
    assert line.beat(4.0) == pytest.approx(3.0), "what was empty in between does not count"


def test_a_line_that_stands_still_has_rate_0_and_old_beats_are_forgotten():
    line = WaitingLine(0.0)
    line.join(100)
    line.beat(0.5)
    for beat in range(2, 22):
        line.place()
        rate = line.beat(beat / 2)
    assert rate == pytest.approx(2.0)
    for beat in range(22, 44):
        rate = line.beat(beat / 2)
    assert rate == 0.0
    line.leave(80)
    for beat in range(44, 70):
        rate = line.beat(beat / 2)
    assert rate is None


def test_a_line_that_was_placed_to_its_last_one_tells_of_no_limit():
    line = WaitingLine(0.0)
    line.join(4)
    for beat in range(1, 22):
        rate = line.beat(beat / 2)
    assert rate == 0.0, "nobody to place them on"
    for _ in range(4):
        line.place()
    assert line.beat(11.0) is None


def test_a_beat_right_behind_another_does_not_count():
    line = WaitingLine(0.0)
    line.join(5)
    line.beat(0.5)
    line.place()
    line.beat(0.500001)
    assert line.beat(1.0) == pytest.approx(2.0)


def test_a_cost_is_guessed_from_the_body_and_the_longest_answer():
    assert estimated_tokens(401, 50, 2) == 101 + 100
    assert estimated_tokens(0, None, 1) == 256


def test_a_client_is_told_where_it_stands():
    verdict = Verdict("tokens", 1.0, {"tokens": Budget(100, 7, 0.25)})
    assert verdict.headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "250ms",
    }
