"""What every engine does: one suite over the fake runner and, with a tiny checkpoint, the torch and Triton runners."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol

import pytest
import torch

from shared.blocks import PAGE_TOKENS, TokenIds, name_of, token_ids
from shared.engine.batch import Runner
from shared.engine.engine import PagedEngine
from shared.engine.fake import fake_answer, fake_engine
from shared.engine.port import EngineLimits, EngineRequest, Reservation
from shared.engine.torch_runner import TorchRunner
from shared.engine.triton_runner import TritonRunner
from shared.engine.weights import Checkpoint, load_checkpoint
from shared.kv.host_pages import PinnedPages
from shared.kv.paged_cache import PagedCache
from shared.request import FinishReason, SamplingParams
from tests.engine_driver import Driver, copy_pages, greedy, request
from tests.late_host_pages import LateHostPages
from tests.reference_layers import use_reference_layers
from tests.tiny_checkpoints import TinyCheckpoint, write_tiny_checkpoint

EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 200]
"""Prompt lengths at and beside page borders."""

FEW_EDGES = [1, 63, 64, 65, 127]

ENOUGH_OPERATIONS = 100
"""So many at random preempt someone."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of Triton's interpreter


class EngineKind(Protocol):
    """One implementation under test.

    Attributes:
        lengths: of prompts, at and beside page borders.
        num_new: tokens of an answer.
        random_operations: how many a random run makes.
    """

    vocab_size: int
    lengths: list[int]
    num_new: int
    random_operations: int

    def make(
        self, *, num_pages: int = 64, max_running: int = 8, max_batch_tokens: int = 256, num_host_pages: int = 0
    ) -> PagedEngine: ...

    def answer(self, wanted: EngineRequest) -> list[int]:
        """The right tokens, from a source as far from the scheduler as there is."""
        ...


@dataclass
class FakeKind:
    num_ahead: int
    vocab_size = 900  # below the id that asks for an end
    lengths = EDGES
    num_new = 20
    random_operations = 1500

    def make(self, *, num_pages=64, max_running=8, max_batch_tokens=256, num_host_pages=0):
        return fake_engine(
            num_pages=num_pages,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            num_ahead=self.num_ahead,
            num_host_pages=num_host_pages,
            host_pages=late_host_pages,
        )

    def answer(self, wanted):
        return fake_answer(wanted.ids, wanted.prompt_len, wanted.sampling, wanted.choice)


@dataclass
class TorchKind:
    """Answers come from a roomy engine that serves one request at a time: the runner's own tests hold it to
    transformers.
    """

    checkpoint: Checkpoint
    lengths = EDGES
    num_new = 20
    random_operations = 300

    def __post_init__(self):
        self._answers: dict[tuple[bytes, int, SamplingParams, int], list[int]] = {}

    @property
    def vocab_size(self):
        return self.checkpoint.config.vocab_size

    def make(self, *, num_pages=64, max_running=8, max_batch_tokens=256, num_host_pages=0):
        limits = EngineLimits(1024, num_pages, max_running, max_batch_tokens, num_host_pages)
        return self._engine(self._runner(limits), limits)

    def answer(self, wanted):
        known = wanted.ids.tobytes(), wanted.prompt_len, wanted.sampling, wanted.choice
        if known not in self._answers:
            limits = EngineLimits(1024, 16, 1, 1024)
            driver = Driver(self._engine(TorchRunner(self.checkpoint, 16), limits))
            self._answers[known] = driver.serve(wanted)[0]
        return self._answers[known]

    def _runner(self, limits: EngineLimits) -> Runner:
        return TorchRunner(self.checkpoint, limits.num_pages)

    def _engine(self, runner: Runner, limits: EngineLimits) -> PagedEngine:
        host_pages = late_host_pages if runner.cache.device.type == "cpu" else PinnedPages
        return PagedEngine(runner, self.checkpoint.model("tiny"), limits, host_pages=host_pages)


class TritonKind(TorchKind):
    """One batch ahead, with graphs on a GPU; answers come from the torch runner."""

    def _runner(self, limits):
        runner = TritonRunner(
            self.checkpoint,
            limits.num_pages,
            max_running=limits.max_running,
            max_batch_tokens=limits.max_batch_tokens,
            max_context=limits.max_context,
        )
        if self.checkpoint.decoder.device.type == "cuda":
            runner.warm_up()
        return runner


class InterpretedKind(TritonKind):
    """The same on a CPU, where a step takes 25 ms."""

    lengths = FEW_EDGES
    num_new = 6
    random_operations = 30


FAKES = {"fake": FakeKind(num_ahead=0), "fake-ahead": FakeKind(num_ahead=1)}
ON_GPU = {"torch-cuda": TorchKind, "triton-cuda": TritonKind} if torch.cuda.is_available() else {}
ON_CPU = {"torch-cpu": TorchKind} | ({} if ON_GPU else {"triton-interpreter": InterpretedKind})


def late_host_pages(cache: PagedCache, num_slots: int) -> LateHostPages:
    """A copy ends between two steps, not at once."""
    return LateHostPages(cache, num_slots, max_looks=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tiny = TinyCheckpoint(overrides=(("head_dim", 64),))  # the smallest that the Triton kernels take
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tiny)


def with_checkpoint(folder: Path, name: str) -> TorchKind:
    device = torch.device("cuda" if name in ON_GPU else "cpu")
    return (ON_GPU | ON_CPU)[name](load_checkpoint(folder, "float32", device))


@pytest.fixture(scope="module", params=[*FAKES, *ON_CPU, *ON_GPU])
def kind(request, folder) -> Iterator[EngineKind]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "triton-interpreter":
            use_reference_layers(patch)
        yield FAKES.get(request.param) or with_checkpoint(folder, request.param)


def prompt(kind: EngineKind, length: int, seed: int = 0) -> TokenIds:
    rng = Random(seed)
    return token_ids(rng.randrange(3, kind.vocab_size) for _ in range(length))


def mixed_requests(kind: EngineKind, max_tokens: int | None = None) -> list[EngineRequest]:
    """Prompts of all lengths; every other one sampled."""
    return [
        request(
            f"r{number}",
            prompt(kind, length, seed=length),
            SamplingParams(max_tokens=max_tokens or kind.num_new, temperature=number % 2, seed=number),
            choice=number % 3,
        )
        for number, length in enumerate(kind.lengths)
    ]


def assert_right(kind: EngineKind, driver: Driver, wanted: EngineRequest) -> None:
    assert driver.tokens(wanted.key) == kind.answer(wanted), wanted.key


# The same tokens, whatever the company.


def test_alone(kind):
    for wanted in mixed_requests(kind):
        driver = Driver(kind.make())
        driver.serve(wanted)
        assert_right(kind, driver, wanted)
        driver.assert_all_free()


@pytest.mark.parametrize("max_batch_tokens", [16, 64, 100, 2048])
def test_in_mixed_batches_and_chunks(kind, max_batch_tokens):
    driver = Driver(kind.make(max_batch_tokens=max_batch_tokens))
    wanted = mixed_requests(kind)
    driver.serve(*wanted)
    for each in wanted:
        assert_right(kind, driver, each)
    assert sorted(driver.started) == sorted(each.key for each in wanted)
    assert max(driver.batch_sizes) <= max_batch_tokens
    driver.assert_all_free()


def test_joining_a_running_batch(kind):
    driver = Driver(kind.make())
    wanted = mixed_requests(kind)
    for each in wanted:
        driver.engine.add(each)
        driver.step()
    driver.run()
    for each in wanted:
        assert_right(kind, driver, each)


def test_preempted(kind):
    driver = Driver(kind.make(num_pages=7))
    wanted = mixed_requests(kind, max_tokens=3 * kind.num_new)
    driver.serve(*wanted)
    assert driver.engine.stats().num_preemptions > 0
    for each in wanted:
        assert_right(kind, driver, each)
    driver.assert_all_free()


def test_behind_accepted_tokens(kind):
    whole = request("whole", prompt(kind, 70), SamplingParams(max_tokens=20, seed=4, ignore_eos=True))
    answer = kind.answer(whole)
    driver = Driver(kind.make())
    driver.engine.add(
        request("rest", token_ids([*whole.ids, *answer[:12]]), whole.sampling, prompt_len=whole.prompt_len)
    )
    driver.run()
    assert driver.tokens("rest") == answer[12:]
    assert driver.outputs["rest"][0].index == 12


@pytest.mark.parametrize("num_accepted", [1, 11, 57])
def test_all_that_depends_on_the_answer_goes_on_behind_accepted_tokens(folder, num_accepted):
    """On other workers: penalties, `min_tokens`, draws and log probabilities are those of the undisturbed answer."""
    kind = with_checkpoint(folder, "torch-cuda" if ON_GPU else "torch-cpu")
    ids = prompt(kind, 70)
    sampling = SamplingParams(
        max_tokens=60,
        min_tokens=60,
        seed=4,
        temperature=0.8,
        top_p=0.95,
        top_k=40,
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=0.7,
        stop_token_ids=tuple(range(3, 35)),
        logprobs=3,
    )
    whole = Driver(kind.make())
    whole.serve(request("whole", ids, sampling, choice=1))
    answer = whole.tokens("whole")
    assert len(answer) == 60
    plain = replace(sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    assert answer != kind.answer(request("plain", ids, plain, choice=1)), "the penalties change nothing here"
    rest = request("rest", token_ids([*ids, *answer[:num_accepted]]), sampling, choice=1, prompt_len=len(ids))
    other = request("other", prompt(kind, 33, seed=9), greedy(30))
    alone, source, target = (Driver(kind.make(max_batch_tokens=64)) for _ in range(3))
    alone.serve(other, rest)
    target.add(other)
    hand_over(source, target, rest)
    target.run()
    for outputs in (alone.outputs["rest"], source.outputs["rest"] + target.outputs["rest"]):
        assert [output.index for output in outputs] == list(range(num_accepted, 60))
        assert [output.token_id for output in outputs] == answer[num_accepted:]
        assert outputs[-1].finish is FinishReason.LENGTH
        for made, wanted in zip(outputs, whole.outputs["whole"][num_accepted:], strict=True):
            assert made.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-4)
            assert [token_id for token_id, _ in made.logprob.top] == [token_id for token_id, _ in wanted.logprob.top]


# Prefixes.


def test_a_prefix_is_computed_once(kind):
    driver = Driver(kind.make())
    shared = prompt(kind, 130)
    first = request("first", token_ids([*shared, 5, 6]), greedy(5))
    second = request("second", token_ids([*shared, 7, 8, 9]), greedy(5))
    driver.serve(first)
    driver.serve(second)
    assert driver.num_cached_tokens("first") == 0
    assert driver.num_cached_tokens("second") == 128
    assert_right(kind, driver, second)


@pytest.mark.parametrize("length", [64, 65, 128, 129])
def test_the_last_token_is_always_computed(kind, length):
    driver = Driver(kind.make())
    wanted = [request(f"r{number}", prompt(kind, length), greedy(5)) for number in range(2)]
    for each in wanted:
        driver.serve(each)
    assert driver.num_cached_tokens("r1") == (length - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert_right(kind, driver, wanted[1])


def test_an_answer_is_found_by_the_next_turn(kind):
    driver = Driver(kind.make())
    (answer,) = driver.serve(request("first", prompt(kind, 60), greedy(80, ignore_eos=True)))
    second = request("second", token_ids([*prompt(kind, 60), *answer, 5]), greedy(5))
    driver.serve(second)
    assert driver.num_cached_tokens("second") == 128
    assert_right(kind, driver, second)


def test_a_prefix_in_flight_is_not_computed_again(kind):
    driver = Driver(kind.make(max_batch_tokens=64))
    wanted = [request(f"r{number}", prompt(kind, 200), greedy(3), choice=number) for number in range(4)]
    driver.serve(*wanted)
    assert [driver.num_cached_tokens(each.key) for each in wanted] == [0, 192, 192, 192]
    assert sum(driver.batch_sizes) == 200 + 3 * 8 + 4 * 2
    for each in wanted:
        assert_right(kind, driver, each)


def test_salts_do_not_share(kind):
    driver = Driver(kind.make())
    driver.serve(request("a", prompt(kind, 100), greedy(3), cache_salt="one"))
    driver.serve(request("b", prompt(kind, 100), greedy(3), cache_salt="two"))
    assert driver.num_cached_tokens("b") == 0


def test_evicted_blocks_are_computed_again(kind):
    driver = Driver(kind.make(num_pages=4))
    first = request("first", prompt(kind, 200, seed=1), greedy(3))
    driver.serve(first)
    driver.serve(request("other", prompt(kind, 200, seed=2), greedy(3)))
    again = request("again", first.ids, greedy(3))
    driver.serve(again)
    assert driver.num_cached_tokens("again") == 0
    assert driver.tokens("again") == driver.tokens("first") == kind.answer(again)
    driver.assert_all_free()


# Hand-over.


@pytest.mark.parametrize("length", EDGES)
def test_handed_over(kind, length):
    source, target = Driver(kind.make()), Driver(kind.make())
    wanted = request("r", prompt(kind, length), SamplingParams(max_tokens=kind.num_new, seed=3))
    hand_over(source, target, wanted)
    target.run()
    assert source.tokens("r") + target.tokens("r") == kind.answer(wanted)
    source.assert_all_free()
    target.assert_all_free()


def test_handed_over_next_to_a_cached_prefix(kind):
    source, target = Driver(kind.make()), Driver(kind.make())
    target.serve(request("before", prompt(kind, 150), greedy(3)))
    wanted = request("r", token_ids([*prompt(kind, 150), 5, 6]), greedy(20))
    assert hand_over(source, target, wanted) == 2
    target.run()
    assert source.tokens("r") + target.tokens("r") == kind.answer(wanted)
    assert target.num_cached_tokens("r") == 128
    assert target.started == ["before"]


def test_handed_over_into_a_batch_and_preempted_there(kind):
    source, target = Driver(kind.make()), Driver(kind.make(num_pages=5))
    local = request("local", prompt(kind, 120, seed=1), greedy(30, ignore_eos=True))
    wanted = request("r", prompt(kind, 130), greedy(30, ignore_eos=True))
    target.engine.add(local)
    target.step()
    hand_over(source, target, wanted)
    target.run()
    assert target.engine.stats().num_preemptions > 0
    assert source.tokens("r") + target.tokens("r") == kind.answer(wanted)
    assert_right(kind, target, local)


def fill_from(source: Driver, target: Driver, wanted: EngineRequest, num_pages: int) -> int:
    """Bring the prompt's first pages, as far as the source has them, and add the request; how many came."""
    fill = target.engine.fill(wanted, num_pages)
    assert fill is not None
    target.add(wanted)
    target.run()
    assert wanted.key not in target.started
    loan = source.engine.lend([name_of(key) for key in fill.keys])
    num_arrived = len(loan.pages)
    assert loan.keys == fill.keys[:num_arrived]
    target.engine.cache.pages[list(fill.pages[:num_arrived])] = source.engine.cache.pages[list(loan.pages)]
    source.engine.give_back(loan)
    target.engine.filled(fill, num_arrived)
    return num_arrived


@pytest.mark.parametrize("hold_kv", [False, True])
@pytest.mark.parametrize("num_pages", [1, 3, 9])
def test_what_a_fill_brought_is_not_computed(kind, num_pages, hold_kv):
    source, target = Driver(kind.make()), Driver(kind.make())
    source.serve(request("before", prompt(kind, 200), greedy(1)))
    wanted = request("r", token_ids([*prompt(kind, 200), 5, 6]), greedy(kind.num_new), hold_kv=hold_kv)
    num_arrived = fill_from(source, target, wanted, num_pages)
    assert num_arrived == min(num_pages, 3)
    target.run()
    assert target.tokens("r") == kind.answer(request("r", wanted.ids, wanted.sampling))[: 1 if hold_kv else None]
    assert target.num_cached_tokens("r") == num_arrived * PAGE_TOKENS
    target.abort("r")
    source.assert_all_free()
    target.assert_all_free()


def test_what_a_fill_did_not_bring_is_computed(kind):
    source, target = Driver(kind.make()), Driver(kind.make())
    wanted = request("r", prompt(kind, 200), greedy(kind.num_new))
    assert fill_from(source, target, wanted, 3) == 0
    target.run()
    assert target.tokens("r") == kind.answer(wanted)
    target.assert_all_free()


def test_imported_pages_are_a_prefix_for_others(kind):
    source, target = Driver(kind.make()), Driver(kind.make())
    wanted = request("r", prompt(kind, 150), greedy(5))
    hand_over(source, target, wanted)
    local = request("local", token_ids([*wanted.ids, 9]), greedy(5))
    target.serve(local)
    assert target.num_cached_tokens("local") == 128
    assert_right(kind, target, local)


def test_imported_pages_that_are_not_exact_are_found_by_nobody(kind):
    source, target = Driver(kind.make()), Driver(kind.make())
    wanted = request("r", prompt(kind, 120), greedy(12, ignore_eos=True))
    hand_over(source, target, wanted, exact=False)
    target.run()
    assert source.tokens("r") + target.tokens("r") == kind.answer(wanted)
    assert target.blocks == set()
    target.assert_all_free()


def test_what_was_not_exact_is_when_it_is_computed_again(kind):
    source, target = Driver(kind.make()), Driver(kind.make(num_pages=5))
    local = request("local", prompt(kind, 120, seed=1), greedy(30, ignore_eos=True))
    wanted = request("r", prompt(kind, 130), greedy(30, ignore_eos=True))
    target.add(local)
    target.step()
    hand_over(source, target, wanted, exact=False)
    target.run()
    assert target.engine.stats().num_preemptions > 0
    assert source.tokens("r") + target.tokens("r") == kind.answer(wanted)
    assert_right(kind, target, local)
    again = request("again", wanted.ids, greedy(1))
    target.serve(again)
    assert target.num_cached_tokens("again") == 128


def test_held_pages_stay_until_released_and_are_a_prefix_meanwhile(kind):
    driver = Driver(kind.make(num_pages=4))
    driver.serve(request("held", prompt(kind, 150), greedy(5, ignore_eos=True), hold_kv=True))
    pages = driver.held_pages["held"]
    assert len(pages) == 3
    assert not driver.engine.has_work()
    before = driver.engine.cache.pages[list(pages)].clone()
    other = request("other", prompt(kind, 129), greedy(3))
    driver.serve(other)
    assert driver.num_cached_tokens("other") == 128
    assert_right(kind, driver, other)
    waiting = request("waiting", prompt(kind, 100, seed=9), greedy(3))
    driver.serve(waiting)
    assert driver.tokens("waiting") == []
    assert torch.equal(driver.engine.cache.pages[list(pages)], before)
    driver.abort("held")
    driver.run()
    assert_right(kind, driver, waiting)
    driver.assert_all_free()


def test_a_first_token_that_ends_the_choice_keeps_the_pages_until_they_are_released(kind):
    driver = Driver(kind.make())
    first_token = kind.answer(request("r", prompt(kind, 70), greedy(1)))[0]
    driver.serve(
        request("length", prompt(kind, 70), greedy(1), hold_kv=True),
        request("stop", prompt(kind, 70), greedy(9, stop_token_ids=(first_token,)), hold_kv=True),
    )
    assert [driver.finish(key) for key in ("length", "stop")] == [FinishReason.LENGTH, FinishReason.STOP]
    assert driver.engine.stats().num_held == 2
    assert not driver.engine.has_work()
    for key in ("length", "stop"):
        driver.abort(key)
    driver.assert_all_free()


@pytest.mark.parametrize("cached", [0, 64, 128])
def test_each_chunk_is_told_of_when_it_is_launched(kind, cached):
    driver = Driver(kind.make(max_batch_tokens=50))
    ids = prompt(kind, 150)
    if cached:
        driver.serve(request("before", ids[: cached + 1], greedy(1)))
    beside = request("beside", prompt(kind, 20, seed=1), greedy(9, ignore_eos=True))
    driver.add(beside)
    driver.step()
    driver.serve(request("r", ids, greedy(5), hold_kv=True))
    spans = [(chunk.start, chunk.end) for chunk in driver.chunks["r"]]
    assert spans[0][0] == cached
    assert spans[-1][1] == 150
    assert len(spans) == -(-(150 - cached) // 49)
    driver.abort("r")
    assert_right(kind, driver, beside)
    driver.assert_all_free()


# Ends.


def test_max_tokens_one(kind):
    driver = Driver(kind.make())
    (tokens,) = driver.serve(request("r", prompt(kind, 10), greedy(1, ignore_eos=True)))
    assert len(tokens) == 1
    assert driver.finish("r") is FinishReason.LENGTH
    driver.assert_all_free()


def test_stop_ids_end_and_min_tokens_forbids_them(kind):
    plain = kind.answer(request("r", prompt(kind, 10), greedy(12, ignore_eos=True)))
    stop_id = plain[3]
    at = plain.index(stop_id)
    driver = Driver(kind.make())
    stopped, late = driver.serve(
        request("stopped", prompt(kind, 10), greedy(12, ignore_eos=True, stop_token_ids=(stop_id,))),
        request("late", prompt(kind, 10), greedy(12, ignore_eos=True, stop_token_ids=(stop_id,), min_tokens=6)),
    )
    assert stopped == plain[: at + 1]
    assert driver.finish("stopped") is FinishReason.STOP
    assert stop_id not in late[:6]
    assert late[:at] == plain[:at]


def test_logprobs(kind):
    driver = Driver(kind.make())
    driver.serve(
        request("none", prompt(kind, 10), greedy(4)),
        request("zero", prompt(kind, 10), greedy(4, logprobs=0)),
        request("three", prompt(kind, 10), greedy(4, logprobs=3)),
    )
    assert all(output.logprob is None for output in driver.outputs["none"])
    assert all(output.logprob is not None and not output.logprob.top for output in driver.outputs["zero"])
    for output in driver.outputs["three"]:
        assert output.logprob is not None
        assert output.logprob.top[0] == (output.token_id, output.logprob.logprob)
        values = [logprob for _, logprob in output.logprob.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] <= 0


def test_what_never_fits_is_refused_and_the_next_is_served(kind):
    driver = Driver(kind.make(num_pages=4))
    with pytest.raises(ValueError, match="num_pages"):
        driver.engine.add(request("big", prompt(kind, 200), greedy(57)))
    with pytest.raises(ValueError, match="max_context"):
        driver.engine.add(request("long", prompt(kind, 200), greedy(10_000)))
    fits = request("fits", prompt(kind, 200), greedy(56))
    driver.serve(fits)
    assert_right(kind, driver, fits)


# Aborts.


@pytest.mark.parametrize("state", ["waiting", "prefilling", "running", "preempted", "held", "importing"])
def test_an_abort_returns_the_pages_in_every_state(kind, state):
    driver = Driver(kind.make(num_pages=6, max_running=2, max_batch_tokens=64))
    engine = driver.engine
    neighbour = request("neighbour", prompt(kind, 60, seed=1), greedy(30, ignore_eos=True))
    engine.add(neighbour)
    driver.step()
    wanted = request("r", prompt(kind, 250, seed=2), greedy(60, ignore_eos=True), hold_kv=state == "held")
    if state == "importing":
        assert engine.reserve(wanted) is not None
    else:
        engine.add(wanted)
    steps = {"waiting": 0, "importing": 0, "prefilling": 2, "running": 6, "held": 6, "preempted": 0}[state]
    for _ in range(steps):
        driver.step()
    while state == "preempted" and engine.stats().num_preemptions == 0:
        driver.step()
    stats = engine.stats()
    expected = {"waiting": (1, 1, 0, 0), "preempted": (1, 1, 0, 0), "prefilling": (0, 2, 0, 0)}
    expected |= {"running": (0, 2, 0, 0), "held": (0, 1, 1, 0), "importing": (0, 1, 0, 1)}
    assert (stats.num_waiting, stats.num_running, stats.num_held, stats.num_importing) == expected[state]
    engine.abort("r")
    engine.check()
    engine.abort("r")
    engine.add(wanted if state != "held" else request("r", wanted.ids, wanted.sampling))
    engine.abort("r")
    driver.run()
    assert_right(kind, driver, neighbour)
    driver.assert_all_free()


def test_conversations_go_on_where_their_history_went_to_the_host(kind):
    """More of them than pages, in turns: each finds its prompts and its answers again, whole, and says the same."""
    num_turns, num_talks, num_pages = (3, 4, 7) if kind.random_operations >= ENOUGH_OPERATIONS else (2, 2, 4)
    driver = Driver(kind.make(num_pages=num_pages, num_host_pages=40))
    histories = [prompt(kind, 120, seed=talk) for talk in range(num_talks)]
    for turn in range(num_turns):
        for talk, history in enumerate(histories):
            wanted = request(f"{talk}.{turn}", history[:], greedy(10, ignore_eos=True), hold_kv=talk % 2 == 1)
            (tokens,) = driver.serve(wanted)
            assert tokens == kind.answer(replace(wanted, hold_kv=False))[: len(tokens)]
            assert driver.num_cached_tokens(wanted.key) == (len(history) - 71) // PAGE_TOKENS * PAGE_TOKENS * (turn > 0)
            driver.abort(wanted.key)
            history.extend(tokens + list(prompt(kind, 70, seed=100 * turn + talk)))
            for _ in range(3):
                driver.step()  # what it leaves is saved meanwhile
    stats = driver.engine.stats()
    assert stats.num_host_hits > 0
    assert stats.num_lost_blocks == 0
    driver.assert_all_free()


@pytest.mark.parametrize("num_host_pages", [0, 8])
def test_random_operations_end_with_all_pages_free(kind, num_host_pages):
    """Two engines that hand over to each other, short of pages; every answer is right, and whole unless given up."""
    if num_host_pages and isinstance(kind, InterpretedKind):
        pytest.skip("a runner knows nothing of host memory, and this one is slow")
    both = HandOverPair(kind, Random(7), num_host_pages)
    for _ in range(kind.random_operations):
        both.do_something()
    both.finish_all()
    for side in both.sides:
        side.assert_all_free()
    for key, wanted in both.requests.items():
        answer = kind.answer(request(key, wanted.ids, wanted.sampling))
        tokens = both.tokens(key)
        assert tokens == (answer[: len(tokens)] if key in both.given_up else answer)
    assert len(both.given_up) < len(both.requests) / 2
    num_preemptions = sum(side.engine.stats().num_preemptions for side in both.sides)
    assert num_preemptions > 0 or kind.random_operations < ENOUGH_OPERATIONS
    num_host_hits = sum(side.engine.stats().num_host_hits for side in both.sides)
    assert (num_host_hits > 0) == (num_host_pages > 0) or kind.random_operations < ENOUGH_OPERATIONS


class HandOverPair:
    """Two engines, requests at both, and pulls between them, all at random.

    Attributes:
        pulls: by key; from some chunk's launch on, perhaps before the first token.
        passed_on: keys whose hold has ended.
        given_up: keys that were aborted, or whose hold ran out.
    """

    def __init__(self, kind: EngineKind, rng: Random, num_host_pages: int) -> None:
        self.kind = kind
        self.rng = rng
        self.sides = (
            Driver(kind.make(num_pages=12, max_running=4, num_host_pages=num_host_pages)),
            Driver(kind.make(num_pages=9, max_running=3, num_host_pages=num_host_pages)),
        )
        self.prompts = [prompt(kind, 260, seed=seed) for seed in range(3)]
        self.requests: dict[str, EngineRequest] = {}
        self.pulls: dict[str, Pull] = {}
        self.passed_on: set[str] = set()
        self.given_up: set[str] = set()

    def do_something(self) -> None:
        side, other = self.rng.sample(self.sides, 2)
        actions = {
            self.add: 10 if side.engine.stats().num_waiting < 4 else 0,
            self.pull: 12,
            self.finish_a_pull: 10,
            self.abort: 1,
            self.let_a_hold_run_out: 1,
            self.step: 60,
        }
        (action,) = self.rng.choices(list(actions), list(actions.values()))
        action(side, other)
        self.drop_what_ended()
        for each in self.sides:
            each.engine.check()

    def step(self, side: Driver, _other: Driver) -> None:
        side.step()

    def add(self, side: Driver, _other: Driver) -> None:
        rng = self.rng
        ids = rng.choice(self.prompts)[: rng.choice([1, 63, 64, 65, 100, 129, 192])]
        ids[-1] = rng.randrange(3, self.kind.vocab_size)
        max_tokens, temperature = rng.choice([1, 3, 40, 90]), rng.choice([0.0, 1.0])
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=rng.randrange(9))
        added = request(f"r{len(self.requests)}", ids, sampling, hold_kv=rng.random() < 0.5)
        self.requests[added.key] = added
        side.add(added)

    def pull(self, target: Driver, source: Driver) -> None:
        if keys := self.held(source):
            key = self.rng.choice(keys)
            reservation = target.engine.reserve(replace(self.requests[key], hold_kv=False))
            if reservation is not None:
                self.pulls[key] = Pull(source, target, reservation)

    def drop_what_ended(self) -> None:
        """A choice that its first token ended is kept by nobody."""
        for side in self.sides:
            for key in list(side.held_pages):
                if key in side.outputs and side.finish(key) is not None:
                    self.pulls.pop(key, None)
                    for each in self.sides:
                        each.abort(key)

    def finish_a_pull(self, *_: Driver) -> None:
        if keys := [key for key, pull in self.pulls.items() if key in pull.source.outputs]:
            key = self.rng.choice(keys)
            pull = self.pulls.pop(key)
            self.passed_on.add(key)
            copy_lacking(pull.source, key, pull.target, pull.reservation)
            pull.target.engine.imported(key, *pull.source.tokens(key), exact=self.rng.random() < 0.7)
            pull.source.abort(key)

    def abort(self, *_: Driver) -> None:
        if self.requests:
            self._give_up(self.rng.choice(list(self.requests)))

    def let_a_hold_run_out(self, side: Driver, _other: Driver) -> None:
        if keys := self.held(side):
            self._give_up(self.rng.choice(keys))

    def finish_all(self) -> None:
        for _ in range(1000):
            if not self.pulls and not any(self.held(side) or side.engine.has_work() for side in self.sides):
                return
            for side, other in (self.sides, self.sides[::-1]):
                side.run()
                self.drop_what_ended()
                self.pull(side, other)
            if not self.pulls:  # both may be full of what the other is to pull
                for side in self.sides:
                    self.let_a_hold_run_out(side, side)
            self.finish_a_pull()
        raise AssertionError("the engines do not come to an end")

    def held(self, side: Driver) -> list[str]:
        """Keys that `side` holds, or will, and nobody pulls."""
        return [key for key in side.held_pages if key not in self.pulls and self.requests[key].sampling.max_tokens > 1]

    def tokens(self, key: str) -> list[int]:
        """All tokens of the request, of both sides, without a gap."""
        outputs = sorted((output for side in self.sides for output in side.outputs.get(key, [])), key=lambda o: o.index)
        assert [output.index for output in outputs] == list(range(len(outputs)))
        return [output.token_id for output in outputs]

    def _give_up(self, key: str) -> None:
        self.pulls.pop(key, None)
        self.given_up.add(key)
        for side in self.sides:
            side.abort(key)


@dataclass
class Pull:
    """A hand-over that has begun: reserved at the target, kept by the source."""

    source: Driver
    target: Driver
    reservation: Reservation


def copy_lacking(source: Driver, key: str, target: Driver, reservation: Reservation) -> None:
    """Copy what `target` did not find from the pages that `source` holds."""
    pages, cached = source.held_pages[key], reservation.num_cached_pages
    assert len(pages) == len(reservation.pages)
    copy_pages(source.engine, pages[cached:], target.engine, reservation.pages[cached:])


def hand_over(source: Driver, target: Driver, wanted: EngineRequest, *, exact: bool = True) -> int:
    """Prefill at `source`, decode at `target` from its next step on; how many pages were there already."""
    source.add(replace(wanted, hold_kv=True))
    source.run()
    reservation = target.engine.reserve(wanted)
    assert reservation is not None
    copy_lacking(source, wanted.key, target, reservation)
    source.abort(wanted.key)
    target.engine.imported(wanted.key, *source.tokens(wanted.key), exact=exact)
    target.engine.check()
    return reservation.num_cached_pages


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_a_gpu_makes_the_tokens_of_the_cpu(folder):
    answers = []
    for name in ("torch-cpu", *ON_GPU):
        kind = with_checkpoint(folder, name)
        answers.append(Driver(kind.make()).serve(*mixed_requests(kind)))
    assert answers == [answers[0]] * len(answers)
