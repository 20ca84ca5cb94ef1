"""The Triton runner, with its graphs, against transformers on a GPU: random models of all families and head sizes.

In float32 greedy answers are equal. In bfloat16 both sides are told the same text, and behind each position our choice
is theirs, or one whose logit is about as large to them: within MARGIN of the largest logit's size, eight roundings of a
bfloat16. Such near ties are few; transformers' own choices in bfloat16 and in float32 differ at 1 to 3% of the places.
"""

from dataclasses import dataclass
from random import Random

import pytest
import torch

from shared.blocks import PAGE_TOKENS, pages_for, token_ids
from shared.engine.batch import BatchRow
from shared.engine.engine import PagedEngine
from shared.engine.late_work import LateWork
from shared.engine.port import EngineLimits
from shared.engine.triton_runner import TritonRunner
from shared.engine.weights import load_checkpoint
from tests.engine_driver import Driver, greedy, request
from tests.oracle import Oracle
from tests.tiny_checkpoints import TinyCheckpoint, write_tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
MARGIN = 2**-5
MAX_NEAR_TIES = 0.1

MIN_VOCAB_SIZE = 32_064
MAX_CONTEXT = 2048
CHUNK = 256
NUM_NEW = 16
LENGTHS = [1, 63, 64, 65, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, 1500]

TEXT_LEN = 4 * PAGE_TOKENS
"""Behind each position of such a text a token is chosen."""


@dataclass(frozen=True)
class Shape:
    """A model of 3 layers."""

    family: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    hidden: int = 512
    vocab_size: int = MIN_VOCAB_SIZE

    def __str__(self):
        return f"{self.family}-{self.head_dim}x{self.num_heads}/{self.num_kv_heads}"

    def checkpoint(self):
        fields = {
            "head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": 3,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": MAX_CONTEXT,
        }
        return TinyCheckpoint(self.family, linear_std=self.hidden**-0.5, overrides=tuple(fields.items()))


SHAPES = [
    Shape("llama", 64, 16, 16, hidden=1024),
    Shape("llama", 128, 8, 2, vocab_size=128_256),
    Shape("llama", 256, 8, 1),
    Shape("qwen2", 64, 8, 1),
    Shape("qwen2", 96, 8, 2),
    Shape("qwen2", 128, 4, 4),
    Shape("qwen3", 64, 16, 4, hidden=1024),
    Shape("qwen3", 128, 16, 2),
    Shape("qwen3", 256, 4, 4),
    Shape("mistral", 96, 8, 8, hidden=768),
    Shape("mistral", 96, 8, 1),
    Shape("mistral", 256, 8, 2),
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def folder(request, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), request.param.checkpoint())


def a_text(length):
    rng = Random(length)
    return token_ids(rng.randrange(3, MIN_VOCAB_SIZE) for _ in range(length))


def runner_and_engine(folder, dtype, max_running):
    checkpoint = load_checkpoint(folder, dtype, torch.device(DEVICE))
    limits = EngineLimits(MAX_CONTEXT, 80, max_running, CHUNK)
    runner = TritonRunner(
        checkpoint, limits.num_pages, max_running=max_running, max_batch_tokens=CHUNK, max_context=MAX_CONTEXT
    )
    runner.warm_up()
    model = checkpoint.model("m")
    return runner, PagedEngine(runner, model, limits)


def test_greedy_answers_in_float32(folder):
    """Chunks of long prompts beside decode rows, then each of a few alone."""
    texts = [a_text(length) for length in LENGTHS]
    oracle = Oracle(folder, torch.float32, DEVICE)
    expected = [oracle.answer(text, NUM_NEW) for text in texts]
    runner, engine = runner_and_engine(folder, "float32", max_running=12)
    sampling = greedy(NUM_NEW, ignore_eos=True)
    together = Driver(engine)
    requests = [request(f"together {len(text)}", text, sampling, cache_salt="together") for text in texts]
    assert together.serve(*requests) == expected
    for text, answer in list(zip(texts, expected, strict=True))[2:5]:
        assert Driver(engine).serve(request("alone", text, sampling)) == [answer]
    assert runner.late_work == LateWork(0, 0, 0)


def test_choices_in_bfloat16(folder):
    """Of prefill, which computes the last tokens of a prompt, and of decode rows at all places in one batch."""
    runner, engine = runner_and_engine(folder, "bfloat16", max_running=TEXT_LEN)
    text = a_text(TEXT_LEN)
    logits = Oracle(folder, torch.bfloat16, DEVICE).logits(text)
    requests = [request(f"behind {place}", text[: place + 1], greedy(1)) for place in range(TEXT_LEN)]
    prefilled = [tokens[0] for tokens in Driver(engine).serve(*requests)]
    assert_about_the_best(prefilled, logits)
    assert_about_the_best(decoded(runner, text), logits)


def decoded(runner, text):
    """The choice behind each position by a decode row that is told the text; all share the text's pages."""
    pages = tuple(range(pages_for(len(text))))

    def row(sequence, seat, start, end, *, sample):
        return BatchRow(
            key=f"row {start}",
            sequence=1_000_000 + sequence,  # none of the engine's
            seat=seat,
            ids=text,
            start=start,
            end=end,
            pages=pages,
            prompt_len=len(text),
            sample=sample,
            sampling=greedy(1),
            choice=0,
            forbid_end=False,
        )

    for start in range(0, len(text), CHUNK):
        runner.launch((row(0, 0, start, min(start + CHUNK, len(text)), sample=False),)).wait()
    rows = tuple(row(1 + place, place, place, place + 1, sample=True) for place in range(TEXT_LEN))
    return [sampled.token_id for sampled in runner.launch(rows).wait()]


def assert_about_the_best(tokens, logits):
    """`tokens`: one for each row of `logits`, which are transformers'."""
    best = logits.max(dim=1)
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    short = (best.values - chosen) / logits.abs().max(dim=1).values
    assert short.max() <= MARGIN, short.topk(5)
    num_near_ties = sum(token != index for token, index in zip(tokens, best.indices.tolist(), strict=True))
    assert num_near_ties < MAX_NEAR_TIES * len(tokens)
