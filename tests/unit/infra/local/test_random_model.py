import pytest
import torch
from safetensors.torch import load_file

from infra.local.random_model import SHAPES, STD, TensorPlan, split, write_random_model
from shared.engine.weights import load_checkpoint
from shared.errors import StartupError
from shared.text.tokeniser import Tokeniser
from tests.tiny_tokenizers import byte_level, write_folder


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    return write_folder(folder, byte_level())


def test_the_engine_loads_what_was_written(tmp_path, tokenizer):
    folder = tmp_path / "model"
    shape = SHAPES["tiny"] | {"vocab_size": 1000}
    num_bytes = write_random_model(folder, shape, tokenizer, torch.device("cpu"))
    checkpoint = load_checkpoint(folder, None, torch.device("cpu"))
    assert checkpoint.layout.dtype == "bfloat16"
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert sum(tensor.nbytes for tensor in weights.values()) == num_bytes
    assert torch.equal(weights["model.norm.weight"].float(), torch.ones(64))
    head = weights["lm_head.weight"].float()
    assert head.std().item() == pytest.approx(STD, rel=0.05)
    assert not torch.equal(head, weights["model.embed_tokens.weight"].float())


def test_every_id_has_a_text_of_its_own(tmp_path, tokenizer):
    folder = tmp_path / "model"
    write_random_model(folder, SHAPES["tiny"] | {"vocab_size": 1000}, tokenizer, torch.device("cpu"))
    tokeniser = Tokeniser.load(folder)
    assert tokeniser.vocab_size == 1000
    source = Tokeniser.load(tokenizer)
    texts = [tokeniser.token_text(token) for token in range(1000)]
    assert texts[: source.vocab_size] == [source.token_text(token) for token in range(source.vocab_size)]
    assert texts[source.vocab_size :] == [f"<|{token}|>" for token in range(source.vocab_size, 1000)]
    text = "hello <tool call> there"
    assert list(tokeniser.encode(text)) == list(source.encode(text))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, tokenizer):
    with pytest.raises(StartupError, match="vocab_size is 100"):
        write_random_model(tmp_path / "m", SHAPES["tiny"] | {"vocab_size": 100}, tokenizer, torch.device("cpu"))


def test_files_share_the_bytes_evenly():
    tensors = [TensorPlan(str(size), (size,), 0) for size in (7, 1, 5, 3, 6, 2)]
    assert sorted(sum(tensor.num_bytes for tensor in part) for part in split(tensors, 2)) == [24, 24]
    assert len(split(tensors, 99)) == 6
