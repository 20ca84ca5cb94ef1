import json
import shutil

import pytest

from shared.engine.models.config import (
    DefaultRope,
    Family,
    LinearRope,
    Llama3Rope,
    YarnRope,
    read_config,
)
from shared.errors import StartupError, UnsupportedCheckpoint
from shared.text.tokeniser import Tokeniser
from tests.tiny_checkpoints import TinyCheckpoint, edit_json
from tests.tiny_tokenizers import byte_level


def config_folder(tmp_path, tiny_checkpoints, family="llama", **changes):
    """The JSON files of a tiny checkpoint, with fields of config.json changed."""
    source = tiny_checkpoints.get(TinyCheckpoint(family))
    for path in source.glob("*.json"):
        shutil.copy(path, tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "qkv_bias", "qk_norm", "head_dim"),
    [
        ("llama", False, False, 16),
        ("qwen2", True, False, 16),
        ("qwen3", False, True, 32),
        ("mistral", False, False, 16),
    ],
)
def test_reads_each_family(tmp_path, tiny_checkpoints, family, qkv_bias, qk_norm, head_dim):
    config = read_config(config_folder(tmp_path, tiny_checkpoints, family))
    assert config.family is Family(family)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (qkv_bias, False, False, qk_norm)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, head_dim)
    assert (config.vocab_size, config.max_context, config.eos_token_ids) == (300, 1024, (2,))
    assert config.dtype == "float32"


def test_absent_fields_take_the_family_defaults(tmp_path, tiny_checkpoints):
    absent = ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "rms_norm_eps")
    config = read_config(config_folder(tmp_path, tiny_checkpoints, **dict.fromkeys(absent, ...)))
    assert (config.head_dim, config.num_kv_heads, config.tied_embeddings) == (16, 4, False)
    assert config.rope == DefaultRope(10_000.0)
    assert config.rms_norm_eps == 1e-6


def test_llama_biases_are_switched_by_two_fields(tmp_path, tiny_checkpoints):
    config = read_config(config_folder(tmp_path, tiny_checkpoints, attention_bias=True, mlp_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_dtype_is_read_under_its_old_name(tmp_path, tiny_checkpoints):
    folder = config_folder(tmp_path, tiny_checkpoints, dtype=..., torch_dtype="bfloat16")
    assert read_config(folder).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, LinearRope(5000.0, 2.0)),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
            Llama3Rope(5000.0, 8.0, 1.0, 4.0, 1024),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.5},
            YarnRope(5000.0, 4.0, 32.0, 1.0, truncate=True, attention_factor=1.5, original_max_position=256),
        ),
        (None, DefaultRope(5000.0)),
    ],
)
def test_rope_is_read_in_the_old_and_the_new_form(tmp_path, tiny_checkpoints, rope, expected):
    old = config_folder(tmp_path, tiny_checkpoints, rope_parameters=..., rope_scaling=rope, rope_theta=5000.0)
    assert read_config(old).rope == expected
    new = {**(rope or {"rope_type": "default"}), "rope_theta": 5000.0}
    edit_json(tmp_path / "config.json", rope_parameters=new, rope_scaling=..., rope_theta=...)
    assert read_config(tmp_path).rope == expected


REFUSALS = [
    ("llama", {"model_type": "gpt2"}, "model_type"),
    ("llama", {"model_type": ...}, "model_type"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ("llama", {"compression_config": {"format": "int"}}, "compression_config"),
    ("qwen2", {"num_experts": 8}, "num_experts"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("mistral", {"sliding_window": 512}, "sliding_window"),
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 32768}, "sliding_window"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type"),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": "yarn"}, "rope_parameters"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"hidden_size": 63, "head_dim": ...}, "num_attention_heads"),
    ("llama", {"head_dim": 15}, "head_dim"),
    ("llama", {"vocab_size": "many"}, "vocab_size"),
    ("llama", {"num_hidden_layers": ...}, "num_hidden_layers"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("llama", {"dtype": 16}, "dtype"),
]


@pytest.mark.parametrize(("family", "changes", "field"), REFUSALS, ids=[f"{f}-{n}" for f, _, n in REFUSALS])
def test_refuses_by_field_name(tmp_path, tiny_checkpoints, family, changes, field):
    folder = config_folder(tmp_path, tiny_checkpoints, family, **changes)
    with pytest.raises(UnsupportedCheckpoint) as refusal:
        read_config(folder)
    assert refusal.value.field == field
    assert field in str(refusal.value)


def test_mistral_window_as_wide_as_the_context_is_no_window(tmp_path, tiny_checkpoints):
    folder = config_folder(tmp_path, tiny_checkpoints, "mistral", sliding_window=1024)
    assert read_config(folder).max_context == 1024


def test_eos_comes_from_the_generation_config_first(tmp_path, tiny_checkpoints):
    folder = config_folder(tmp_path, tiny_checkpoints, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text("{}")
    assert read_config(folder).eos_token_ids == (5,)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>"}])
def test_eos_comes_from_the_tokenizer_last(tmp_path, tiny_checkpoints, eos, file):
    folder = config_folder(tmp_path, tiny_checkpoints, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / file).write_text(json.dumps({"eos_token": eos}))
    assert read_config(folder).eos_token_ids == (1,)
    assert Tokeniser.load(folder).eos_ids == (1,)


@pytest.mark.parametrize("eos", [None, [], 300, -1, True, [2, "x"]])
def test_eos_must_be_an_id(tmp_path, tiny_checkpoints, eos):
    folder = config_folder(tmp_path, tiny_checkpoints, eos_token_id=eos)
    (folder / "generation_config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match="eos_token_id"):
        read_config(folder)


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(StartupError, match="no config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartupError, match="not JSON"):
        read_config(tmp_path)
