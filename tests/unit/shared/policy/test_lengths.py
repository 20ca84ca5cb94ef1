import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.traces import read_trace
from shared.policy import lengths
from shared.policy.lengths import GUESSED_MEAN_TOKENS, MAX_LENGTH, STARTS, Expected, LengthKey, LengthPredictor, expect

NO_LIMIT = 10**6
KEY = LengthKey("t", "m", "chat", 1000)
DATA = Path(__file__).parents[4] / "loadgen" / "data"


def taught(answers, key=KEY):
    predictor = LengthPredictor()
    for num_tokens, is_cut in answers:
        predictor.observe(key, num_tokens, is_cut=is_cut)
    return predictor


def ended(*answers):
    return [(num_tokens, False) for num_tokens in answers]


def test_bins_are_exact_for_short_answers_and_an_eighth_of_an_octave_for_long_ones():
    assert STARTS[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert STARTS[-1] == MAX_LENGTH
    assert max(after / start for start, after in pairwise(STARTS) if start >= 16) < 1.13


def test_before_anything_was_seen_lengths_are_a_guess():
    prediction = LengthPredictor().predict(KEY, NO_LIMIT)
    assert prediction.mean == pytest.approx(GUESSED_MEAN_TOKENS, rel=0.01)
    assert prediction.quantile(0.75) == pytest.approx(1.386 * GUESSED_MEAN_TOKENS, rel=0.02)
    assert prediction.mean_remaining(5000) == pytest.approx(GUESSED_MEAN_TOKENS, rel=0.1), "it has no memory"
    assert LengthPredictor().predict(KEY, 100).mean == pytest.approx(82.7, rel=0.01), "of what may be made"


def test_it_learns_what_it_sees_and_forgets_it():
    predictor = taught(ended(*[40] * 300))
    assert predictor.predict(KEY, NO_LIMIT).quantile(0.9) in range(38, 44)
    assert predictor.predict(KEY, NO_LIMIT).mean == pytest.approx(40, rel=0.15)
    assert predictor.predict(KEY, 16).quantile(0.9) == 16
    for _ in range(8000):
        predictor.observe(KEY, 700, is_cut=False)
    assert predictor.predict(KEY, NO_LIMIT).quantile(0.05) in range(640, 704)


def test_what_max_tokens_cut_would_have_been_longer():
    half_cut = taught([(50, False), (300, True)] * 300).predict(KEY, NO_LIMIT)
    assert half_cut.survival(60) == pytest.approx(0.5, abs=0.05)
    assert half_cut.survival(299) == pytest.approx(0.5, abs=0.05), "nobody ended in between"
    assert half_cut.mean > 200
    all_cut = taught([(20, True)] * 300)
    assert all_cut.predict(KEY, 20).quantile(0.05) == 20
    assert all_cut.predict(KEY, 1000).quantile(0.5) > 100, "nothing is known behind: the guess"


def test_lengths_under_many_limits_are_told_apart_from_the_limits():
    draw = random.Random(5)
    predictor = LengthPredictor()
    for _ in range(4000):
        length, limit = int(draw.expovariate(1 / 200)) + 1, draw.choice((50, 150, 400, 1000))
        predictor.observe(KEY, min(length, limit), is_cut=length > limit)
    prediction = predictor.predict(KEY, NO_LIMIT)
    for q, length in ((0.25, 57.5), (0.5, 138.6), (0.75, 277), (0.9, 460)):
        assert prediction.quantile(q) == pytest.approx(length, rel=0.12)
    assert prediction.mean == pytest.approx(200, rel=0.12)
    assert prediction.mean_remaining(300) == pytest.approx(200, rel=0.2)


def test_a_new_tenant_is_as_the_endpoint_and_a_known_one_as_itself():
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.observe(LengthKey("long", "m", "chat", 100), 2000, is_cut=False)
        predictor.observe(LengthKey("short", "m", "chat", 100), 10, is_cut=False)
    assert predictor.predict(LengthKey("long", "m", "chat", 100), NO_LIMIT).quantile(0.5) > 1800
    assert predictor.predict(LengthKey("short", "m", "chat", 9000), NO_LIMIT).quantile(0.5) < 11, "by its tenant"
    stranger = predictor.predict(LengthKey("new", "m", "chat", 100), NO_LIMIT)
    assert stranger.survival(100) == pytest.approx(0.5, abs=0.05)


def test_few_answers_change_little_and_many_almost_all():
    wide = ended(*[100] * 500)
    for num, low, high in ((1, 90, 110), (200, 900, 1000)):
        predictor = taught(wide)
        for _ in range(num):
            predictor.observe(KEY._replace(tenant="u"), 1000, is_cut=False)
        assert low < predictor.predict(KEY._replace(tenant="u"), NO_LIMIT).quantile(0.5) < high + 50


def test_an_answer_that_goes_on_is_one_of_those_that_were_longer():
    prediction = taught(ended(*[20] * 900, *[800] * 100)).predict(KEY, NO_LIMIT)
    assert prediction.remaining(0, 0.5) == prediction.quantile(0.5) in range(18, 23)
    assert prediction.remaining(100, 0.5) == pytest.approx(700, rel=0.1)
    assert prediction.mean_remaining(100) == pytest.approx(700, rel=0.15)
    assert prediction.mean_remaining(0) == pytest.approx(prediction.mean)


def test_an_answer_that_may_not_end_before_is_at_least_so_long():
    prediction = taught(ended(*[20] * 900, *[800] * 100)).predict(KEY, 1000)
    assert expect(prediction) == Expected(prediction.mean, prediction.quantile(0.75))
    assert expect(prediction, at_least=1000) == Expected(1000, 1000)
    assert expect(prediction, num_made=990, at_least=10**6) == Expected(10, 10)
    assert expect(prediction, at_least=100).new_tokens == pytest.approx(800, rel=0.1)
    assert expect(prediction, num_made=100).new_tokens == pytest.approx(700, rel=0.1)


def test_levels_are_bounded_and_those_that_saw_nothing_for_longest_go(monkeypatch):
    monkeypatch.setattr(lengths, "MAX_LEVELS", 40)
    predictor = taught(ended(*[500] * 50))
    for number in range(1000):
        predictor.observe(LengthKey(f"t{number}", "m", "chat", 1000), 7, is_cut=False)
        predictor.observe(KEY, 500, is_cut=False)
        assert predictor.num_levels <= 40
    assert predictor.predict(KEY, NO_LIMIT).quantile(0.5) > 400
    assert predictor.predict(LengthKey("t0", "m", "chat", 1000), NO_LIMIT).survival(8) < 0.6, "as the endpoint"


answers = st.lists(st.tuples(st.integers(0, 2 * MAX_LENGTH), st.booleans()), max_size=40)


@given(answers, st.integers(1, 2 * MAX_LENGTH), st.integers(0, 2 * MAX_LENGTH))
def test_whatever_was_seen_a_prediction_is_a_distribution_of_what_may_be_made(seen, max_new_tokens, num_made):
    prediction = taught(seen).predict(KEY, max_new_tokens)
    quantiles = [prediction.quantile(q) for q in (0.0, 0.1, 0.5, 0.9, 0.999)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] >= 1
    assert quantiles[-1] <= max_new_tokens
    assert 1 <= prediction.mean <= max_new_tokens * 1.0001
    survivals = [prediction.survival(n) for n in (0, 1, 10, 1000, max_new_tokens)]
    assert survivals == sorted(survivals, reverse=True)
    assert survivals[0] == pytest.approx(1)
    assert survivals[-1] == 0
    if num_made < max_new_tokens:
        assert 1 <= prediction.remaining(num_made, 0.9) <= max_new_tokens - num_made
        assert 1 <= prediction.mean_remaining(num_made) <= (max_new_tokens - num_made) * 1.0001


def covered(rows, q):
    """Share of the answers that were no longer than their predicted quantile; each is learnt after its prediction."""
    predictor = LengthPredictor()
    num_covered = 0
    for num_prompt_tokens, num_tokens in rows:
        key = KEY._replace(num_prompt_tokens=num_prompt_tokens)
        num_covered += num_tokens <= predictor.predict(key, NO_LIMIT).quantile(q)
        predictor.observe(key, num_tokens, is_cut=False)
    return num_covered / len(rows)


@pytest.mark.parametrize(("growth", "within"), [(0.0, 0.015), (0.2, 0.035)])
def test_quantiles_cover_what_they_say_nearly_so_when_answers_grow_by_a_fifth_at_once(growth, within):
    draw = random.Random(8)
    rows = []
    for number in range(4000):
        num_prompt_tokens = int(draw.lognormvariate(6.5, 1.2)) + 1
        mean = 4.0 + num_prompt_tokens.bit_length() / 10 + growth * (number > 2000)
        rows.append((num_prompt_tokens, int(draw.lognormvariate(mean, 0.9)) + 1))
    for q in (0.5, 0.75, 0.9):
        assert covered(rows, q) == pytest.approx(q, abs=within)


@pytest.mark.parametrize("name", ["azure_conv_60.csv", "azure_code_60.csv", "mooncake_conversation_60.jsonl"])
def test_sixty_requests_of_a_real_trace_are_enough_to_be_near(name):
    """Drawn from the slice again and again; the whole traces: `python -m benchmarks.lengths`."""
    rows = [(row.input_tokens, row.output_tokens) for row in read_trace(DATA / name)]
    drawn = random.Random(3).choices(rows, k=1500)
    assert covered(drawn, 0.9) == pytest.approx(0.9, abs=0.04)
    assert covered(rows, 0.9) > 0.75


def test_what_is_usual_is_the_mean_of_all():
    predictor = LengthPredictor()
    assert predictor.usual_tokens() == pytest.approx(GUESSED_MEAN_TOKENS, rel=0.05)
    for _ in range(400):
        predictor.observe(LengthKey("one", "m", "chat", 100), 20, is_cut=False)
        predictor.observe(LengthKey("other", "m", "chat", 100), 580, is_cut=False)
    assert predictor.usual_tokens() == pytest.approx(300, rel=0.1)
