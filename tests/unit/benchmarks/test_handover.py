from pathlib import Path

from benchmarks.handover import Plan, cut_prompts, medians, problems, visible_ms


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
    }


def test_all_is_well():
    assert problems(a_plan(), served(), {"wrong": [], "tokens": 1}) == []


def test_each_thing_that_does_not_hold_is_named():
    without_ipc = served(baton_kv_pages_free=8, baton_local_prefills_total=2) | {
        "links": [{"peer": "prefill-0", "warning": "no answer"}],
    }
    told = "\n".join(problems(a_plan(), without_ipc, {"wrong": [{"index": 3}], "tokens": 0}))
    for word in ("wrong token", "0 tokens in all, not 1", "holds pages", "computed 2 prompts", "cuda_ipc"):
        assert word in told


def test_what_a_client_sees_of_a_pull_lies_between_first_and_second_token():
    timings = {"placed": 1.0, "first_token": 7.0, "transferring": 7.0021, "decoding": 7.0135, "finished": 9.0}
    assert visible_ms(timings) == {"handing_on_ms": 2.1, "rest_ms": 11.4}


def test_medians_of_pulls():
    pulls = [{"mib": 512.0, "handing_on_ms": 2.0, "rest_ms": rest_ms} for rest_ms in (9.0, 1.0, 5.0)]
    assert medians(pulls) == {"median_handing_on_ms": 2.0, "median_rest_ms": 5.0}
    assert medians([]) == {}
