from dataclasses import replace

import pytest

from services.ingest.threshold import local_threshold
from shared.policy.placement import Rules, local_threshold_tokens
from shared.policy.views import ClusterView, WorkerView
from shared.request import Incarnation, WorkerRef

RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.03)
WORKER = WorkerView(
    ref=WorkerRef(0, Incarnation("w")),
    model="m",
    num_pages=1000,
    num_credit_pages=0,
    num_credits=1,
    max_running=8,
    max_context=32_000,
    layout_fingerprint="l",
    max_batch_tokens=2048,
    page_bytes=64 * 131_072,
    profile=None,
    links={},
    queued_prefill_s=0.0,
    num_context_tokens=2000,
    takes_work=True,
)


def a_worker(slot, **changes):
    return replace(WORKER, ref=WorkerRef(slot, Incarnation(f"w{slot}")), **changes)


def test_the_least_loaded_of_both_pools_are_compared():
    prefill = (a_worker(0, queued_prefill_s=0.5), a_worker(1, queued_prefill_s=0.1))
    decode = (a_worker(2, num_context_tokens=9000), a_worker(3, num_context_tokens=3000))
    told = local_threshold(ClusterView(prefill, decode), RULES, 200.0)
    assert told == local_threshold_tokens(prefill[1], decode[1], RULES, expected_new_tokens=200.0)
    assert 1 < told < 32_000


@pytest.mark.parametrize("other", [{"model": "x"}, {"layout_fingerprint": "x"}])
@pytest.mark.parametrize("local_prefill", [True, False])
def test_only_who_may_hand_over_to_the_decode_worker_is_compared_with_it(other, local_prefill):
    rules = replace(RULES, local_prefill=local_prefill)
    strange, busy, decode = a_worker(0, **other), a_worker(1, queued_prefill_s=0.3), a_worker(2)
    told = local_threshold(ClusterView((strange, busy), (decode,)), rules, 200.0)
    assert told == local_threshold_tokens(busy, decode, rules, expected_new_tokens=200.0)
    assert local_threshold(ClusterView((strange,), (decode,)), rules, 200.0) is None


def test_without_one_of_them_there_is_nothing_to_compare():
    assert local_threshold(ClusterView((), (WORKER,)), RULES, 200.0) is None
    assert local_threshold(ClusterView((WORKER,), ()), RULES, 200.0) is None
