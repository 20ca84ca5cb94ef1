import dataclasses

import pytest

from shared.policy.idle_capacity import leaves_others_alone
from shared.policy.placement import Chosen, Rules
from shared.policy.profile import SpeedProfile
from shared.policy.views import ClusterView
from shared.wire.explanation import Explanation
from tests.unit.shared.policy.views import a_worker

RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1)
PROFILE = SpeedProfile(base_s=0.01, row_s=0.001, context_s=1e-6, token_s=1e-5, pair_s=0.0)


def may_start(*, prefill_s=0.1, num_pages=10, quiet_s=0.0, local=False, queued_s=0.0, **decode):
    prefiller = a_worker(0, queued_prefill_s=queued_s)
    decoder = a_worker(1, **{"profile": PROFILE, "max_running": 64, "num_pages": 100, **decode})
    if local:
        prefiller = decoder = dataclasses.replace(decoder, queued_prefill_s=queued_s)
    chosen = Chosen(prefiller.ref, decoder.ref, 0, num_pages, prefill_s, None, lambda: Explanation("", 0))
    view = ClusterView(() if local else (prefiller,), (decoder,))
    return leaves_others_alone(chosen, view, RULES, quiet_s=quiet_s)


def test_what_leaves_room_and_time_may_start():
    assert may_start()
    assert may_start(local=True)


def test_tokens_of_others_must_stay_in_time():
    assert may_start(num_credits=30)
    assert not may_start(num_credits=30, num_context_tokens=60_000)
    assert may_start(num_credits=30, num_context_tokens=60_000, profile=None), "as an H200 does it"


@pytest.mark.parametrize("taken", [{"num_credit_pages": 70}, {"max_running": 8, "num_credits": 6}])
def test_pages_and_places_stay_free_for_who_comes_next(taken):
    assert not may_start(**{"num_credits": 3, **taken})


def test_where_nobody_is_it_may_take_all():
    assert may_start(num_pages=100)
    assert may_start(max_running=1)
    assert not may_start(num_pages=100, num_credits=1)


def test_a_worker_too_slow_for_the_goal_takes_one_at_a_time():
    slow = dataclasses.replace(PROFILE, base_s=0.3)
    assert may_start(profile=slow)
    assert not may_start(profile=slow, num_credits=1)


@pytest.mark.parametrize("local", [False, True])
def test_a_prompt_that_came_next_would_not_wait_long(local):
    assert may_start(local=local, queued_s=0.5, prefill_s=0.5)
    assert not may_start(local=local, queued_s=0.5, prefill_s=0.51)


def test_a_long_prompt_starts_when_nobody_came_for_as_long():
    assert not may_start(prefill_s=10.0, quiet_s=9.0)
    assert may_start(prefill_s=10.0, quiet_s=10.0)
    assert not may_start(prefill_s=10.0, quiet_s=60.0, queued_s=0.1)


def test_workers_that_are_gone_take_nothing():
    decoder = a_worker(1)
    chosen = Chosen(a_worker(0).ref, decoder.ref, 1, 1, 0.0, None, lambda: Explanation("", 0))
    assert not leaves_others_alone(chosen, ClusterView((), (decoder,)), RULES, quiet_s=0.0)
    assert not leaves_others_alone(chosen, ClusterView((a_worker(0),), ()), RULES, quiet_s=0.0)
