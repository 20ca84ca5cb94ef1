"""Tiny random checkpoints on disk, written by transformers: the same bytes for the same arguments."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

VOCAB_SIZE = 300
EOS_TOKEN_ID = 2

FAMILIES: dict[str, tuple[Any, type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """What to write.

    Attributes:
        family: a key of FAMILIES.
        rope: a key of ROPES.
        biases: attention and MLP biases, where the family knows the switch.
        sharded: several safetensors files with an index.
        seed: of the random weights.
        linear_std: of the weights of linear layers; the default suits a hidden size of 64.
        overrides: further fields of the config.
    """

    family: str = "llama"
    rope: str = "default"
    tied: bool = False
    biases: bool = False
    sharded: bool = False
    seed: int = 0
    linear_std: float = 0.25
    overrides: tuple[tuple[str, Any], ...] = ()


def write_tiny_checkpoint(folder: Path, tiny: TinyCheckpoint) -> Path:
    """Writes the checkpoint into `folder` (made if need be) and returns it. 2 layers, 4 query and 2 KV heads."""
    disable_progress_bar()
    config_class, model_class, family_fields = FAMILIES[tiny.family]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": dict(ROPES[tiny.rope]),
        "tie_word_embeddings": tiny.tied,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        **family_fields,
        **dict(tiny.overrides),
    }
    if tiny.biases:
        fields |= {"attention_bias": True, "mlp_bias": True} if tiny.family == "llama" else {"attention_bias": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.seed)
        model = model_class(config_class(**fields))
        _spread(model, tiny.linear_std)
    model.save_pretrained(folder, max_shard_size="60KB" if tiny.sharded else "1GB")
    return folder


class TinyCheckpoints:
    """Writes each checkpoint once into its own folder below `root`; those who change files copy them first."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[TinyCheckpoint, Path] = {}

    def get(self, tiny: TinyCheckpoint) -> Path:
        if tiny not in self._folders:
            folder = self._root / f"tiny-{len(self._folders)}"
            self._folders[tiny] = write_tiny_checkpoint(folder, tiny)
        return self._folders[tiny]


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON object on disk; None stays null, `...` removes the field."""
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            fields.pop(name, None)
        else:
            fields[name] = value
    path.write_text(json.dumps(fields))


def _spread(model: PreTrainedModel, linear_std: float) -> None:
    """Larger random weights than transformers': distinct logits, attention that looks around, non-trivial norms."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias") or "embed_tokens" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=linear_std)
