import json

import pytest
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def test_the_folder_is_what_the_hub_would_give(smollm2):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in smollm2.iterdir()} == names
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config


def test_weights_are_bf16_without_an_output_layer_of_their_own(smollm2):
    with (smollm2 / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert "model.embed_tokens.weight" in header
    assert "lm_head.weight" not in header
    assert len(header) == 30 * 9 + 2


def test_an_answer_ends_where_the_chat_template_ends_a_turn(smollm2, tokenizer):
    end = tokenizer.token_to_id("<|im_end|>")
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == end == 2
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "<|im_end|>" in settings["chat_template"]


def test_each_digit_is_a_token_and_all_text_comes_back(tokenizer):
    encoded = tokenizer.encode("2024")
    assert encoded.tokens == ["2", "0", "2", "4"]
    text = "In 2024 ▁ it's\t3.14; Grüße, 你好 🙂\n\n  def f():"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
