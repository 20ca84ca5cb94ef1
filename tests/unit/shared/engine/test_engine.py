from dataclasses import replace

import pytest

from shared.blocks import token_ids
from shared.engine.batch import MAX_ENDS, MAX_LOGPROBS
from shared.engine.engine import PagedEngine
from shared.engine.fake import END_AT, FAKE_EOS_TOKEN_ID, FakeRunner, fake_answer, fake_engine, fake_model
from shared.engine.port import BlockChanges, EngineLimits
from shared.policy.profile import StepWork
from shared.request import FinishReason
from tests.engine_driver import Driver, copy_pages, greedy, request

POISON = 13


def prompt(length, first=100):
    return token_ids((first + index) % 900 for index in range(length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_len": 0}, "prompt_len is 0"),
        ({"prompt_len": 4}, "prompt_len is 4"),
        ({"ids": token_ids([])}, "prompt_len is 3"),
        ({"sampling": greedy(0)}, "max_tokens is 0"),
        ({"sampling": greedy(1), "prompt_len": 2}, "max_tokens is 1"),
        ({"sampling": greedy(998)}, "max_context"),
        ({"sampling": greedy(300)}, "num_pages is 4"),
        ({"ids": token_ids([1, 1000, 3])}, "vocab_size"),
        ({"ids": token_ids([1, -1, 3])}, "vocab_size"),
        ({"sampling": greedy(9, logprobs=MAX_LOGPROBS + 1)}, "logprobs is 21"),
        ({"sampling": greedy(9, min_tokens=1, stop_token_ids=tuple(range(10, 10 + MAX_ENDS)))}, "81 EOS and stop ids"),
    ],
)
def test_what_can_never_run_is_refused_by_add_and_reserve(changes, message):
    engine = fake_engine(num_pages=4, max_context=1000)
    bad = request(**{"key": "a", "ids": token_ids([1, 2, 3]), "prompt_len": 3, "sampling": greedy(9), **changes})
    with pytest.raises(ValueError, match=message):
        engine.add(bad)
    with pytest.raises(ValueError, match=message):
        engine.reserve(bad)
    Driver(engine).assert_all_free()


@pytest.mark.parametrize("changes", [{"min_tokens": 0}, {"ignore_eos": True}])
def test_as_many_ends_as_can_be_forbidden_are_taken(changes):
    stops = tuple(range(900, 900 + MAX_ENDS))
    sampling = greedy(2, **{"min_tokens": 1, "logprobs": MAX_LOGPROBS, "stop_token_ids": stops, **changes})
    assert len(Driver(fake_engine()).serve(request("a", token_ids([10, 20, 30]), sampling))[0]) == 2


def test_what_just_fits_is_served_alone():
    driver = Driver(fake_engine(num_pages=4, max_context=256))
    (tokens,) = driver.serve(request("a", prompt(200), greedy(56, ignore_eos=True)))
    assert tokens == fake_answer(prompt(200), 200, greedy(56, ignore_eos=True))


def test_holding_needs_pages_for_the_ids_alone():
    engine = fake_engine(num_pages=4)
    engine.add(request("a", prompt(256), greedy(200), hold_kv=True))
    with pytest.raises(ValueError, match="num_pages"):
        engine.add(request("b", prompt(256), greedy(200)))


def test_a_key_in_use_is_refused_and_free_again_afterwards():
    driver = Driver(fake_engine())
    driver.engine.add(request("a", prompt(3), greedy(1)))
    with pytest.raises(ValueError, match="in use"):
        driver.engine.add(request("a", prompt(3), greedy(1)))
    driver.run()
    driver.engine.add(request("a", prompt(3), greedy(1)))


def test_an_import_does_not_hold():
    with pytest.raises(ValueError, match="hold_kv"):
        fake_engine().reserve(request("a", prompt(3), greedy(9), hold_kv=True))


def test_runner_model_and_limits_must_agree():
    limits = EngineLimits(1000, 4, 4, 64)
    with pytest.raises(ValueError, match="num_pages"):
        PagedEngine(FakeRunner(fake_model(), 5), fake_model(), limits)
    with pytest.raises(ValueError, match="layout"):
        PagedEngine(FakeRunner(fake_model("other"), 4), fake_model(), limits)


def test_eos_ends_unless_ignored():
    driver = Driver(fake_engine())
    ids = token_ids([10, END_AT, 4])
    ended, ignored = driver.serve(request("a", ids, greedy(9)), request("b", ids, greedy(9, ignore_eos=True)))
    assert (len(ended), ended[-1], driver.finish("a")) == (5, FAKE_EOS_TOKEN_ID, FinishReason.STOP)
    assert (len(ignored), ignored[:5], driver.finish("b")) == (9, ended, FinishReason.LENGTH)


def test_eos_is_forbidden_below_min_tokens():
    driver = Driver(fake_engine())
    ids = token_ids([10, END_AT, 2])
    early, late = driver.serve(
        request("a", ids, greedy(9, min_tokens=2)),
        request("b", ids, greedy(9, min_tokens=3)),
    )
    assert (len(early), early[2]) == (3, FAKE_EOS_TOKEN_ID)
    assert late[2] == FAKE_EOS_TOKEN_ID + 1
    assert FAKE_EOS_TOKEN_ID not in late[:3]


def test_a_poisoned_request_fails_alone_and_leaves_nothing_behind():
    driver = Driver(fake_engine(poison_token_id=POISON, max_batch_tokens=128))
    good, bad = prompt(150), token_ids([*prompt(149), POISON])
    driver.engine.add(request("good", good, greedy(9)))
    driver.engine.add(request("bad", bad, greedy(9)))
    driver.run()
    assert driver.tokens("good") == fake_answer(good, 150, greedy(9))
    (output,) = driver.outputs["bad"]
    assert (output.token_id, output.finish, output.error) == (-1, FinishReason.FAILED, "NaN in the logits")
    assert driver.serve(request("again", good, greedy(9))) == [driver.tokens("good")]
    driver.assert_all_free()


def test_pages_of_a_failed_request_are_found_by_nobody():
    driver = Driver(fake_engine(poison_token_id=POISON, max_batch_tokens=64))
    driver.serve(request("bad", token_ids([POISON, *prompt(149)]), greedy(9)))
    assert driver.blocks == set()
    driver.assert_all_free()


def test_an_import_fails_like_others():
    driver = Driver(fake_engine(poison_token_id=POISON))
    reservation = driver.engine.reserve(request("a", token_ids([10]), greedy(9)))
    assert reservation is not None
    page = driver.engine.cache.pages[reservation.pages[0]]
    page[0, 0, 0, 0, 0], page[0, 0, 0, 0, 1] = 10, 1
    page[0, 1, 0, 0, 0], page[0, 1, 0, 0, 1] = -10, -1
    driver.engine.imported("a", POISON)
    driver.run()
    assert driver.outputs["a"][0].index == 1
    assert driver.finish("a") is FinishReason.FAILED
    driver.assert_all_free()


def test_stats_count():
    driver = Driver(fake_engine(num_pages=8))
    driver.serve(request("a", prompt(100), greedy(3, ignore_eos=True)))
    driver.serve(request("b", prompt(100), greedy(3, ignore_eos=True)))
    stats = driver.engine.stats()
    assert (stats.num_pages, stats.num_free_pages) == (8, 8)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (200, 6)
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (200, 64)


def test_a_request_is_started_and_counted_once_in_spite_of_preemption():
    driver = Driver(fake_engine(num_pages=3, max_batch_tokens=200))
    driver.serve(
        request("a", prompt(62, 100), greedy(70, ignore_eos=True)),
        request("b", prompt(62, 300), greedy(70, ignore_eos=True)),
    )
    assert driver.engine.stats().num_preemptions > 0
    assert driver.started == ["a", "b"]
    assert driver.engine.stats().num_prompt_tokens == 124
    assert driver.engine.stats().num_prefix_queries == 124


# Chunks and holds.


def test_on_chunk_takes_hold_kv():
    with pytest.raises(ValueError, match="hold_kv"):
        fake_engine().add(request("a", prompt(3), greedy(9), on_chunk=lambda *_: None))


def test_a_chunk_is_told_of_before_its_batch_is_launched():
    engine = fake_engine(max_batch_tokens=64)
    told = []

    def on_chunk(chunk, pages):
        kv = engine.cache.pages[list(pages), 0, 0, :, 0, 0].flatten()
        told.append((chunk.start, chunk.end, (kv[chunk.start : chunk.end] == 0).all().item()))

    engine.add(request("a", prompt(100), greedy(9), hold_kv=True, on_chunk=on_chunk))
    engine.step()
    assert told == [(0, 64, True), (64, 100, True)]


def test_all_layers_are_done_when_the_batch_has_been_collected():
    driver = Driver(fake_engine(max_batch_tokens=64))
    driver.add(request("a", prompt(100), greedy(9), hold_kv=True))
    driver.step()
    first, second = driver.chunks["a"]
    assert (first.layers.num_done(), second.layers.num_done()) == (1, 0)
    driver.step()
    assert second.layers.num_done() == 1


def test_a_failed_request_that_holds_keeps_its_pages_and_nobody_finds_them():
    driver = Driver(fake_engine(num_pages=4, poison_token_id=POISON, max_batch_tokens=128))
    bad = token_ids([*prompt(149), POISON])
    driver.serve(request("bad", bad, greedy(9), hold_kv=True))
    assert driver.finish("bad") is FinishReason.FAILED
    assert (driver.engine.stats().num_held, driver.engine.stats().num_free_pages) == (1, 1)
    assert driver.blocks == set()
    driver.engine.add(request("other", prompt(149), greedy(3)))
    assert not driver.engine.has_work()
    driver.abort("bad")
    driver.run()
    assert driver.tokens("other") == fake_answer(prompt(149), 149, greedy(3))
    driver.assert_all_free()


def test_who_waits_for_a_block_of_a_held_request_that_failed_computes_it():
    driver = Driver(fake_engine(poison_token_id=POISON))
    good = token_ids([*prompt(100), 5])
    driver.serve(
        request("bad", token_ids([*prompt(100), POISON]), greedy(9), hold_kv=True), request("good", good, greedy(3))
    )
    assert driver.finish("bad") is FinishReason.FAILED
    assert driver.tokens("good") == fake_answer(good, 101, greedy(3))
    driver.abort("bad")
    driver.assert_all_free()


# Imports.


@pytest.mark.parametrize(("max_tokens", "fits"), [(2, False), (3, True)])
def test_an_import_leaves_a_token_to_make_behind_the_one_that_comes(max_tokens, fits):
    engine = fake_engine()
    wanted = request("a", prompt(4), greedy(max_tokens), prompt_len=3)
    if fits:
        assert engine.reserve(wanted) is not None
    else:
        with pytest.raises(ValueError, match="max_tokens is 2 and 2 tokens are made already"):
            engine.reserve(wanted)
        engine.add(wanted)


def test_an_imported_token_must_be_of_the_vocabulary():
    driver = Driver(fake_engine())
    assert driver.engine.reserve(request("a", prompt(3), greedy(9))) is not None
    for token_id in (-1, 1000):
        with pytest.raises(ValueError, match=f"token_id is {token_id}"):
            driver.engine.imported("a", token_id)
    assert driver.engine.stats().num_importing == 1
    with pytest.raises(KeyError):
        driver.engine.imported("b", 5)
    driver.engine.abort("a")
    driver.assert_all_free()


@pytest.mark.parametrize("length", [63, 64, 65, 128])
def test_the_first_token_made_behind_an_import_has_the_next_index(length):
    source, target = Driver(fake_engine()), Driver(fake_engine())
    wanted = request("a", prompt(length), greedy(9, ignore_eos=True), prompt_len=length - 2)
    source.serve(replace(wanted, hold_kv=True))
    reservation = target.engine.reserve(wanted)
    copy_pages(source.engine, source.held_pages["a"], target.engine, reservation.pages)
    target.engine.imported("a", *source.tokens("a"))
    target.run()
    assert [output.index for output in (*source.outputs["a"], *target.outputs["a"])] == list(range(2, 9))
    assert source.tokens("a") + target.tokens("a") == fake_answer(wanted.ids, length - 2, wanted.sampling)


def test_all_blocks_are_what_whoever_heard_nothing_must_know():
    driver = Driver(fake_engine(num_pages=8))
    driver.serve(request("a", prompt(200), greedy(1)))
    driver.serve(request("b", prompt(500), greedy(1)))
    everything = driver.engine.take_all_blocks()
    assert set(everything.stored) == driver.blocks
    assert (everything.evicted, everything.host_stored, everything.host_evicted) == ((), (), ())
    driver.engine.add(request("c", prompt(64, 700), greedy(1)))
    while driver.engine.has_work():
        driver.engine.step()
    assert driver.engine.take_all_blocks() != everything
    assert driver.engine.take_block_changes() == BlockChanges(), "they were told with the others"


# One batch ahead.


def test_a_step_launches_the_next_batch_before_it_takes_the_tokens_of_one():
    driver = Driver(fake_engine(max_batch_tokens=64))
    driver.engine.add(request("a", prompt(100), greedy(2, ignore_eos=True)))
    driver.engine.add(request("b", prompt(10, 500), greedy(1)))
    sizes = [(step.num_batch_tokens, step.started, [token.key for token in step.tokens]) for step in _steps(driver)]
    assert sizes == [(64, ("a", "b"), []), (46, (), ["a", "b"]), (1, (), ["a"])]


def test_a_step_tells_the_work_of_the_batch_that_it_waited_for():
    driver = Driver(fake_engine(max_batch_tokens=64))
    driver.engine.add(request("a", prompt(100), greedy(3, ignore_eos=True)))
    driver.engine.add(request("b", prompt(10, 500), greedy(2, ignore_eos=True)))
    steps = _steps(driver)
    assert [step.work for step in steps] == [
        StepWork(num_prompt_tokens=64, num_pairs=64 * 65 // 2),
        StepWork(num_prompt_tokens=36 + 10, num_pairs=36 * 64 + 36 * 37 // 2 + 10 * 11 // 2),
        StepWork(num_rows=2, num_context_tokens=101 + 11),
        StepWork(num_rows=1, num_context_tokens=102),
    ]
    assert [step.num_in_flight for step in steps] == [1, 1, 1, 0]


def test_the_row_behind_an_end_is_thrown_away():
    driver = Driver(fake_engine())
    driver.engine.add(request("a", token_ids([10, END_AT, 1]), greedy(9)))
    steps = _steps(driver)
    assert [len(step.tokens) for step in steps] == [1, 1, 0]
    assert driver.finish("a") is FinishReason.STOP
    assert driver.engine.stats().num_generated_tokens == 2
    driver.assert_all_free()


def test_an_abort_under_a_batch_in_flight_frees_the_pages_with_the_next_step():
    driver = Driver(fake_engine(num_pages=4))
    driver.engine.add(request("a", prompt(100), greedy(9)))
    driver.step()
    driver.engine.abort("a")
    assert (driver.engine.stats().num_running, driver.engine.stats().num_free_pages) == (0, 2)
    assert driver.engine.has_work()
    assert driver.step().tokens == ()
    assert not driver.engine.has_work()
    driver.assert_all_free()


def _steps(driver):
    steps = []
    while driver.engine.has_work():
        steps.append(driver.step())
    return steps
