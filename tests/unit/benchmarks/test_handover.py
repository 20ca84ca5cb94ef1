from pathlib import Path

from benchmarks.handover import Plan, cut_prompts, problems


def test_no_two_prompts_begin_alike():
    assert cut_prompts([5, 6, 7], [1, 2, 5]) == [[5], [6, 7], [7, 5, 6, 7, 5]]


def a_plan(**changes) -> Plan:
    fields = {
        "model": Path("/m"),
        "device": "cuda",
        "gpus": {"prefill": "0", "decode": "1"},
        "num_pages": 9,
        "lengths": [1],
        "new_tokens": 1,
        "pulls": 2,
        "pull_tokens": 64,
        "margin": 0.25,
        "min_gb_per_s": 100.0,
    }
    return Plan(**fields | changes)


def served(**changes):
    worker = {
        "baton_kv_pages": 9,
        "baton_kv_pages_free": 9,
        "baton_kv_held_requests": 0,
        "baton_local_prefills_total": 0,
    }
    return {
        "workers": {"prefill": worker, "decode": worker | changes},
        "links": [{"peer": "prefill-0", "transport": "cuda_ipc"}],
        "pulls": [{"gb_per_s": 120.0}],
    }


def test_all_is_well():
    assert problems(a_plan(), served(), {"wrong": [], "tokens": 1}) == []


def test_each_thing_that_does_not_hold_is_named():
    without_ipc = served(baton_kv_pages_free=8, baton_local_prefills_total=2) | {
        "links": [{"peer": "prefill-0", "warning": "no answer"}],
        "pulls": [{"gb_per_s": 3.0}],
    }
    told = "\n".join(problems(a_plan(), without_ipc, {"wrong": [{"index": 3}], "tokens": 0}))
    for word in ("wrong token", "0 tokens in all, not 1", "holds pages", "computed 2 prompts", "cuda_ipc", "3.0 GB/s"):
        assert word in told
