"""The torch runner against transformers' generate: greedy tokens must be equal, however the work is cut and mixed."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.blocks import PAGE_TOKENS, token_ids
from shared.engine.batch import BatchRow
from shared.engine.sampling.torch_sampler import NOT_FINITE
from shared.engine.torch_runner import TorchRunner
from shared.engine.weights import load_checkpoint
from shared.request import SamplingParams
from tests.oracle import Oracle
from tests.tiny_checkpoints import FAMILIES, ROPES, TinyCheckpoint

BORDER_LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129)
NUM_NEW = 6
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=100, seed=11, temperature=1.5, top_p=0.95)


@dataclass
class Sequence:
    """One sequence driven by hand: its tokens so far and the pages it may write."""

    ids: list[int]
    pages: tuple[int, ...]
    sampling: SamplingParams = GREEDY
    seat: int = 0
    num_computed: int = 0
    prompt_len: int = field(init=False)

    def __post_init__(self):
        self.prompt_len = len(self.ids)

    @property
    def answer(self):
        return self.ids[self.prompt_len :]

    def row(self, chunk):
        end = min(self.num_computed + chunk, len(self.ids))
        return BatchRow(
            key="k",
            sequence=id(self),
            seat=self.seat,
            ids=token_ids(self.ids),
            start=self.num_computed,
            end=end,
            pages=self.pages,
            prompt_len=self.prompt_len,
            sample=end == len(self.ids),
            sampling=self.sampling,
            choice=0,
            forbid_end=False,
        )

    def take(self, row, sampled):
        assert (sampled is not None) == row.sample
        self.num_computed = row.end
        if sampled is not None:
            assert sampled.error is None
            self.ids.append(sampled.token_id)


def run(runner, rows):
    return runner.launch(rows).wait()


def step(runner, sequences, chunk=10**6):
    rows = tuple(sequence.row(chunk) for sequence in sequences)
    for sequence, row, sampled in zip(sequences, rows, run(runner, rows), strict=True):
        sequence.take(row, sampled)


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def answer_alone(runner, ids, chunk=10**6, sampling=GREEDY, num_new=NUM_NEW, pages=(9, 3, 7, 5)):
    sequence = Sequence(list(ids), pages, sampling)
    while len(sequence.answer) < num_new:
        step(runner, [sequence], chunk)
    return sequence.answer


def make_runner(tiny_checkpoints, tiny, num_pages=40, dtype="float32"):
    return TorchRunner(load_checkpoint(tiny_checkpoints.get(tiny), dtype, torch.device("cpu")), num_pages)


@pytest.fixture(scope="module")
def runner(tiny_checkpoints):
    return make_runner(tiny_checkpoints, TinyCheckpoint())


@pytest.fixture(scope="module")
def expected(tiny_checkpoints):
    """Answers of the default tiny model by transformers, by prompt length."""
    oracle = Oracle(tiny_checkpoints.get(TinyCheckpoint()))
    return {length: oracle.answer(prompt(length), NUM_NEW) for length in BORDER_LENGTHS}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_rope_answers_as_transformers(tiny_checkpoints, family, rope):
    tiny = TinyCheckpoint(family, rope)
    answer = answer_alone(make_runner(tiny_checkpoints, tiny), prompt(125), chunk=50, num_new=10)
    assert answer == Oracle(tiny_checkpoints.get(tiny)).answer(prompt(125), 10)


@pytest.mark.parametrize("chunk", [1, 37, 63, 64, 65, 1000])
@pytest.mark.parametrize("length", BORDER_LENGTHS)
def test_page_and_chunk_borders(runner, expected, length, chunk):
    assert answer_alone(runner, prompt(length), chunk) == expected[length]


def test_mixing_rows_changes_no_token(runner, expected):
    """Sequences join one a step, in chunks, while earlier ones decode: all kinds of rows meet in one batch."""
    waiting = [Sequence(prompt(length), (4 * i, 4 * i + 1, 4 * i + 2)) for i, length in enumerate(BORDER_LENGTHS)]
    sequences = list(waiting)
    running = []
    kinds = set()
    while any(len(sequence.answer) < NUM_NEW for sequence in sequences):
        if waiting:
            running.append(waiting.pop())
        rows = [sequence.row(40) for sequence in running]
        kinds.add(frozenset((row.end - row.start > 1, row.start > 0) for row in rows))
        step(runner, running, chunk=40)
    assert any(len(kind) >= 3 for kind in kinds)
    assert [sequence.answer[:NUM_NEW] for sequence in sequences] == [expected[length] for length in BORDER_LENGTHS]


def test_sampled_tokens_do_not_depend_on_the_batch(runner):
    prompts = [prompt(length, seed=3) for length in (5, 64, 70, 130)]
    alone = [answer_alone(runner, ids, sampling=SAMPLED) for ids in prompts]
    together = [Sequence(list(ids), (4 * i, 4 * i + 1, 4 * i + 2), SAMPLED) for i, ids in enumerate(prompts)]
    together.append(Sequence(prompt(33), (30,), GREEDY))
    for _ in range(NUM_NEW):
        step(runner, together)
    assert [sequence.answer for sequence in together[:-1]] == alone


def test_pages_travel_between_runners(tiny_checkpoints, runner, expected):
    """What a peer computes and sends page by page is enough to go on: the hand-over in small."""
    peer = make_runner(tiny_checkpoints, TinyCheckpoint(), num_pages=6)
    sequence = Sequence(prompt(129), (5, 0, 3))
    step(peer, [sequence])
    moved = (8, 9, 1)
    runner.cache.pages[list(moved)] = peer.cache.pages[list(sequence.pages)]
    sequence.pages = moved
    for _ in range(NUM_NEW - 1):
        step(runner, [sequence])
    assert sequence.answer == expected[129]


def test_a_row_with_nan_fails_alone_and_leaves_no_trace_in_its_pages(tiny_checkpoints, expected):
    runner = make_runner(tiny_checkpoints, TinyCheckpoint())
    spoilt, healthy = Sequence(prompt(63), (0, 1)), Sequence(prompt(129), (2, 3, 4))
    step(runner, [spoilt, healthy])
    runner.cache.pages[0, 0, :, 10] = float("nan")
    rows = (spoilt.row(1), healthy.row(1))
    failed, fine = run(runner, rows)
    assert (failed.token_id, failed.error) == (-1, NOT_FINITE)
    healthy.take(rows[1], fine)

    runner.cache.pages[0] = float("nan")  # all that the failed request could have left behind
    runner.cache.pages[1] = float("nan")
    heirs = [Sequence(prompt(length), pages) for length, pages in ((2, (0,)), (65, (5, 1)), (128, (6, 7, 8)))]
    for _ in range(NUM_NEW):
        step(runner, heirs)
    for _ in range(NUM_NEW - 2):
        step(runner, [healthy, *heirs])
    assert [heir.answer[:NUM_NEW] for heir in heirs] == [expected[length] for length in (2, 65, 128)]
    assert healthy.answer == expected[129]


def test_sequences_of_unlike_length_read_no_foreign_page(tiny_checkpoints, expected):
    """They are padded to one shape; what pads them is not a page that may hold anything."""
    runner = make_runner(tiny_checkpoints, TinyCheckpoint(), num_pages=12)
    used = {65: (4, 7), 127: (2, 9, 5), 129: (11, 3, 8)}
    runner.cache.pages[[page for page in range(12) if page not in sum(used.values(), ())]] = float("nan")
    sequences = [Sequence(prompt(length), pages) for length, pages in used.items()]
    for _ in range(NUM_NEW):
        step(runner, sequences)
    assert [sequence.answer for sequence in sequences] == [expected[length] for length in used]


def test_only_the_pages_of_the_rows_are_written(runner):
    runner.cache.pages.fill_(7.0)
    answer_alone(runner, prompt(PAGE_TOKENS + 3), pages=(11, 13), num_new=2)
    untouched = [page for page in range(runner.cache.num_pages) if page not in (11, 13)]
    assert (runner.cache.pages[untouched] == 7.0).all()


def test_bfloat16_answers_are_those_of_transformers_up_to_near_ties(tiny_checkpoints):
    """Teacher-forced on our own tokens: each is transformers' best or within rounding of it."""
    tiny = TinyCheckpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints.get(tiny), dtype=torch.bfloat16)
    answer = answer_alone(make_runner(tiny_checkpoints, tiny, dtype="bfloat16"), prompt(70), num_new=20)
    ids = torch.tensor([prompt(70) + answer])
    with torch.inference_mode():
        logits = model(ids).logits[0, 69:-1].float()
    gap = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert gap.max() <= 0.05 * logits.std()


def test_an_empty_batch_is_no_work(runner):
    assert run(runner, ()) == []
