"""The runner on the device's own state against the torch runner: equal tokens, and nothing sent in a steady step."""

import gc
import weakref
from random import Random
from threading import Thread

import pytest
import torch

from shared.blocks import token_ids
from shared.engine.engine import PagedEngine
from shared.engine.late_work import LateWork
from shared.engine.port import EngineLimits
from shared.engine.sampling.torch_sampler import NOT_FINITE
from shared.engine.step_times import measure_steps
from shared.engine.torch_runner import TorchRunner
from shared.engine.triton_runner import TritonRunner
from shared.engine.weights import load_checkpoint
from shared.request import FinishReason, SamplingParams
from tests.engine_driver import Driver, copy_pages, greedy, request
from tests.reference_layers import use_reference_layers
from tests.tiny_checkpoints import TinyCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD_DIM_64 = (("head_dim", 64),)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoints):
    return load_checkpoint(tiny_checkpoints.get(TinyCheckpoint(overrides=HEAD_DIM_64)), "float32", DEVICE)


@pytest.fixture
def fast_layers(monkeypatch):
    if DEVICE.type == "cpu":
        use_reference_layers(monkeypatch)


def engine_of(checkpoint, make_runner, *, num_pages=40, max_running=4, max_batch_tokens=256):
    config = checkpoint.config
    model = checkpoint.model("tiny")
    limits = EngineLimits(config.max_context, num_pages, max_running, max_batch_tokens)
    return PagedEngine(make_runner(checkpoint, num_pages, max_running, max_batch_tokens), model, limits)


def triton(checkpoint, num_pages, max_running, max_batch_tokens):
    return TritonRunner(
        checkpoint, num_pages, max_running=max_running, max_batch_tokens=max_batch_tokens, max_context=1024
    )


def reference(checkpoint, num_pages, max_running, max_batch_tokens):
    return TorchRunner(checkpoint, num_pages)


def prompt(length, seed=0):
    rng = Random(1000 * seed + length)
    return token_ids(rng.randrange(3, 300) for _ in range(length))


def answers(checkpoint, wanted):
    """What the torch runner answers to each alone."""
    return [Driver(engine_of(checkpoint, reference)).serve(each)[0] for each in wanted]


def assert_same_answers(checkpoint, driver, wanted):
    assert [driver.tokens(each.key) for each in wanted] == answers(checkpoint, wanted)
    driver.assert_all_free()


def greedy_and_sampled(lengths, max_tokens=6, **changes):
    return [
        request(
            f"r{number}",
            prompt(length),
            SamplingParams(max_tokens=max_tokens, temperature=number % 2, seed=number, top_p=0.9, top_k=50, **changes),
            choice=number % 3,
        )
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_kernels_together_answer_as_torch(tiny_checkpoints, family):
    tiny = tiny_checkpoints.get(TinyCheckpoint(family, overrides=HEAD_DIM_64))
    checkpoint = load_checkpoint(tiny, "float32", DEVICE)
    wanted = greedy_and_sampled([2, 65], max_tokens=3)
    driver = Driver(engine_of(checkpoint, triton))
    driver.serve(*wanted)
    assert_same_answers(checkpoint, driver, wanted)


@pytest.mark.usefixtures("fast_layers")
@pytest.mark.parametrize("max_batch_tokens", [16, 256])
def test_mixed_batches_and_chunks_with_seats_taken_again(checkpoint, max_batch_tokens):
    wanted = greedy_and_sampled([1, 2, 63, 64, 65, 100, 129])
    driver = Driver(engine_of(checkpoint, triton, max_batch_tokens=max_batch_tokens))
    driver.serve(*wanted)
    assert_same_answers(checkpoint, driver, wanted)


@pytest.mark.usefixtures("fast_layers")
def test_preempted_sequences_go_on_right(checkpoint):
    wanted = greedy_and_sampled([60, 62, 63], max_tokens=8, ignore_eos=True)
    driver = Driver(engine_of(checkpoint, triton, num_pages=4))
    driver.serve(*wanted)
    assert driver.engine.stats().num_preemptions > 0
    assert_same_answers(checkpoint, driver, wanted)


@pytest.mark.usefixtures("fast_layers")
def test_an_imported_sequence_goes_on_from_the_token_it_came_with(checkpoint):
    (wanted,) = greedy_and_sampled([70])
    (expected,) = answers(checkpoint, [wanted])
    source, target = (Driver(engine_of(checkpoint, triton)) for _ in range(2))
    target.serve(request("before", prompt(9), greedy(3)))  # its seat is taken again
    source.add(request("r0", wanted.ids, wanted.sampling, hold_kv=True))
    source.run()
    reservation = target.engine.reserve(wanted)
    copy_pages(source.engine, source.held_pages["r0"], target.engine, reservation.pages)
    target.engine.imported("r0", *source.tokens("r0"))
    target.run()
    assert source.tokens("r0") + target.tokens("r0") == expected


@pytest.mark.usefixtures("fast_layers")
def test_penalties_forbidden_ends_and_log_probabilities(checkpoint):
    """Beside a plain request, one behind the other in the same seats."""
    plain = answers(checkpoint, [request("r", prompt(20), greedy(6, ignore_eos=True))])[0]
    wanted = [
        request("penalised", prompt(20), greedy(6, repetition_penalty=1.8, presence_penalty=0.5, ignore_eos=True)),
        request("plain", prompt(20), greedy(6, ignore_eos=True)),
        request("late", prompt(20), greedy(6, min_tokens=4, stop_token_ids=(plain[1],))),
        request("told", prompt(21), SamplingParams(max_tokens=3, temperature=0.8, seed=5, logprobs=3)),
        request("again", prompt(22), greedy(4, frequency_penalty=1.5)),
    ]
    ours, theirs = (Driver(engine_of(checkpoint, make_runner, max_running=2)) for make_runner in (triton, reference))
    assert ours.serve(*wanted) == theirs.serve(*wanted)
    for our, their in zip(ours.outputs["told"], theirs.outputs["told"], strict=True):
        assert our.logprob.logprob == pytest.approx(their.logprob.logprob, abs=1e-4)
        assert [token for token, _ in our.logprob.top] == [token for token, _ in their.logprob.top]
        expected = [logprob for _, logprob in their.logprob.top]
        assert [logprob for _, logprob in our.logprob.top] == pytest.approx(expected, abs=1e-4)
    assert all(output.logprob is None for output in ours.outputs["plain"])


@pytest.mark.usefixtures("fast_layers")
def test_a_steady_step_sends_nothing(checkpoint):
    runner = triton(checkpoint, 40, 4, 256)
    engine = engine_of(checkpoint, lambda *_: runner)
    for number in range(3):
        engine.add(request(f"r{number}", prompt(5 + number), greedy(20, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    before = runner.num_uploads
    for _ in range(10):
        assert len(engine.step().tokens) == 3
    assert runner.num_uploads == before


@pytest.mark.usefixtures("fast_layers")
def test_a_row_with_nan_fails_alone_and_its_pages_serve_others(checkpoint):
    engine = engine_of(checkpoint, triton)
    driver = Driver(engine)
    spoilt, healthy = request("spoilt", prompt(63), greedy(9)), request("healthy", prompt(64, 1), greedy(9))
    engine.add(spoilt)
    engine.add(healthy)
    driver.step()
    page = next(sequence.pages[0] for sequence in engine._scheduler._sequences.values() if sequence.request is spoilt)
    engine.cache.pages[page, 0, :, 10] = float("nan")
    driver.run()
    failed = driver.outputs["spoilt"][-1]
    assert (failed.finish, failed.error) == (FinishReason.FAILED, NOT_FINITE)
    assert_same_answers(checkpoint, driver, [healthy])
    engine.cache.pages.fill_(float("nan"))  # all that failed requests could have left behind
    heirs = [request(f"heir{length}", prompt(length, 2), greedy(3)) for length in (2, 65, 130)]
    driver.serve(*heirs)
    assert_same_answers(checkpoint, driver, heirs)


@pytest.mark.usefixtures("fast_layers")
def test_warm_up_leaves_pages_and_answers_alone(checkpoint):
    runner = triton(checkpoint, 40, 4, 64)
    runner.cache.pages.fill_(7.0)
    runner.warm_up()
    assert (runner.cache.pages == 7.0).all()
    wanted = greedy_and_sampled([3, 66], max_tokens=3)
    driver = Driver(engine_of(checkpoint, lambda *_: runner, max_batch_tokens=64))
    driver.serve(*wanted)
    assert runner.late_work == LateWork(0, 0, 0)
    assert_same_answers(checkpoint, driver, wanted)


@pytest.mark.usefixtures("fast_layers")
def test_steps_that_are_measured_find_all_they_need_and_leave_no_trace(checkpoint):
    runner = triton(checkpoint, 6, 2, 16)
    runner.warm_up()
    engine = engine_of(checkpoint, lambda *_: runner, num_pages=6, max_running=2, max_batch_tokens=16)
    measured = measure_steps(runner, engine.limits, budget_s=1.0, clock_s=lambda: 0.0)
    assert {step.work.num_rows for step in measured} >= {0, 1, 2}
    assert runner.late_work == LateWork(0, 0, 0)
    wanted = [request(name, prompt(20, seed), greedy(3)) for seed, name in enumerate("ab")]
    driver = Driver(engine)
    driver.serve(*wanted)
    assert runner.late_work == LateWork(0, 0, 0)
    assert_same_answers(checkpoint, driver, wanted)


@pytest.mark.usefixtures("fast_layers")
def test_a_short_context_warms_up(checkpoint):
    runner = TritonRunner(checkpoint, 2, max_running=1, max_batch_tokens=4, max_context=64)
    runner.warm_up()
    assert runner.late_work == LateWork(0, 0, 0)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="nothing is compiled or allocated on a CPU")
def test_after_the_warm_up_steps_of_any_size_find_all_they_need(checkpoint):
    """On a thread that computed nothing before: cuBLAS has its memory by thread."""
    runner = triton(checkpoint, 400, 24, 900)
    runner.warm_up()
    driver = Driver(engine_of(checkpoint, lambda *_: runner, num_pages=400, max_running=24, max_batch_tokens=900))
    plain = greedy_and_sampled(range(1, 900, 23), max_tokens=9)
    penalised = [request(f"p{length}", prompt(length), greedy(9, presence_penalty=0.5)) for length in range(1, 900, 97)]
    thread = Thread(target=lambda: driver.serve(*plain, *penalised))
    thread.start()
    thread.join()
    driver.assert_all_free()
    assert runner.late_work == LateWork(0, 0, 0)


def test_an_empty_batch_is_no_work(checkpoint):
    assert triton(checkpoint, 4, 4, 64).launch(()).wait() == []


@pytest.mark.usefixtures("fast_layers")
def test_a_runner_goes_with_its_last_user(checkpoint):
    """Not with the next collection of garbage: on a GPU its graphs and memory may go only between steps of others."""
    engine = engine_of(checkpoint, triton)
    Driver(engine).serve(request("a", token_ids(range(3, 70)), greedy(3)))
    runner = weakref.ref(engine._runner)
    gc.disable()
    try:
        del engine
        assert runner() is None
    finally:
        gc.enable()
