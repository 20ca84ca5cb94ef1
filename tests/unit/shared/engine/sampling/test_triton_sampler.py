"""Triton's sampler against torch's: the same tokens, errors and log probabilities row by row."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.blocks import token_ids
from shared.engine.batch import MAX_LOGPROBS, BatchRow
from shared.engine.sampling.torch_sampler import NOT_FINITE, NOTHING_LEFT, Sampler, choice_key
from shared.engine.sampling.triton_sampler import DrawResults, TritonSampler, Tuning
from shared.engine.seats import FIRST_END, FIRST_PAGE, SMALLEST_TOP_P, Word
from shared.request import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = 333
NUM_SEATS = 4
EOS = 2
PROMPT = (5, 6, 6, 7)
TUNING = Tuning(
    chunk=256, few_rows=1, few_rows_chunk=128, block=128, warps=1, row_block=512, row_warps=1, top_chunk=128, rounds=2
)
ERRORS = {-1: NOT_FINITE, -2: NOTHING_LEFT}

FILTERS = {
    "greedy": {"temperature": 0.0},
    "greedy despite filters": {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.9},
    "temperature": {"temperature": 1.5},
    "top-k 1": {"temperature": 2.0, "top_k": 1},
    "top-k": {"temperature": 2.0, "top_k": 7},
    "top-k of all": {"temperature": 1.0, "top_k": 5000},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "small top-p": {"temperature": 3.0, "top_p": 0.01},
    "smallest top-p": {"temperature": 3.0, "top_p": SMALLEST_TOP_P},
    "min-p": {"temperature": 1.5, "min_p": 0.3},
    "all filters": {"temperature": 2.5, "top_k": 90, "top_p": 0.7, "min_p": 0.02},
}


@pytest.fixture(scope="module")
def sampler():
    return TritonSampler(VOCAB_SIZE, NUM_SEATS, NUM_SEATS, DEVICE, TUNING)


def in_float32(value):
    return float(np.float32(value))


def make_row(seat, answer=(), choice=0, forbid_end=False, **sampling):
    """A row whose parameters are float32 numbers, as seats keep them."""
    ids = token_ids((*PROMPT, *answer))
    params = SamplingParams(max_tokens=10_000, **sampling)
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    params = replace(params, **{name: in_float32(getattr(params, name)) for name in names})
    return BatchRow(
        key="k",
        sequence=seat,
        seat=seat,
        ids=ids,
        start=len(ids) - 1,
        end=len(ids),
        pages=(0,),
        prompt_len=len(PROMPT),
        sample=True,
        sampling=params,
        choice=choice,
        forbid_end=forbid_end,
    )


def float_bits(value):
    return int(np.float32(value).view(np.int32))


def seat_record(row):
    params = row.sampling
    ends = [*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids]
    low, high = np.array([choice_key(params.seed, row.choice)], dtype=np.uint64).view(np.int32)
    words = {
        Word.POSITION: row.start,
        Word.TOKEN: row.ids[row.start],
        Word.PROMPT_LEN: row.prompt_len,
        Word.MIN_TOKENS: row.end - row.prompt_len + 1 if row.forbid_end else 0,
        Word.TEMPERATURE: float_bits(params.temperature),
        Word.TOP_K: params.top_k,
        Word.TOP_P: float_bits(params.top_p),
        Word.MIN_P: float_bits(params.min_p),
        Word.REPETITION_PENALTY: float_bits(params.repetition_penalty),
        Word.PRESENCE_PENALTY: float_bits(params.presence_penalty),
        Word.FREQUENCY_PENALTY: float_bits(params.frequency_penalty),
        Word.KEY_LOW: int(low),
        Word.KEY_HIGH: int(high),
        Word.NUM_LOGPROBS: -1 if params.logprobs is None else params.logprobs,
        Word.NUM_ENDS: len(ends),
    }
    record = torch.zeros(FIRST_PAGE + 1, dtype=torch.int32)
    for word, value in words.items():
        record[word] = value
    record[FIRST_END : FIRST_END + len(ends)] = torch.tensor(ends, dtype=torch.int32)
    return record


def seat_words_of(rows):
    words = torch.zeros(NUM_SEATS + 1, FIRST_PAGE + 1, dtype=torch.int32)
    words[:, Word.POSITION] = -1
    for row in rows:
        words[row.seat] = seat_record(row)
    return words.to(DEVICE)


def on_device(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw(sampler, logits, rows, how="draw"):
    """Results and seats after one draw of rows, each in its seat."""
    words = seat_words_of(rows)
    results = DrawResults.allocate(NUM_SEATS, DEVICE)
    for row in rows if how == "draw_with_extras" else ():
        ids = on_device(list(row.ids))
        sampler.load_seen(row.seat, ids[: row.prompt_len], ids[row.prompt_len :])
    seats, ends = on_device([row.seat for row in rows]), on_device([row.end for row in rows])
    getattr(sampler, how)(logits, seats, ends, words, results)
    return results, words.cpu()


def expect_the_same(sampler, logits, rows, how="draw"):
    """Draw both ways; returns what torch drew."""
    logits = logits.to(DEVICE)
    expected = Sampler((EOS,), VOCAB_SIZE).sample(logits, rows)
    results, words = draw(sampler, logits, rows, how)
    for index, (row, sampled) in enumerate(zip(rows, expected, strict=True)):
        token = int(results.tokens[index])
        assert (max(token, -1), ERRORS.get(token)) == (sampled.token_id, sampled.error), (index, row.sampling)
        assert words[row.seat, Word.POSITION] == row.end
        assert words[row.seat, Word.TOKEN] == max(token, 0)
        if sampled.logprob is not None:
            num_top = len(sampled.logprob.top)
            assert float(results.logprobs[index]) == pytest.approx(sampled.logprob.logprob, abs=1e-5)
            top_ids = results.top_ids[index, :num_top].tolist()
            assert top_ids == [token for token, _ in sampled.logprob.top]
            top_logprobs = results.top_logprobs[index, :num_top].tolist()
            assert top_logprobs == pytest.approx([value for _, value in sampled.logprob.top], abs=1e-5)
    return expected


def random_logits(num_rows, seed=0, scale=3.0):
    return scale * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(0.1, torch.float32), (1.0, torch.bfloat16), (6.0, torch.float32)],
    ids=["flat", "bfloat16", "peaked"],
)
def test_draws_the_token_of_the_torch_sampler(sampler, dtype, scale):
    """Rows of one batch, each with filters of its own."""
    for first in range(0, len(FILTERS), NUM_SEATS):
        chosen = list(FILTERS.values())[first : first + NUM_SEATS]
        rows = [
            make_row(seat, answer=(9,) * seat, choice=seat % 2, seed=2**63 + first + seat, **filters)
            for seat, filters in enumerate(chosen)
        ]
        expect_the_same(sampler, random_logits(len(rows), seed=first, scale=scale).to(dtype), rows)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_row_alone_draws_the_same(sampler, filters):
    rows = [make_row(3, seed=5, **filters)]
    expect_the_same(sampler, random_logits(1), rows)


def test_rows_of_a_wider_matrix_are_read_at_their_distance(sampler):
    rows = [make_row(seat, seed=seat, temperature=1.0, top_p=0.8) for seat in range(3)]
    wide = torch.cat((random_logits(3), torch.full((3, 100), 99.0)), 1).to(DEVICE)
    tokens = draw(sampler, wide[:, :VOCAB_SIZE], rows)[0].tokens[:3]
    assert torch.equal(tokens, draw(sampler, wide[:, :VOCAB_SIZE].contiguous(), rows)[0].tokens[:3])


def test_a_row_that_top_p_keeps_rejecting_draws_on_until_it_has_a_token():
    """Without a second round on the whole device the row's own program has to go on."""
    sampler = TritonSampler(VOCAB_SIZE, NUM_SEATS, NUM_SEATS, DEVICE, replace(TUNING, rounds=1))
    rows = [make_row(seat, seed=seat, temperature=2.0, top_p=0.05) for seat in range(NUM_SEATS)]
    expect_the_same(sampler, random_logits(NUM_SEATS, scale=0.5), rows)


@pytest.mark.parametrize("filters", [FILTERS["top-k"], FILTERS["top-p"], FILTERS["all filters"]])
def test_ties_at_the_border_are_kept(sampler, filters):
    """Few distinct values, so that every border falls into a tie, with zeros of both signs."""
    logits = random_logits(NUM_SEATS, scale=1.0).round()
    assert set(torch.signbit(logits[logits == 0]).tolist()) == {True, False}
    expect_the_same(sampler, logits, [make_row(seat, seed=seat, **filters) for seat in range(NUM_SEATS)])


@pytest.mark.parametrize("top_k", [1, 3, 4, VOCAB_SIZE - 1])
def test_top_k_reaches_down_to_minus_infinity(sampler, top_k):
    logits = torch.full((NUM_SEATS, VOCAB_SIZE), -math.inf)
    logits[:, [10, 200, 332]] = torch.tensor([-1.0, 0.5, -2.0])
    rows = [make_row(seat, seed=seat, temperature=1.0, top_k=top_k, top_p=0.95) for seat in range(NUM_SEATS)]
    expect_the_same(sampler, logits, rows)


@pytest.mark.parametrize("how", ["draw_greedy", "draw", "draw_with_extras"])
def test_greedy_takes_the_first_of_the_largest(sampler, how):
    logits = random_logits(3)
    logits[0, [30, 241]] = 50.0
    logits[1], logits[2] = -1.0, -0.0
    logits[2, 5] = 0.0
    rows = [make_row(seat, temperature=0.0) for seat in range(3)]
    assert [sampled.token_id for sampled in expect_the_same(sampler, logits, rows, how)] == [30, 0, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_the_colder_the_draw_the_greedier(sampler, temperature):
    logits = random_logits(2)
    rows = [make_row(seat, temperature=temperature, top_k=5, top_p=0.5) for seat in range(2)]
    expected = expect_the_same(sampler, logits, rows)
    assert [sampled.token_id for sampled in expected] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("how", ["draw_greedy", "draw", "draw_with_extras"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, "all -inf"])
def test_a_row_without_finite_logits_fails_alone(sampler, bad, how):
    logits = random_logits(4)
    if bad == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 250] = bad
    sampling = {"temperature": 0.0} if how == "draw_greedy" else {"temperature": 1.0, "top_p": 0.9}
    expected = expect_the_same(sampler, logits, [make_row(seat, **sampling) for seat in range(4)], how)
    assert [sampled.error for sampled in expected] == [None, NOT_FINITE, None, None]


@pytest.mark.parametrize("how", ["draw_greedy", "draw", "draw_with_extras"])
def test_rows_of_nobody_draw_nothing(sampler, how):
    sampling = {"temperature": 0.0} if how == "draw_greedy" else {"temperature": 1.0, "top_p": 0.5}
    rows = [make_row(3, seed=1, **sampling)]
    words = seat_words_of(rows)
    before = words[NUM_SEATS].clone()
    results = DrawResults.allocate(NUM_SEATS, DEVICE)
    results.tokens.fill_(77)
    logits = random_logits(3).to(DEVICE)
    logits[1:] = math.nan
    seats, ends = on_device([3, NUM_SEATS, NUM_SEATS]), on_device([rows[0].end, 0, 0])
    getattr(sampler, how)(logits, seats, ends, words, results)
    assert torch.equal(words[NUM_SEATS], before)
    assert results.tokens.tolist()[1:3] == [77, 77]
    assert words[3, Word.POSITION] == rows[0].end


def test_extras_follow_the_torch_sampler(sampler):
    wanted = [
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.0, "repetition_penalty": 5.0, "logprobs": 20},
        {"temperature": 0.0, "repetition_penalty": 0.5, "logprobs": 1},
        {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 0.7, "logprobs": 0},
        {"temperature": 1.0, "frequency_penalty": -1.5, "top_k": 9, "logprobs": 3},
        {"temperature": 1.2, "top_p": 0.6, "min_p": 0.01},
        {"temperature": 0.1, "top_k": 1, "logprobs": 4},
        {"temperature": 0.0},
    ]
    for first in range(0, len(wanted), 4):
        rows = [make_row(seat, (9, 9, 11, 6), seed=seat, **wanted[first + seat]) for seat in range(4)]
        expect_the_same(sampler, random_logits(4, seed=first, scale=2.0), rows, "draw_with_extras")


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter
def test_a_penalty_beyond_float32_fails_its_row_alone(sampler):
    logits = random_logits(2)
    logits[1, PROMPT[0]] = 3.0
    rows = [make_row(0, temperature=0.0, logprobs=3), make_row(1, temperature=0.0, repetition_penalty=5e-39)]
    expected = expect_the_same(sampler, logits, rows, "draw_with_extras")
    assert expected[1].error == NOT_FINITE


def test_a_drawn_token_counts_for_the_next(sampler):
    """Three draws in a row from device state alone, as a steady step does."""
    logits = random_logits(1, scale=0.3)
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.9}
    row = make_row(2, (9,), temperature=0.0, **penalties)
    words = seat_words_of([row])
    sampler.load_seen(2, on_device(PROMPT), on_device([9]))
    results = DrawResults.allocate(NUM_SEATS, DEVICE)
    answer = [9]
    for _ in range(3):
        row = make_row(2, answer, temperature=0.0, **penalties)
        expected = Sampler((EOS,), VOCAB_SIZE).sample(logits, [row])[0].token_id
        sampler.draw_with_extras(logits.to(DEVICE), on_device([2]), on_device([row.end]), words, results)
        assert int(results.tokens[0]) == expected
        answer.append(expected)
    assert len(set(answer)) == 4


def test_a_seat_forgets_what_its_last_owner_saw(sampler):
    sampler.load_seen(3, on_device([1, 2, 3]), on_device([4, 4]))
    sampler.load_seen(3, on_device([3, 3]), on_device([3, 7]))
    nonzero = {int(token): int(sampler.seen[3, token]) for token in sampler.seen[3].nonzero()[:, 0]}
    assert nonzero == {3: 2**30 + 1, 7: 1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_are_forbidden_before_min_tokens(sampler, temperature):
    logits = torch.full((3, VOCAB_SIZE), -20.0)
    logits[:, [EOS, 17]] = torch.tensor([20.0, 19.0])
    rows = [
        make_row(0, temperature=temperature, forbid_end=True, stop_token_ids=(17, VOCAB_SIZE + 5), logprobs=2),
        make_row(1, temperature=temperature, forbid_end=True, stop_token_ids=(17,), ignore_eos=True),
        make_row(2, temperature=temperature, stop_token_ids=(17,)),
    ]
    expected = expect_the_same(sampler, logits, rows, "draw_with_extras")
    assert expected[0].token_id not in (EOS, 17)
    assert expected[1].token_id == EOS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_fails_alone(sampler, temperature):
    logits = torch.full((2, VOCAB_SIZE), -math.inf)
    logits[:, [EOS, 17]] = 1.0
    rows = [
        make_row(0, temperature=temperature, top_p=0.5, forbid_end=True, stop_token_ids=(17,)),
        make_row(1, temperature=temperature),
    ]
    expected = expect_the_same(sampler, logits, rows, "draw_with_extras")
    assert [sampled.error for sampled in expected] == [NOTHING_LEFT, None]


def test_as_many_rivals_as_a_record_holds(sampler):
    rows = [make_row(0, temperature=0.0, logprobs=MAX_LOGPROBS)]
    expect_the_same(sampler, random_logits(1), rows, "draw_with_extras")
