import pytest

from shared.blocks import token_ids
from shared.engine.batch import BatchRow
from shared.engine.fake import (
    END_AT,
    FAKE_EOS_TOKEN_ID,
    SPOILT,
    FakeRunner,
    Pace,
    fake_answer,
    fake_model,
    salt_of,
)
from shared.request import SamplingParams, TokenLogprob
from tests.engine_driver import greedy


def row(ids, start, end, pages, sampling=None, **changes):
    fields = {"key": "a", "sequence": 1, "seat": 0, "prompt_len": len(ids), "sample": end >= len(ids)}
    fields |= {"choice": 0, "forbid_end": False}
    fields |= changes
    return BatchRow(ids=token_ids(ids), start=start, end=end, pages=pages, sampling=sampling or greedy(9), **fields)


def run(runner, rows):
    return runner.launch(rows).wait()


def test_the_example_of_the_docstring():
    assert fake_answer(token_ids([10, 20, 30]), 3, greedy(2)) == [150, 667]


def test_answers_go_on_behind_accepted_tokens():
    assert fake_answer(token_ids([10, 20, 30, 150]), 3, greedy(2)) == [667]


def test_sampling_draws_by_seed_choice_and_index():
    sampling = SamplingParams(max_tokens=1, seed=5)
    assert fake_answer(token_ids([10]), 1, sampling, choice=2) == [(10 + 30 + 505 + 26) % 1000]
    ids = token_ids(range(10, 90))
    answers = {
        tuple(fake_answer(ids, 80, SamplingParams(max_tokens=4, seed=seed), choice))
        for seed in (1, 2)
        for choice in (0, 1)
    }
    assert len(answers) == 4


def test_a_prompt_can_ask_for_its_end():
    answer = fake_answer(token_ids([10, END_AT, 3]), 3, greedy(9))
    assert (len(answer), answer[-1]) == (4, FAKE_EOS_TOKEN_ID)
    assert len(fake_answer(token_ids([10, END_AT, 3]), 3, greedy(9, ignore_eos=True))) == 9


def test_a_forbidden_end_is_counted_up():
    answer = fake_answer(
        token_ids([10, END_AT, 0]), 3, greedy(2, min_tokens=1, stop_token_ids=(FAKE_EOS_TOKEN_ID + 1,))
    )
    assert answer[0] == FAKE_EOS_TOKEN_ID + 2


def test_runner_and_function_agree():
    model = fake_model()
    ids = list(range(10, 90))
    sampled = run(FakeRunner(model, 4), (row(ids, 0, 80, (2, 1)),))
    assert [sampled[0].token_id] == fake_answer(token_ids(ids), 80, greedy(1))


def test_chunks_give_the_token_of_the_whole():
    ids = list(range(10, 90))
    runner = FakeRunner(fake_model(), 4)
    assert run(runner, (row(ids, 0, 50, (2,)),)) == [None]
    assert run(runner, (row(ids, 50, 80, (2, 1)),))[0].token_id == fake_answer(token_ids(ids), 80, greedy(1))[0]


def test_kv_lies_where_the_layout_says():
    runner = FakeRunner(fake_model(), 2)
    run(runner, (row([10, 20], 0, 2, (1,)),))
    page = runner.cache.pages[1]
    assert page[0, 0, :2, 0].tolist() == [[10, 1], [20, 2]]
    assert page[0, 1, :2, 0].tolist() == [[-10, -1], [-20, -2]]
    assert not runner.cache.pages[0].any()


def test_missing_kv_is_named():
    ids = list(range(10, 90))
    with pytest.raises(AssertionError, match="page 3 should hold position 0"):
        run(FakeRunner(fake_model(), 4), (row(ids, 79, 80, (3, 1)),))


def test_kv_of_another_position_is_named():
    ids = list(range(10, 150))
    runner = FakeRunner(fake_model(), 4)
    run(runner, (row(ids, 0, 128, (0, 1)),))
    with pytest.raises(AssertionError, match="page 0 should hold position 64"):
        run(runner, (row(ids, 128, 140, (0, 0, 2)),))


def test_kv_of_other_ids_gives_another_token():
    runner = FakeRunner(fake_model(), 4)
    run(runner, (row([10] * 64, 0, 64, (0,)),))
    sampled = run(runner, (row([11] * 65, 64, 65, (0, 1)),))
    assert sampled[0].token_id != fake_answer(token_ids([11] * 65), 65, greedy(1))[0]


def test_rows_of_one_batch_must_not_write_a_shared_page():
    runner = FakeRunner(fake_model(), 4)
    with pytest.raises(AssertionError, match="two rows"):
        run(runner, (row([10], 0, 1, (0,)), row([20], 0, 1, (0,), key="b", sequence=2, seat=1)))
    run(runner, (row([10] * 64, 0, 64, (0,)),))
    with pytest.raises(AssertionError, match="page 0 of request 'a' is written by 'b'"):
        run(runner, (row([10] * 65, 64, 65, (0, 1)), row([20], 0, 1, (0,), key="b", sequence=2, seat=1)))


def test_poison_fails_its_row_only():
    runner = FakeRunner(fake_model(), 4, poison_token_id=13)
    bad, good = run(runner, (row([10, 13, 11], 0, 3, (0,)), row([10, 11], 0, 2, (1,), key="b", sequence=2, seat=1)))
    assert (bad.token_id, bad.error) == (-1, "NaN in the logits")
    assert good.error is None


def test_logprobs():
    runner = FakeRunner(fake_model(), 1)
    sampled = run(runner, (row([10, 20, 30], 0, 3, (0,), greedy(1, logprobs=2)),))
    assert sampled[0].logprob == TokenLogprob(-(1 + 150 % 7) / 8, ((150, -0.5), (151, -0.75)))
    assert run(runner, (row([10, 20, 30], 0, 3, (0,)),))[0].logprob is None


# One batch ahead.


def test_an_id_not_seen_yet_is_what_the_seat_drew():
    runner = FakeRunner(fake_model(), 4)
    first = runner.launch((row([10, 20, 30], 0, 3, (0,)),))
    second = runner.launch((row([10, 20, 30], 3, 4, (0,), prompt_len=3),))
    assert [first.wait()[0].token_id, second.wait()[0].token_id] == [150, 667]


@pytest.mark.parametrize("changes", [{"sequence": 2}, {"seat": 1}])
def test_what_another_seat_or_sequence_drew_is_not_taken(changes):
    runner = FakeRunner(fake_model(), 4)
    run(runner, (row([10, 20, 30], 0, 3, (0,)),))
    with pytest.raises(AssertionError, match="wants position 3"):
        run(runner, (row([10, 20, 30], 3, 4, (0,), prompt_len=3, **changes),))


def test_kv_is_not_there_before_the_batch_has_been_waited_for():
    runner = FakeRunner(fake_model(), 4)
    launched = runner.launch((row([10, 20], 0, 2, (1,)),))
    assert runner.cache.pages[1, 0, 0, 0, 0, 0] == SPOILT
    launched.wait()
    assert runner.cache.pages[1, 0, 0, 0, 0, 0] == 10


def test_writing_to_a_page_in_flight_is_found_out():
    runner = FakeRunner(fake_model(), 4)
    run(runner, (row([10] * 64, 0, 64, (0,)),))
    launched = runner.launch((row([10] * 65, 64, 65, (0, 1)),))
    runner.cache.pages[0] = 7
    with pytest.raises(AssertionError, match="page 0 should hold position 0"):
        launched.wait()


def test_batches_are_waited_for_in_order_and_not_more_than_may_be_ahead():
    runner = FakeRunner(fake_model(), 4)
    runner.launch((row([10], 0, 1, (0,)),))
    second = runner.launch((row([20], 0, 1, (1,)),))
    with pytest.raises(AssertionError, match="2 batches are in flight"):
        runner.launch((row([30], 0, 1, (2,)),))
    with pytest.raises(AssertionError, match="before an older one"):
        second.wait()


def test_two_rows_do_not_share_a_seat():
    with pytest.raises(AssertionError, match="the same seat"):
        FakeRunner(fake_model(), 4).launch((row([10], 0, 1, (0,)), row([20], 0, 1, (1,))))


# Salted by placement.


def test_the_salt_is_that_of_the_key():
    assert salt_of("a") == 0xE8B7BE43
    assert fake_answer(token_ids([10, 20, 30]), 3, greedy(1), salted_by="a") == [(150 + 0xE8B7BE43) % 1000]


def test_salted_runner_and_function_agree_and_other_keys_do_not():
    ids = list(range(10, 90))
    answers = {}
    for key in ("a", "b"):
        runner = FakeRunner(fake_model(), 4, salted=True)
        first = run(runner, (row(ids, 0, 80, (2, 1), key=key),))[0].token_id
        second = run(runner, (row([*ids, first], 80, 81, (2, 1), key=key, prompt_len=80),))[0].token_id
        answers[key] = [first, second]
        assert answers[key] == fake_answer(token_ids(ids), 80, greedy(2), salted_by=key)
    assert answers["a"] != answers["b"]


def test_a_splice_of_two_placements_is_the_answer_of_neither():
    prompt = token_ids(range(10, 40))
    ours, theirs = (fake_answer(prompt, 30, greedy(6, ignore_eos=True), salted_by=key) for key in ("a", "b"))
    spliced = ours[:2] + theirs[2:]
    behind = fake_answer(prompt + token_ids(spliced[:2]), 30, greedy(6, ignore_eos=True), salted_by="b")
    assert behind != spliced[2:]


def test_an_end_that_was_asked_for_comes_salted_too():
    answer = fake_answer(token_ids([10, END_AT, 0]), 3, greedy(9), salted_by="a")
    assert answer == [FAKE_EOS_TOKEN_ID]


# Paced.


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_paced_batches_run_one_behind_the_other():
    clock = Clock()
    runner = FakeRunner(fake_model(), 4, pace=Pace(0.5, clock_s=clock, sleep=clock.sleep))
    first = runner.launch((row([10, 20, 30], 0, 3, (0,)),))
    second = runner.launch((row([10, 20, 30], 3, 4, (0,), prompt_len=3),))
    assert [first.wait()[0].token_id, clock.now_s] == [150, 100.5]
    clock.sleep(0.3)  # the host is busy while the second one runs
    assert [second.wait()[0].token_id, clock.now_s] == [667, 101.0]


def test_a_pace_does_not_run_ahead_while_nothing_is_launched():
    clock = Clock()
    pace = Pace(0.5, clock_s=clock, sleep=clock.sleep)
    clock.sleep(10.0)
    assert pace.launch() == 110.5
    clock.sleep(10.0)
    pace.wait_until(110.5)
    assert clock.now_s == 120.0
