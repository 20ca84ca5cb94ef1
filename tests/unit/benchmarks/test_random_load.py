from dataclasses import replace
from random import Random

import pytest

from benchmarks.engine.drive import Work, greedy
from benchmarks.random_load import Answer, Ebb, LoadPlan, RandomLoad, compare, growth, random_sampling
from shared.blocks import token_ids
from shared.engine.fake import fake_answer, fake_engine
from shared.request import SamplingParams

PLAN = LoadPlan(
    seconds=1.5, seed=3, wave_s=0.5, max_open=16, max_prompt=200, max_answer=80, num_compared=20, max_drift=1.0
)


@pytest.fixture
def load():
    # So few pages that somebody is preempted all the time, however few steps a slow machine gets done.
    return RandomLoad([fake_engine(num_pages=7, max_running=4) for _ in range(2)], PLAN)


def test_work_of_all_kinds_adds_up(load):
    load.run()
    assert load.violations == []
    assert len(load.ebbs) >= 2
    assert min(load.counts[what] for what in ("finished", "cancelled", "imported", "imports given up")) > 0
    assert sum(engine.stats().num_preemptions for engine in load.engines) > 0
    served = [answer for answer in load.answers if not answer.sampling.stop_token_ids]
    assert served
    for answer in served:
        assert list(answer.tokens) == fake_answer(answer.prompt, len(answer.prompt), answer.sampling)


def test_a_leak_is_seen(load):
    [lost] = Work(1000, seed=9).requests(1, 70, greedy(5))
    load.engines[0].reserve(replace(lost, key="lost"))
    load.run()
    assert "num_importing=1" in load.violations[0]


def test_a_token_of_nobody_is_seen(load):
    step = load.engines[0].step
    load.engines[0].step = lambda: replace(step(), tokens=tuple(replace(t, index=t.index + 1) for t in step().tokens))
    load.run()
    assert load.violations


def answer_of(tokens):
    return Answer(token_ids([10, 20, 30]), SamplingParams(max_tokens=3, temperature=0.0), tuple(tokens))


def test_an_answer_is_compared_token_by_token():
    own = fake_answer(token_ids([10, 20, 30]), 3, SamplingParams(max_tokens=3, temperature=0.0))
    assert compare(fake_engine(), "a", answer_of(own)) is None
    assert "token 1" in compare(fake_engine(), "b", answer_of([own[0], 1, own[2]]))
    assert "2 tokens, alone 3" in compare(fake_engine(), "c", answer_of(own[:2]))


def test_memory_that_grows_is_seen():
    flat = [Ebb(at_s, 1000, 5000) for at_s in range(8)]
    assert growth(flat) == []
    assert "device" in growth([*flat, Ebb(9, 2**21, 5000)])[0]
    assert "host" in growth([*flat, Ebb(9, 1000, 2**30)])[0]


def test_sampling_is_of_all_kinds():
    rng = Random(1)
    drawn = [random_sampling(rng, 50, 1000) for _ in range(200)]
    assert 50 < sum(each.temperature == 0 for each in drawn) < 150
    for field in ("top_k", "min_p", "presence_penalty", "min_tokens", "stop_token_ids"):
        assert 0 < sum(bool(getattr(each, field)) for each in drawn) < 100
    assert all(each.min_tokens <= each.max_tokens for each in drawn)
