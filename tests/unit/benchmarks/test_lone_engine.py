import pytest
import torch

from benchmarks.lone_engine import Task, check, compare, generate
from infra.local.random_model import SHAPES, write_random_model
from shared.text.tokeniser import Tokeniser
from shared.worker.process import build_engine
from shared.worker.settings import WorkerSettings
from tests.tiny_tokenizers import byte_level, write_folder

PROMPT = [5, 300, 7, 9]
NUM_NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    write_folder(tokenizer, byte_level())
    folder = tmp_path_factory.mktemp("models") / "tiny"
    # Most ids are beyond the tokenizer's own, whose half characters all have the same text.
    write_random_model(folder, SHAPES["tiny"] | {"vocab_size": 20_000}, tokenizer, torch.device("cpu"))
    return folder


@pytest.fixture(scope="module")
def tokeniser(folder):
    return Tokeniser.load(folder)


@pytest.fixture
def engine(folder):
    return build_engine(WorkerSettings(model=folder, dtype="float32", num_pages=8))


@pytest.fixture
def outputs(engine):
    return generate(engine, "own", PROMPT, [], NUM_NEW)


def texts(tokeniser, outputs):
    return [tokeniser.token_text(output.token_id) for output in outputs]


def test_its_own_answer_is_equal(folder, tokeniser, outputs):
    task = Task(str(folder), "cpu", "float32", 8, [PROMPT], [texts(tokeniser, outputs)], 0.1)
    report = check(task)
    assert (report["tokens"], report["answers_equal"], report["ties"], report["wrong"]) == (NUM_NEW, 1, 0, [])


def test_a_close_rival_is_a_tie_and_what_follows_is_compared_behind_it(engine, tokeniser, outputs):
    place = 2
    rival = outputs[place].logprob.top[1][0]
    before = [output.token_id for output in outputs[:place]]
    rest = generate(engine, "rest", PROMPT, [*before, rival], NUM_NEW)
    served = [*texts(tokeniser, outputs[:place]), tokeniser.token_text(rival), *texts(tokeniser, rest)]
    (tie,) = compare(engine, tokeniser, "k", PROMPT, served, margin=10.0)
    assert (tie.index, tie.served) == (place, tokeniser.token_text(rival))
    assert tie.gap == pytest.approx(outputs[place].logprob.top[0][1] - outputs[place].logprob.top[1][1])
    (wrong,) = compare(engine, tokeniser, "l", PROMPT, served, margin=tie.gap / 2)
    assert wrong == tie


def test_a_token_far_from_the_best_is_wrong(engine, tokeniser, outputs):
    served = texts(tokeniser, outputs)
    best = {token for token, _ in outputs[3].logprob.top}
    served[3] = tokeniser.token_text(next(token for token in range(400, 20_000) if token not in best))
    (wrong,) = compare(engine, tokeniser, "k", PROMPT, served, margin=10.0)
    assert (wrong.index, wrong.gap) == (3, None)
