from dataclasses import replace

import pytest

from shared.policy.admission import (
    NUM_USUAL,
    BacklogReport,
    Forecast,
    Outlook,
    Usual,
    WaitingLine,
    max_wait_s,
    predicted_wait_s,
)
from shared.policy.profile import SpeedProfile
from shared.policy.views import ClusterView
from shared.request import Priority
from tests.unit.shared.policy.views import a_worker

INTERACTIVE, STANDARD, BATCH = Priority


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
    assert predicted_wait_s([BacklogReport(8, 20.0, 0.0)], 1) == 90


def test_a_line_that_has_stood_still_for_a_moment_is_no_outage():
    """Some requests behind one large prompt: nothing was placed in the half second since they came."""
    assert predicted_wait_s([BacklogReport(4, 0.5, 0.0)], 1) == 2.5
    assert a_forecast(BacklogReport(4, 0.5, 0.0)).check(20.0, 30, STANDARD) is None


def test_half_of_a_requests_time_is_for_running():
    assert max_wait_s(600, 30) == 30
    assert max_wait_s(10, 30) == 5


PROFILE = SpeedProfile(base_s=0.01, row_s=0.001, context_s=0.0, token_s=1e-4, pair_s=0.0)
USUAL = Usual(num_pages=10.0, num_new_tokens=100.0, prefill_s=0.05, num_seen=NUM_USUAL)


def outlook_of(view, usual=USUAL, *, local_prefill=False):
    return Outlook.of(view, usual, local_prefill=local_prefill)


def an_outlook(**changes):
    outlook = Outlook(
        num_free=20.0, ends_per_s=5.0, prefill_queue_s=0.0, token_s=0.03, idle_token_s=0.01, num_new_tokens=100.0
    )
    return replace(outlook, **changes)


def a_forecast(*backlogs, since=0, priority=STANDARD, max_new_tokens=None):
    return Forecast.of(backlogs, since, priority, max_new_tokens)


def test_an_outlook_counts_room_and_pace_by_the_scarcer_of_pages_and_places():
    decode = (
        a_worker(1, profile=PROFILE, max_running=8, num_credits=6, num_credit_pages=30, num_pages=100),
        a_worker(2, profile=PROFILE, max_running=8, num_credits=2, num_credit_pages=80, num_pages=100),
        a_worker(3, profile=None, takes_work=False),
    )
    prefill = (a_worker(4, queued_prefill_s=0.7), a_worker(5, queued_prefill_s=0.3))
    outlook = outlook_of(ClusterView(prefill, decode))
    assert outlook.num_free == pytest.approx(2 + 2)
    assert outlook.ends_per_s == pytest.approx(8 / 1.8 + 4 / 1.4)
    assert (outlook.prefill_queue_s, outlook.num_new_tokens) == (0.3, 100)
    assert (outlook.token_s, outlook.idle_token_s) == (pytest.approx(0.013), pytest.approx(0.011))
    slow = replace(USUAL, prefill_s=0.5)
    assert outlook_of(ClusterView(prefill, decode), slow).ends_per_s == pytest.approx(4), "prefill is the scarcer"


def test_there_is_no_outlook_without_speeds():
    known, unknown = a_worker(1, profile=PROFILE), a_worker(2, profile=None)
    assert outlook_of(ClusterView((), (known, unknown))) is None
    assert outlook_of(ClusterView((known,), ())) is None
    assert outlook_of(ClusterView((), (known,))) is not None


@pytest.mark.parametrize("profile", [SpeedProfile(0.0, 0.0, 0.0, 1e-4, 0.0), SpeedProfile(0.0, 0.01, 0.0, 1e-4, 0.0)])
@pytest.mark.parametrize("taken", [0, 3, 8])
def test_speeds_by_which_steps_take_no_time_end_no_ingest(profile, taken):
    worker = a_worker(1, profile=profile, max_running=8, num_credits=taken, num_credit_pages=taken, num_pages=9)
    outlook = outlook_of(ClusterView((), (worker,)))
    assert (outlook is None) == (profile.row_s == 0)


def test_what_is_usual_follows_what_is_placed():
    usual = Usual(10.0, 100.0, 0.05)
    for _ in range(200):
        usual = usual.with_one_more(Usual(40.0, 300.0, 1.0))
    assert usual.num_seen == 201
    assert (usual.num_pages, usual.num_new_tokens, usual.prefill_s) == pytest.approx((40, 300, 1), rel=0.01)


def test_a_rush_waits_for_what_will_end_in_decode():
    """Nobody waits yet, so nothing is known of the line's pace."""
    calm = BacklogReport(0, 0.0, None, outlook=an_outlook())
    assert a_forecast(calm, since=20).wait_s == 0
    assert a_forecast(calm, since=70).wait_s == pytest.approx(50 / 5)
    assert a_forecast(calm, replace(calm, outlook=an_outlook(num_free=10.0)), since=70).wait_s == pytest.approx(12)
    moving = BacklogReport(40, 3.0, 10.0, outlook=an_outlook())
    assert a_forecast(moving, since=20).wait_s == pytest.approx(6), "the line's own pace, where there is one"


def test_who_comes_to_a_long_prefill_queue_waits_for_it_too():
    queued = BacklogReport(0, 0.0, None, outlook=an_outlook(prefill_queue_s=7.0))
    assert a_forecast(queued).wait_s == 7
    assert a_forecast(queued, priority=BATCH).wait_s == 0


def test_an_answer_that_decode_would_make_too_late_is_refused_though_nobody_waits():
    loaded = BacklogReport(0, 0.0, None, outlook=an_outlook())
    whole, short = a_forecast(loaded), a_forecast(loaded, max_new_tokens=40)
    assert (whole.run_s, whole.idle_run_s, short.run_s) == pytest.approx((3.0, 1.0, 1.2))
    refusal = whole.check(2.0, 30, STANDARD)
    assert refusal.excess_s == pytest.approx(1)
    assert refusal.told == "a usual answer would take 3 s beside those that run now; the request has 2 s"
    assert short.check(2.0, 30, STANDARD) is None
    assert whole.check(0.9, 30, STANDARD) is None, "idle workers would be too slow as well: no matter of load"
    assert whole.check(1.9, 30, STANDARD) is None, "nor where they would need most of the time"


def test_an_answer_that_nobody_could_make_in_time_is_not_refused_for_the_shortest_wait():
    begun = BacklogReport(0, 0.0, None, outlook=an_outlook(prefill_queue_s=0.2))
    assert a_forecast(begun).check(0.9, 30, STANDARD) is None
    assert a_forecast(begun).check(0.3, 30, STANDARD).told == (
        "a request would wait 0.2 s before it runs; this one may wait 0.15 s, with 0.3 s for all of it"
    )


def test_of_the_first_placements_it_is_not_known_what_is_usual():
    """A rush behind one large prompt, on workers that are idle otherwise."""
    view = ClusterView((a_worker(4),), (a_worker(1, profile=PROFILE, max_running=64, num_pages=2000),))
    large, small = Usual(1500.0, 256.0, 10.0), Usual(3.0, 100.0, 0.01)
    usual = large
    assert outlook_of(view, usual) is None
    for _ in range(NUM_USUAL):
        usual = usual.with_one_more(small)
    rush = BacklogReport(0, 0.0, None, outlook=outlook_of(view, usual))
    assert a_forecast(rush, since=60).check(60.0, 30, STANDARD) is None
    for _ in range(300):
        usual = usual.with_one_more(small)
    again = replace(rush, outlook=outlook_of(view, usual.with_one_more(large)))
    assert a_forecast(again, since=60).check(60.0, 30, STANDARD) is None


def test_a_prompt_does_not_wait_for_prefill_where_decode_may_compute_it():
    view = ClusterView((a_worker(4, queued_prefill_s=60.0),), (a_worker(1, profile=PROFILE, queued_prefill_s=0.5),))
    assert outlook_of(view).prefill_queue_s == 60
    assert outlook_of(view, local_prefill=True).prefill_queue_s == 0.5


def test_a_slow_answer_leaves_less_time_to_wait():
    assert max_wait_s(10, 30, run_s=2) == 5
    assert max_wait_s(10, 30, run_s=8) == pytest.approx(2)
    assert max_wait_s(10, 30, run_s=80) == 0


def test_interactive_requests_do_not_wait_behind_standard_ones():
    backlogs = [BacklogReport(30, 5.0, 2.0, num_standard=20)]
    assert predicted_wait_s(backlogs, 0, INTERACTIVE) == pytest.approx(5)
    assert predicted_wait_s(backlogs, 0, STANDARD) == pytest.approx(15)


def test_batch_is_refused_only_if_those_before_it_have_waited_longer_than_its_deadline_allows():
    backlogs = [BacklogReport(1000, 25.0, 2.0, oldest_batch_wait_s=1000.0), BacklogReport(0, 0.0, None)]
    forecast = a_forecast(*backlogs, priority=BATCH)
    assert forecast.wait_s == 1000
    assert forecast.check(3600, 30, BATCH) is None
    assert forecast.check(1800, 30, BATCH) is not None
    assert a_forecast(*backlogs).check(3600, 30, STANDARD) is not None


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
    assert (rate, line.in_vain_s) == (pytest.approx(2.0), 0)
    for beat in range(22, 44):
        rate = line.beat(beat / 2)
    assert (rate, line.in_vain_s) == (0.0, pytest.approx(10, abs=0.6))
    line.leave(80)
    for beat in range(44, 70):
        rate = line.beat(beat / 2)
    assert rate is None


def test_a_line_that_all_have_left_in_vain_tells_of_no_limit():
    line = WaitingLine(0.0)
    line.join(4)
    for beat in range(1, 22):
        rate = line.beat(beat / 2)
    assert (rate, line.in_vain_s) == (0.0, pytest.approx(10, abs=0.6))
    line.leave(4)
    assert (line.beat(11.0), line.in_vain_s) == (None, 0.0), "nobody waits, and nobody is refused for it"


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
