"""Each part of a cost, by numbers that can be checked by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policy import costs
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Incarnation, WorkerRef
from tests.unit.shared.policy.views import a_worker

PROFILE = SpeedProfile(base_s=1.0, row_s=0.5, context_s=0.25, token_s=0.01, pair_s=0.0)
LINK = LinkRate(latency_s=0.5, bytes_per_s=100.0)


def test_a_prefill_is_its_chunks_each_at_least_a_step():
    assert costs.prefill_s(PROFILE, 250, 0, 100) == pytest.approx(1 + 1 + 1)
    assert costs.prefill_s(PROFILE, 450, 0, 200) == pytest.approx(2 + 2 + 1)
    assert costs.prefill_s(PROFILE, 0, 64, 100) == 0


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 200))
def test_a_prefill_in_chunks_is_the_sum_of_prefills(num_new, num_before, chunk):
    profile = SpeedProfile(base_s=1.0, row_s=0.0, context_s=0.0, token_s=0.013, pair_s=1e-3)
    alone_s = sum(
        profile.prefill_s(min(chunk, num_new - start), num_before + start) for start in range(0, num_new, chunk)
    )
    assert costs.prefill_s(profile, num_new, num_before, chunk) == pytest.approx(alone_s)


def test_prompt_tokens_that_fit_into_a_step_stall_nobody():
    assert costs.local_stall_s(PROFILE, 100, 0, 100) == 0
    assert costs.local_stall_s(PROFILE, 450, 0, 200) == pytest.approx((2 - 1) + (2 - 1) + (1 - 1))
    assert costs.local_chunk(256, 56) == 200
    assert costs.local_chunk(64, 100) == 1


def test_a_pull_runs_beside_the_chunks_before_the_last():
    assert LINK.pull_s(1000) == 10.5
    assert LINK.pull_s(0) == 0
    assert costs.transfer_s(LINK, 1000, 200, before_last_s=0) == 10.5
    assert costs.transfer_s(LINK, 1000, 200, before_last_s=4) == 6.5
    assert costs.transfer_s(LINK, 1000, 200, before_last_s=9) == 2.5, "the last chunk's bytes are always waited for"
    assert costs.transfer_s(LINK, 100, 200, before_last_s=0) == 1.5
    assert costs.transfer_s(LINK, 0, 200, before_last_s=0) == 0


def test_a_goal_met_to_the_point_is_missed_half_the_time():
    assert [costs.loss(share) for share in (0, 0.5, 1, 2)] == [0, 0.5 + 1 / 65, 1.5, 2 + 64 / 65]


def test_strain_is_loss_up_to_its_steepest_point_and_straight_from_there():
    assert costs.strain(0.9) == costs.loss(0.9)
    assert costs.strain(costs.STEEPEST) == pytest.approx(costs.loss(costs.STEEPEST))
    slope = (costs.loss(costs.STEEPEST + 1e-6) - costs.loss(costs.STEEPEST - 1e-6)) / 2e-6
    assert costs.strain(3) - costs.strain(2) == pytest.approx(slope)
    assert slope == pytest.approx(costs.STEEPEST_SLOPE)


def test_rows_lose_as_many_times_what_one_loses():
    assert costs.added_loss(10, 0.5, 1.0) == pytest.approx(10 * (costs.strain(1) - costs.loss(0.5)))
    assert costs.added_loss(0, 0.5, 1.0) == costs.added_loss(10, 0.5, 0.5) == 0


def test_who_will_wait_for_room():
    full = a_worker(0, num_credits=4, num_pages=12, num_credit_pages=8)
    # Two places of two pages are free beside four rows: half a standard deviation.
    assert costs.price_of_stall([full], num_pages=2, goal_s=2) == pytest.approx(4 * 0.3085375 / 2)
    assert costs.price_of_stall([full] * 4, num_pages=2, goal_s=2) == pytest.approx(4 * 0.1586553 / 2), "a larger pool"
    taken = dataclasses.replace(full, num_credit_pages=12)
    assert costs.price_of_stall([taken], num_pages=2, goal_s=2) == pytest.approx(4 * 0.5 / 2)
    assert costs.price_of_stall([dataclasses.replace(full, num_pages=200)], 2, 2) == pytest.approx(0, abs=1e-9)
    assert costs.price_of_stall([a_worker(0)], num_pages=2, goal_s=2) == 0
    assert costs.price_of_stall([], num_pages=2, goal_s=2) == 0


def test_who_is_small_knows_that_others_are_not():
    nearly_full = a_worker(0, num_credits=9, num_pages=100, num_credit_pages=95)
    small, as_large = (costs.price_of_stall([nearly_full], num_pages, 2) for num_pages in (1, 10))
    assert small == pytest.approx(as_large, rel=0.05)


def test_seats_are_room_too():
    no_seat = a_worker(0, num_credits=8, max_running=8)
    assert costs.price_of_stall([no_seat], num_pages=1, goal_s=2) == pytest.approx(8 * 0.5 / 2)
    assert costs.price_of_stall([dataclasses.replace(no_seat, max_running=80)], 1, 2) == pytest.approx(0, abs=1e-9)


def test_who_has_measured_nothing_is_taken_for_the_mean_of_those_who_have():
    def worker(slot, profile):
        return a_worker(slot, ref=WorkerRef(slot, Incarnation(f"w{slot}")), profile=profile)

    other = SpeedProfile(base_s=3.0, row_s=1.5, context_s=0.75, token_s=0.03, pair_s=2.0)
    mean = costs.mean_profile([worker(0, PROFILE), worker(1, None), worker(2, other)], [worker(3, other)])
    assert mean == SpeedProfile(base_s=2.0, row_s=1.0, context_s=0.5, token_s=0.02, pair_s=1.0)
    assert costs.mean_profile([worker(0, None)], [worker(1, None), worker(2, other)]) == other
    assert costs.mean_profile([worker(0, None)], [worker(1, None)]) == costs.UNMEASURED
