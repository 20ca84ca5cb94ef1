"""Placement: who has room, who is least loaded, who holds the prefix."""

import dataclasses

from shared.blocks import BlockHash
from shared.policy.holders import Holders
from shared.policy.placement import Chosen, NeverFits, NoRoomNow, Rules, capacity_tokens, place
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import Incarnation, RequestId, WorkerRef

RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1, local_prefill=False)
BLOCKS = tuple(BlockHash(bytes([n]) * 16) for n in range(8))


def a_worker(slot, **changes):
    view = WorkerView(
        ref=WorkerRef(slot, Incarnation(f"w{slot}")),
        model="m",
        num_pages=100,
        num_credit_pages=0,
        num_credits=0,
        max_running=8,
        max_context=4096,
        layout_fingerprint="l",
        max_batch_tokens=8192,
        page_bytes=64 * 131072,
        profile=None,
        links={},
        queued_prefill_s=0.0,
        num_context_tokens=0,
        takes_work=True,
    )
    return dataclasses.replace(view, **changes)


def a_request(num_tokens=512, max_new_tokens=64):
    likely = min(max_new_tokens, 256)
    return RequestView(RequestId("r"), 0, "m", num_tokens, max_new_tokens, likely, likely, BLOCKS[: num_tokens // 64])


def decide(prefill, decode, request=None, holders=None, tie_break=0):
    return place(
        request or a_request(),
        ClusterView(tuple(prefill), tuple(decode)),
        holders or Holders(),
        RULES,
        tie_break=tie_break,
    )


def slots(decision):
    assert isinstance(decision, Chosen)
    return decision.prefill.slot, decision.decode.slot


def test_the_least_loaded_are_chosen():
    prefill = [a_worker(0, num_credits=1, queued_prefill_s=0.1), a_worker(1)]
    decode = [a_worker(2, num_credits=3), a_worker(3, num_credits=2)]
    assert slots(decide(prefill, decode)) == (1, 3)


def test_credits_are_those_of_the_prompt_and_of_the_expected_answer():
    decision = decide([a_worker(0)], [a_worker(1)], a_request(num_tokens=65, max_new_tokens=2000))
    assert decision.num_prefill_pages == 2
    assert decision.num_decode_pages == -(-(65 + 256) // 64)


def test_a_held_prefix_outweighs_a_little_load():
    holders = Holders()
    holders.update(Incarnation("w0"), 0, BLOCKS[:6], ())
    prefill = [a_worker(0, num_credits=1, queued_prefill_s=0.004), a_worker(1)]
    assert slots(decide(prefill, [a_worker(2)], holders=holders)) == (0, 2)


def test_ties_are_spread():
    decode = [a_worker(1), a_worker(2), a_worker(3)]
    chosen = {slots(decide([a_worker(0)], decode, tie_break=number))[1] for number in range(3)}
    assert chosen == {1, 2, 3}


def test_full_leaving_and_foreign_workers_are_passed_over():
    full = a_worker(1, num_credit_pages=99)
    busy = a_worker(2, num_credits=8)
    leaving = a_worker(3, takes_work=False)
    other_model = a_worker(4, model="x")
    assert decide([a_worker(0)], [full, busy, leaving, other_model]) == NoRoomNow()


def test_kv_moves_only_between_equal_layouts():
    decode = [a_worker(2, layout_fingerprint="x"), a_worker(3, num_credits=1)]
    assert slots(decide([a_worker(0)], decode)) == (0, 3)
    assert decide([a_worker(0)], decode[:1]) == NoRoomNow()


def test_what_no_worker_could_ever_hold_is_told_with_the_limit():
    decision = decide([a_worker(0)], [a_worker(1, num_pages=4)], a_request(num_tokens=200, max_new_tokens=57))
    assert decision == NeverFits(256)


def test_capacity_is_unknown_while_a_role_is_missing():
    assert capacity_tokens("m", ClusterView((a_worker(0),), ())) is None
    assert capacity_tokens("m", ClusterView((a_worker(0),), (a_worker(1, max_context=128),))) == 128
    assert decide([a_worker(0)], []) == NoRoomNow()
