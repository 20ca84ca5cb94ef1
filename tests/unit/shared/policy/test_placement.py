"""Placement: who has room, what each way costs, which is the least."""

import dataclasses
import re
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.costs import UNMEASURED
from shared.policy.holders import Holders
from shared.policy.placement import (
    Chosen,
    Fetch,
    NeverFits,
    NoRoomNow,
    Rules,
    capacity_tokens,
    local_threshold_tokens,
    place,
)
from shared.policy.profile import LinkRate, SpeedProfile
from shared.policy.scoring import NUM_DECODE_CANDIDATES
from shared.policy.views import ClusterView
from shared.request import Incarnation
from shared.wire.explanation import MAX_CANDIDATES
from tests.unit.shared.policy.views import BLOCKS, a_request, a_worker

RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1)
REMOTE = dataclasses.replace(RULES, local_prefill=False)
FAST = LinkRate(latency_s=3.5e-4, bytes_per_s=3.4e11)
LINKS = {Incarnation(f"w{slot}"): FAST for slot in range(64)}
ROUNDING_S = 1e-9
SLOW = SpeedProfile(base_s=8.6e-3, row_s=2.0e-5, context_s=6.0e-8, token_s=4.32e-5, pair_s=2.0e-9)


def decide(prefill, decode, request=None, holders=None, rules=REMOTE, tie_break=0):
    return place(
        request or a_request(),
        ClusterView(tuple(prefill), tuple(decode)),
        holders or Holders(),
        rules,
        tie_break=tie_break,
    )


def slots(decision):
    assert isinstance(decision, Chosen)
    return decision.prefill.slot, decision.decode.slot


def cost_of(*args, **kwargs):
    """The least cost there is."""
    decision = decide(*args, **kwargs)
    assert isinstance(decision, Chosen)
    return decision.explain().candidates[0].cost_s


def held(*counts, on_host=()):
    """Holders of whom worker n has the first `counts[n]` blocks, and then those up to `on_host[n]` on its host."""
    holders = Holders()
    for slot, count in enumerate(counts):
        upto = on_host[slot] if slot < len(on_host) else count
        holders.update(Incarnation(f"w{slot}"), 0, BLOCKS[:count], (), BLOCKS[count:upto])
    return holders


def test_the_least_loaded_are_chosen():
    prefill = [a_worker(0, queued_prefill_s=0.1), a_worker(1)]
    decode = [a_worker(2, num_credits=3, num_context_tokens=600), a_worker(3, num_credits=2, num_context_tokens=400)]
    assert slots(decide(prefill, decode)) == (1, 3)


def test_a_decode_worker_with_longer_contexts_is_slower():
    decode = [a_worker(2, num_credits=3, num_context_tokens=90_000), a_worker(3, num_credits=4, num_context_tokens=900)]
    assert slots(decide([a_worker(0)], decode)) == (0, 3)


def test_mixed_hardware_is_told_by_its_speeds():
    prefill, decode = [a_worker(0, profile=SLOW), a_worker(1)], [a_worker(2, profile=SLOW), a_worker(3)]
    assert slots(decide(prefill, decode)) == (1, 3)
    busy = [prefill[0], a_worker(1, queued_prefill_s=0.02)]
    assert slots(decide(busy, decode)) == (0, 3), "the slow one takes 11 ms more"


def test_an_idle_slow_worker_is_not_passed_over_for_many_fast_ones_with_queues():
    prefill = [a_worker(0, profile=SLOW), *(a_worker(slot, queued_prefill_s=0.075) for slot in range(1, 8))]
    assert slots(decide(prefill, [a_worker(8)], a_request(num_tokens=3000))) == (0, 8), "139 ms and 144"


def test_credits_are_those_of_the_prompt_and_of_the_answer_that_is_likely():
    decision = decide([a_worker(0)], [a_worker(1)], a_request(num_tokens=65, max_new_tokens=2000))
    assert decision.num_prefill_pages == 2
    assert decision.num_decode_pages == -(-(65 + 256) // 64)
    assert decision.prefill_s == max(UNMEASURED.base_s, 65 * UNMEASURED.token_s) + UNMEASURED.pair_s * 65 * 66 / 2


def test_a_held_prefix_outweighs_a_little_queue():
    request = a_request(num_tokens=512)  # 7 pages held leave 4.3 ms of 11.2; a second copy costs the rest
    for queue_s, expected in ((0.013, 0), (0.014, 1)):
        prefill = [a_worker(0, queued_prefill_s=queue_s), a_worker(1)]
        assert slots(decide(prefill, [a_worker(2)], request, held(8))) == (expected, 2)


def test_a_prefix_is_fetched_where_a_peer_has_it_and_the_queue_is_short():
    prefill = [a_worker(0, queued_prefill_s=1.0), a_worker(1, links=LINKS)]
    request = a_request(num_tokens=3000)
    decision = decide(prefill, [a_worker(2)], request, held(40))
    assert slots(decision) == (1, 2)
    assert decision.fetch == Fetch(prefill[0].ref, 40)
    assert decision.explain().candidates[0].fetched_pages == 40
    assert decision.explain().reason.endswith("; fetches from slot 0")
    unfetched = decide(prefill, [a_worker(2)], request, held(40), dataclasses.replace(REMOTE, fetch=False))
    assert unfetched.fetch is None
    assert unfetched.prefill_s > decision.prefill_s


@pytest.mark.parametrize(
    ("bytes_per_s", "fetched"),
    [(1e9, False), (1e10, True)],  # a page takes 8.4 or 0.84 ms, its tokens 1.4
)
def test_a_fetch_must_beat_computing(bytes_per_s, fetched):
    links = {Incarnation("w0"): LinkRate(0.0, bytes_per_s)}
    prefill = [a_worker(0, queued_prefill_s=1.0), a_worker(1, links=links)]
    decision = decide(prefill, [a_worker(2)], a_request(num_tokens=3000), held(40))
    assert (decision.fetch is not None) is fetched


def test_nothing_is_fetched_over_a_link_that_nobody_measured_nor_from_other_layouts_nor_from_who_leaves():
    request = a_request(num_tokens=3000)
    for source in (
        {"layout_fingerprint": "x"},
        {"takes_work": False},
        {"model": "x"},
    ):
        other = a_worker(0, queued_prefill_s=1.0, **source)
        assert decide([other, a_worker(1, links=LINKS)], [a_worker(2)], request, held(40)).fetch is None
    other = a_worker(0, queued_prefill_s=1.0)
    assert decide([other, a_worker(1)], [a_worker(2)], request, held(40)).fetch is None


def test_of_equal_sources_one_that_has_it_on_its_gpu_lends():
    prefill = [a_worker(n, queued_prefill_s=1.0) for n in range(2)] + [a_worker(2, links=LINKS)]
    decision = decide(prefill, [a_worker(3)], a_request(num_tokens=3000), held(10, 40, on_host=(40, 40)))
    assert decision.fetch == Fetch(prefill[1].ref, 40)


def test_the_history_on_a_decode_worker_is_a_source_too():
    decode = a_worker(1, num_credits=60, num_context_tokens=60_000)
    decision = decide([a_worker(0, links=LINKS)], [decode], a_request(num_tokens=3000), held(0, 40), RULES)
    assert decision.prefill.slot == 0
    assert decision.fetch == Fetch(decode.ref, 40)


def test_an_idle_decode_worker_computes_the_prompt_itself_and_one_with_rows_leaves_it_to_others():
    decision = decide([a_worker(0)], [a_worker(1)], rules=RULES)
    assert slots(decision) == (1, 1)
    assert decision.num_prefill_pages == 0
    assert decision.num_decode_pages == 9
    assert decision.explain().candidates[0].is_local
    busy = a_worker(1, num_credits=30, num_context_tokens=30_000)
    assert slots(decide([a_worker(0)], [busy], rules=RULES)) == (0, 1)
    queue = a_worker(0, queued_prefill_s=1.0)
    assert slots(decide([queue], [busy], rules=RULES)) == (1, 1)


def test_a_decode_worker_without_room_for_more_is_not_held_up_by_prompts():
    """Else whoever waits for room would wait longer."""
    request = a_request(num_tokens=3000)
    queue = a_worker(0, queued_prefill_s=0.8)
    roomy = a_worker(1, num_credits=30, num_context_tokens=3000)
    full = dataclasses.replace(roomy, num_credit_pages=roomy.num_pages - 48)
    assert slots(decide([queue], [roomy], request, rules=RULES)) == (1, 1)
    assert slots(decide([queue], [full], request, rules=RULES)) == (0, 1)


def test_a_turn_goes_where_its_history_is_unless_that_is_crowded():
    decode = [a_worker(0), a_worker(1), a_worker(2, num_credits=2, num_context_tokens=2000)]
    request = a_request(num_tokens=3000)
    assert slots(decide([], decode, request, held(0, 0, 46), RULES)) == (2, 2)
    crowd = dataclasses.replace(decode[2], num_credits=60, num_context_tokens=60_000, queued_prefill_s=0.2)
    assert slots(decide([], [*decode[:2], crowd], request, held(0, 0, 46), RULES))[0] != 2


def test_who_holds_most_is_tried_with_all_prefill_workers_though_others_are_less_loaded():
    slow = {Incarnation("w0"): LinkRate(0.0, 1e9)}
    decode = [a_worker(n, links=slow) for n in range(1, 6)]
    decode += [a_worker(6, links=slow, num_credits=1, num_context_tokens=1000)]
    assert slots(decide([a_worker(0)], decode, a_request(3000), held(*[0] * 6, 46))) == (0, 6)


def test_ties_are_spread():
    decode = [a_worker(1), a_worker(2), a_worker(3)]
    chosen = {slots(decide([a_worker(0)], decode, tie_break=number))[1] for number in range(3)}
    assert chosen == {1, 2, 3}


def test_full_leaving_and_foreign_workers_are_passed_over():
    full = a_worker(1, num_credit_pages=999)
    busy = a_worker(2, num_credits=64)
    leaving = a_worker(3, takes_work=False)
    other_model = a_worker(4, model="x")
    assert decide([a_worker(0)], [full, busy, leaving, other_model]) == NoRoomNow()
    assert decide([full, busy, leaving, other_model], [a_worker(5)]) == NoRoomNow()
    assert slots(decide([full, busy, leaving, other_model], [a_worker(5)], rules=RULES)) == (5, 5)


def test_kv_moves_only_between_equal_layouts():
    decode = [a_worker(2, layout_fingerprint="x"), a_worker(3, num_credits=1)]
    assert slots(decide([a_worker(0)], decode)) == (0, 3)
    assert decide([a_worker(0)], decode[:1]) == NoRoomNow()


def test_what_no_worker_could_ever_hold_is_told_with_the_limit():
    decision = decide([a_worker(0)], [a_worker(1, num_pages=4)], a_request(num_tokens=200, max_new_tokens=57))
    assert decision == NeverFits(256)


def test_a_worker_too_small_for_the_whole_answer_is_passed_over():
    small, large = a_worker(1, num_pages=16), a_worker(2, num_credits=8)
    request = a_request(num_tokens=500, max_new_tokens=1000)
    assert slots(decide([a_worker(0)], [small, large], request)) == (0, 2)


def test_capacity_is_unknown_while_a_role_is_missing():
    assert capacity_tokens("m", ClusterView((a_worker(0),), ())) is None
    assert capacity_tokens("m", ClusterView((a_worker(0),), (a_worker(1, max_context=128),))) == 128
    assert decide([a_worker(0)], []) == NoRoomNow()


def test_a_decision_explains_itself():
    prefill = [a_worker(0, queued_prefill_s=0.3), a_worker(1, profile=None)]
    decision = decide(prefill, [a_worker(2), a_worker(3, num_credits=9)], a_request(640), held(4), RULES)
    explanation = decision.explain()
    assert explanation.num_considered == 2 * 2 + 2
    assert len(explanation.candidates) == 5
    best = explanation.candidates[0]
    assert (best.prefill, best.decode) == slots(decision)
    assert [each.cost_s for each in explanation.candidates] == sorted(each.cost_s for each in explanation.candidates)
    by_slots = {(each.prefill, each.decode): each for each in explanation.candidates}
    assert by_slots[0, 2].queue_s == 0.3
    assert by_slots[0, 2].cached_pages == 4
    assert explanation.reason.endswith("; speeds not measured yet, but guessed: slots 1")
    assert re.match(r"costs [\d.e-]+ s less than the next best, mostly by ", explanation.reason)


def test_the_only_way_and_equal_ways():
    assert decide([a_worker(0)], [a_worker(1)]).explain().reason == "the only way there is room for"
    assert decide([a_worker(0)], [a_worker(1), a_worker(2)]).explain().reason == "costs as much as the next best"


def test_below_the_threshold_and_not_above_it_decode_computes_prompts_itself():
    prefill, decode = a_worker(0, queued_prefill_s=0.05), a_worker(1, num_credits=20, num_context_tokens=20_000)
    threshold = local_threshold_tokens(prefill, decode, RULES, expected_new_tokens=64.0)
    assert 64 < threshold < 2048
    for num_tokens, is_local in ((threshold - 1, True), (threshold, False)):
        request = dataclasses.replace(a_request(num_tokens), blocks=())
        assert (slots(decide([prefill], [decode], request, rules=RULES)) == (1, 1)) is is_local
    longer = dataclasses.replace(prefill, queued_prefill_s=0.5)
    assert local_threshold_tokens(longer, decode, RULES, expected_new_tokens=64.0) > threshold
    idle = a_worker(1)
    assert local_threshold_tokens(longer, idle, RULES, expected_new_tokens=64.0) == 64_000


def test_who_makes_few_tokens_stalls_others_over_many():
    """Rows lose what a prompt of theirs takes over their own answers, however short the one behind it is."""
    prefill = [a_worker(0, queued_prefill_s=0.2)]
    decode = [a_worker(1, num_credits=30, num_credit_pages=300, num_context_tokens=30_000)]

    def is_local(usual_new_tokens):
        short = dataclasses.replace(a_request(1024, max_new_tokens=16), usual_new_tokens=usual_new_tokens, blocks=())
        return slots(decide(prefill, decode, short, rules=RULES)) == (1, 1)

    assert is_local(400.0)
    assert not is_local(10.0)


loads = st.fixed_dictionaries(
    {
        "num_credits": st.integers(0, 64),
        "num_credit_pages": st.integers(0, 1000),
        "num_context_tokens": st.integers(0, 64_000),
        "queued_prefill_s": st.floats(0, 5),
        "profile": st.sampled_from([UNMEASURED, SLOW, None]),
        "links": st.sampled_from([{}, LINKS]),
        "takes_work": st.sampled_from([True, True, True, False]),
        "layout_fingerprint": st.sampled_from("llx"),
    }
)


@st.composite
def clusters(draw):
    changes = draw(st.lists(loads, min_size=2, max_size=7))
    workers = [a_worker(slot, **each) for slot, each in enumerate(changes)]
    num_prefill = draw(st.integers(1, len(workers) - 1))
    return workers[:num_prefill], workers[num_prefill:]


requests = st.builds(a_request, st.integers(1, 4000), st.integers(1, 300))
holdings = st.lists(st.integers(0, 60), max_size=7).map(lambda counts: held(*counts))


@given(clusters(), requests, holdings, st.integers(0, 100))
def test_nobody_gets_more_than_there_is_room_for(cluster, request, holders, tie_break):
    prefill, decode = cluster
    decision = decide(prefill, decode, request, holders, RULES, tie_break)
    if not isinstance(decision, Chosen):
        return
    workers = {worker.ref: worker for worker in (*prefill, *decode)}
    for ref, num_pages in (
        (decision.prefill, decision.num_prefill_pages),
        (decision.decode, decision.num_decode_pages),
    ):
        worker = workers[ref]
        assert worker.takes_work
        assert worker.num_credits < worker.max_running
        assert worker.num_credit_pages + num_pages <= worker.num_pages
    assert workers[decision.prefill].layout_fingerprint == workers[decision.decode].layout_fingerprint
    assert decision.num_decode_pages >= pages_for(request.num_tokens)
    if decision.fetch is not None:
        assert workers[decision.fetch.source].layout_fingerprint == workers[decision.prefill].layout_fingerprint
        assert decision.fetch.source != decision.prefill
        assert decision.fetch.num_pages * PAGE_TOKENS < request.num_tokens


@given(clusters(), requests, holdings, st.integers(0, 100), st.randoms())
def test_the_order_of_a_view_does_not_matter(cluster, request, holders, tie_break, rng):
    shuffled = [rng.sample(pool, len(pool)) for pool in cluster]
    one, other = (decide(*pools, request, holders, RULES, tie_break) for pools in (cluster, shuffled))
    assert one == other
    if isinstance(one, Chosen) and isinstance(other, Chosen):
        assert one.explain().brief() == other.explain().brief()


@given(clusters(), requests, holdings)
def test_the_cheapest_ways_are_told_of_and_the_first_is_picked(cluster, request, holders):
    """No bound leaves one out. Each pair's cost is what it costs where nobody else takes work. (Then nobody else lends
    either: no fetch.)"""
    prefill, decode = cluster
    assume(len(decode) <= NUM_DECODE_CANDIDATES)
    rules = dataclasses.replace(RULES, fetch=False)
    decision = decide(prefill, decode, request, holders, rules)

    def alone(first, second):
        def closed(worker):
            return dataclasses.replace(worker, takes_work=worker.takes_work and worker.ref in (first.ref, second.ref))

        local = dataclasses.replace(rules, local_prefill=first is second)
        return decide(map(closed, prefill), map(closed, decode), request, holders, local)

    pairs = [alone(*pair) for pair in product([*prefill], decode)] + [alone(worker, worker) for worker in decode]
    costs = [pair.explain().candidates[0].cost_s for pair in pairs if isinstance(pair, Chosen)]
    if isinstance(decision, Chosen):
        told = [each.cost_s for each in decision.explain().candidates]
        assert told == pytest.approx(sorted(costs)[:MAX_CANDIDATES])
    else:
        assert not costs


def one_pair(cluster, request, *, is_local):
    prefill, decode = cluster[0][0], cluster[1][0]
    prefill = dataclasses.replace(prefill, takes_work=True, layout_fingerprint="l", num_credits=0, num_credit_pages=0)
    decode = dataclasses.replace(decode, takes_work=True, layout_fingerprint="l", num_credits=decode.num_credits // 2)
    decode = dataclasses.replace(decode, num_credit_pages=decode.num_credit_pages // 2)
    assume(pages_for(request.num_tokens + request.max_new_tokens) <= 400)
    return ([] if is_local else [prefill]), [decode]


@given(clusters(), requests, st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_more_cached_pages_never_raise_a_pair_s_cost(cluster, request, cached, more, on_decode, is_local):
    prefill, decode = one_pair(cluster, request, is_local=is_local)
    rules = RULES if is_local else REMOTE
    computing = (decode if is_local else prefill)[0].ref.incarnation

    def cost(num_cached):
        holders = Holders()
        holders.update(computing, 0, BLOCKS[:num_cached], ())
        if not is_local:
            holders.update(decode[0].ref.incarnation, 0, BLOCKS[:on_decode], ())
        return cost_of(prefill, decode, request, holders, rules)

    assert cost(cached + more) <= cost(cached) + ROUNDING_S


@given(clusters(), requests, st.floats(0, 5), st.booleans(), st.booleans())
def test_a_longer_queue_never_lowers_a_pair_s_cost(cluster, request, longer_s, is_local, on_decode):
    prefill, decode = one_pair(cluster, request, is_local=is_local)
    rules = RULES if is_local else REMOTE
    before = cost_of(prefill, decode, request, rules=rules)
    grown = decode if is_local or on_decode else prefill
    grown[0] = dataclasses.replace(grown[0], queued_prefill_s=grown[0].queued_prefill_s + longer_s)
    assert cost_of(prefill, decode, request, rules=rules) >= before - ROUNDING_S
