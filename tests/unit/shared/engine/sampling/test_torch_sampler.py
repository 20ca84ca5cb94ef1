import dataclasses
import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.blocks import token_ids
from shared.engine.batch import BatchRow
from shared.engine.sampling.torch_sampler import (
    GOLDEN_GAMMA,
    MASK_64,
    NOT_FINITE,
    NOTHING_LEFT,
    Sampler,
    gumbel_noise,
    splitmix64,
    stream_key,
)
from shared.request import SamplingParams

VOCAB_SIZE = 50
EOS = 2
PROMPT = (5, 6, 6, 7)


@pytest.fixture
def sampler():
    return Sampler((EOS,), VOCAB_SIZE)


def make_row(answer=(), prompt=PROMPT, choice=0, forbid_end=False, **sampling):
    ids = token_ids((*prompt, *answer))
    return BatchRow(
        key="k",
        sequence=0,
        seat=0,
        ids=ids,
        start=len(ids) - 1,
        end=len(ids),
        pages=(0,),
        prompt_len=len(prompt),
        sample=True,
        sampling=SamplingParams(max_tokens=10_000, **sampling),
        choice=choice,
        forbid_end=forbid_end,
    )


def random_logits(num_rows, seed=0, vocab_size=VOCAB_SIZE):
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def picked(sampler, logits, rows):
    results = sampler.sample(logits, rows)
    assert all(result.error is None for result in results)
    return [result.token_id for result in results]


def assert_follows(counts, probabilities):
    """Pearson's test, with all tokens that are expected less than 5 times counted as one; the seeds are fixed."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def filtered_probabilities(logits, *processors):
    ids = torch.tensor([PROMPT])
    return LogitsProcessorList(processors)(ids, logits[None].clone())[0].double().softmax(-1)


DISTRIBUTIONS = [
    ({"temperature": 1.0}, []),
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"temperature": 2.0, "top_k": 5}, [TemperatureLogitsWarper(2.0), TopKLogitsWarper(5)]),
    ({"temperature": 1.5, "top_p": 0.8}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)]),
    ({"temperature": 1.5, "min_p": 0.1}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1)]),
    (
        {"temperature": 2.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(2.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
]


@pytest.mark.parametrize(("sampling", "processors"), DISTRIBUTIONS, ids=[",".join(s) for s, _ in DISTRIBUTIONS])
def test_draws_follow_the_exact_distribution(sampler, sampling, processors):
    logits = random_logits(1)[0]
    probabilities = filtered_probabilities(logits, *processors)
    num_draws = 10_000
    rows = [make_row(seed=seed, **sampling) for seed in range(num_draws)]
    tokens = picked(sampler, logits.expand(num_draws, -1), rows)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).double()
    assert_follows(counts, probabilities)


@pytest.mark.parametrize("axis", ["seed", "choice", "token index"])
def test_neighbouring_streams_are_independent(sampler, axis):
    """Draws along each part of the key: pairs of neighbours fall on all pairs of 4 tokens equally."""
    num_draws = 8000
    answers = {"token index": lambda i: {"answer": (9,) * i}, "choice": lambda i: {"choice": i}}
    if axis == "token index":
        num_draws = 3000  # each row carries its whole answer
    arguments = answers.get(axis, lambda i: {"seed": i})
    rows = [make_row(temperature=1.0, **arguments(i)) for i in range(num_draws)]
    tokens = torch.tensor(picked(Sampler((), 4), torch.zeros(num_draws, 4), rows))
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
    assert_follows(pairs, torch.full((16,), 1 / 16, dtype=torch.float64))


def test_a_draw_depends_on_its_key_alone(sampler):
    logits = random_logits(6)
    rows = [make_row(answer=(9,) * (i % 3), choice=i % 2, seed=i, temperature=1.3, top_p=0.9) for i in range(6)]
    rows[3] = dataclasses.replace(rows[3], sampling=dataclasses.replace(rows[3].sampling, top_k=7))
    together = picked(sampler, logits, rows)
    assert together == [picked(sampler, logits[i : i + 1], rows[i : i + 1])[0] for i in range(6)]
    backwards = picked(sampler, logits.flip(0), rows[::-1])
    assert backwards[::-1] == together


def test_the_noise_is_splitmix64_through_the_gumbel_function():
    key = stream_key(seed=7, choice=1, token_index=3)
    tokens = torch.tensor([0, 1, 49_151])
    expected = []
    for token in tokens.tolist():
        word = splitmix64((key + (token + 1) * GOLDEN_GAMMA) & MASK_64)
        uniform = ((word >> 12) + 0.5) / 2**52
        expected.append(-math.log(-math.log(uniform)))
    signed = key - 2**64 if key >= 2**63 else key
    noise = gumbel_noise(torch.full((3,), signed), tokens)
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64))


def test_splitmix64_gives_the_published_sequence():
    """First outputs for seed 1234567, as published with the reference implementation."""
    outputs = [splitmix64((1234567 + n * GOLDEN_GAMMA) & MASK_64) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_any_python_integer_is_a_seed(sampler):
    rows = [make_row(seed=seed, temperature=1.0) for seed in (-1, 2**63, 2**80 + 1)]
    picked(sampler, random_logits(3), rows)


def test_greedy_takes_the_first_of_the_largest(sampler):
    logits = random_logits(2)
    logits[0, 30] = logits[0, 41] = 50.0
    rows = [make_row(temperature=0.0), make_row(temperature=0.0)]
    assert picked(sampler, logits, rows) == [30, int(logits[1].argmax())]


def test_filters_do_nothing_to_greedy_rows(sampler):
    logits = random_logits(2)
    rows = [make_row(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9), make_row(temperature=1.0)]
    assert picked(sampler, logits, rows)[0] == int(logits[0].argmax())


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}], ids=["plain", "filtered"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_the_colder_the_draw_the_greedier(sampler, shift, temperature, filters):
    """Down to the smallest number there is: quotients that overflow must not tie."""
    logits = random_logits(1) + shift
    assert picked(sampler, logits, [make_row(temperature=temperature, **filters)]) == [int(logits.argmax())]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_equals_that_of_transformers(sampler, penalty):
    answer = (9, 9, 11)
    logits = random_logits(1, seed=4)
    ids = torch.tensor([(*PROMPT, *answer)])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).log_softmax(-1)[0]
    row = make_row(answer, temperature=0.0, repetition_penalty=penalty, logprobs=VOCAB_SIZE)
    (sampled,) = sampler.sample(logits, [row])
    logprobs = torch.full((VOCAB_SIZE,), math.nan)
    for token, logprob in sampled.logprob.top:
        logprobs[token] = logprob
    torch.testing.assert_close(logprobs, expected)


def test_presence_and_frequency_count_the_answer_only(sampler):
    logits = torch.zeros(1, VOCAB_SIZE)
    row = make_row((9, 9, 11, 6), temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=VOCAB_SIZE)
    expected = torch.zeros(VOCAB_SIZE)
    expected[9], expected[11], expected[6] = -1.0, -0.75, -0.75
    expected = expected.log_softmax(-1)
    (sampled,) = sampler.sample(logits, [row])
    for token, logprob in sampled.logprob.top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)


def test_penalties_touch_their_row_only(sampler):
    logits = random_logits(2)
    plain = make_row(temperature=0.0, logprobs=3)
    penalised = make_row((9,), temperature=0.0, repetition_penalty=9.0, presence_penalty=2.0, logprobs=3)
    assert sampler.sample(logits, [penalised, plain])[1] == sampler.sample(logits[1:], [plain])[0]


def test_a_penalty_beyond_float32_fails_its_row_alone(sampler):
    """Not a NaN as log probability: the log cannot say it, and its reader would lose the whole step's record."""
    logits = random_logits(2)
    plain = make_row(temperature=0.0, logprobs=3)
    boundless = make_row(temperature=0.0, repetition_penalty=1e-40, logprobs=3)
    logits[1, PROMPT[0]] = 1.0
    first, second = sampler.sample(logits, [plain, boundless])
    assert first == sampler.sample(logits[:1], [plain])[0]
    assert (second.token_id, second.error, second.logprob) == (-1, NOT_FINITE, None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_are_forbidden_before_min_tokens(sampler, temperature):
    logits = torch.full((3, VOCAB_SIZE), -20.0)
    logits[:, EOS] = logits[:, 17] = 20.0
    rows = [
        make_row(temperature=temperature, forbid_end=True, stop_token_ids=(17, VOCAB_SIZE + 5)),
        make_row(temperature=temperature, forbid_end=True, stop_token_ids=(17,), ignore_eos=True),
        make_row(temperature=temperature, stop_token_ids=(17,)),
    ]
    first, second, third = picked(sampler, logits, rows)
    assert first not in (EOS, 17)
    assert second == EOS  # an ordinary token for this row
    assert third in (EOS, 17)


def test_logprobs_are_of_the_unfiltered_distribution(sampler):
    logits = random_logits(3)
    rows = [
        make_row(temperature=0.1, top_k=1, logprobs=4),
        make_row(temperature=0.0, logprobs=0),
        make_row(temperature=0.0, forbid_end=True),
    ]
    results = sampler.sample(logits, rows)
    exact = logits.log_softmax(-1)
    best = exact[0].topk(4)
    assert results[0].logprob.logprob == pytest.approx(float(best.values[0]))
    assert [token for token, _ in results[0].logprob.top] == best.indices.tolist()
    assert [value for _, value in results[0].logprob.top] == pytest.approx(best.values.tolist())
    assert results[1].logprob.logprob == pytest.approx(float(exact[1].max()))
    assert results[1].logprob.top == ()
    assert results[2].logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}])
def test_a_row_without_finite_logits_fails_alone(sampler, bad, sampling):
    logits = random_logits(3)
    healthy = picked(sampler, logits, [make_row(**sampling)] * 3)
    if bad == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 20] = bad
    first, second, third = sampler.sample(logits, [make_row(**sampling)] * 3)
    assert (second.token_id, second.error, second.logprob) == (-1, NOT_FINITE, None)
    assert [first.token_id, third.token_id] == [healthy[0], healthy[2]]


def test_a_row_with_nothing_left_fails_alone():
    sampler = Sampler((0,), 2)
    rows = [make_row(temperature=t, top_p=0.5, forbid_end=True, stop_token_ids=(1,)) for t in (0.0, 1.0)]
    results = sampler.sample(torch.zeros(3, 2), [*rows, make_row(temperature=0.0)])
    assert [result.error for result in results] == [NOTHING_LEFT, NOTHING_LEFT, None]


def test_tokens_that_tie_at_the_border_of_top_k_are_all_kept(sampler):
    logits = torch.full((400, VOCAB_SIZE), -30.0)
    logits[:, 10], logits[:, [20, 30, 40]] = 1.0, 0.5
    rows = [make_row(temperature=1.0, top_k=2, seed=seed) for seed in range(400)]
    assert set(picked(sampler, logits, rows)) == {10, 20, 30, 40}


def test_top_p_looks_beyond_its_first_candidates():
    """A flat distribution over 5000 tokens: half its mass takes 2500 of them."""
    logits = torch.linspace(0.001, 0.0, 5000).expand(300, -1)
    rows = [make_row(temperature=1.0, top_p=0.5, seed=seed) for seed in range(300)]
    tokens = picked(Sampler((), 5000), logits, rows)
    assert 2000 < max(tokens) <= 2500


def test_bfloat16_logits_are_sampled_in_float32(sampler):
    logits = random_logits(4).to(torch.bfloat16)
    rows = [make_row(seed=seed, temperature=0.8, top_p=0.9) for seed in range(4)]
    assert picked(sampler, logits, rows) == picked(sampler, logits.float(), rows)
