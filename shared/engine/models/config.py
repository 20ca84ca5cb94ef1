"""What a Hugging Face checkpoint says about its model, and the refusal of whatever the decoder does not do."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from shared.errors import StartupError, UnsupportedCheckpoint
from shared.text.tokeniser import read_eos_ids

Fields = Mapping[str, Any]


class Family(StrEnum):
    """The `model_type`s that the decoder knows."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MISTRAL = "mistral"


ARCHITECTURES = {
    Family.LLAMA: "LlamaForCausalLM",
    Family.QWEN2: "Qwen2ForCausalLM",
    Family.QWEN3: "Qwen3ForCausalLM",
    Family.MISTRAL: "MistralForCausalLM",
}

DTYPES = ("float32", "bfloat16")
"""What the engine computes in."""

DEFAULT_ROPE_THETA = 10_000.0

MISTRAL_DEFAULT_SLIDING_WINDOW = 4096
"""Mistral's window where its config.json leaves the field out."""

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")

QUANTIZATION_FIELDS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class DefaultRope:
    """Rotary embedding as first published: frequency theta^(-2i / head_dim) for pair i."""

    theta: float


@dataclass(frozen=True, slots=True)
class LinearRope:
    """All frequencies divided by `factor` (position interpolation)."""

    theta: float
    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1).

    Attributes:
        low_freq_factor, high_freq_factor: `original_max_position` divided by the wavelengths at which blending
            ends and begins.
        original_max_position: context of the pre-training.
    """

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """Interpolation ramped over the dimensions, with attention scaled (YaRN, arXiv:2309.00071).

    Attributes:
        beta_fast, beta_slow: rotations within `original_max_position` above which a dimension is kept and below
            which it is interpolated.
        truncate: whether the borders of the ramp are rounded to whole dimensions.
        attention_factor: multiplies cosine and sine.
    """

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    original_max_position: int


Rope = DefaultRope | LinearRope | Llama3Rope | YarnRope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and kind of one decoder model.

    Attributes:
        intermediate_size: width of the gate and of the up projection.
        max_context: positions the model has (`max_position_embeddings`).
        tied_embeddings: the output projection is the input embedding.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: q and k are normalised per head before the rotary embedding.
        eos_token_ids: each of them ends an answer.
        dtype: what the checkpoint says its weights are, or None where it does not say.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    dtype: str | None

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; value heads have the same."""
        return self.num_kv_heads * self.head_dim


def read_config(folder: Path) -> ModelConfig:
    """The model of the checkpoint in `folder`.

    Raises StartupError if config.json is missing or no JSON object, UnsupportedCheckpoint for a field that is
    missing, malformed or asks for something the decoder does not do.
    """
    fields = read_json(folder / "config.json")
    if fields is None:
        raise StartupError(f"{folder} is no checkpoint: it has no config.json")
    family = _family(fields)
    _refuse_unsupported(fields)
    _refuse_sliding_window(fields, family)
    hidden_size = _positive_int(fields, "hidden_size")
    num_heads = _positive_int(fields, "num_attention_heads")
    num_kv_heads = _positive_int(fields, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedCheckpoint("num_key_value_heads", f"{num_heads} query heads do not share {num_kv_heads}")
    head_dim = _head_dim(fields, family, hidden_size, num_heads)
    vocab_size = _positive_int(fields, "vocab_size")
    has_attention_bias = family in (Family.LLAMA, Family.QWEN3) and _flag(fields, "attention_bias", default=False)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_positive_int(fields, "intermediate_size"),
        num_layers=_positive_int(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive_float(fields, "rms_norm_eps", 1e-6),
        rope=_rope(fields),
        max_context=_positive_int(fields, "max_position_embeddings"),
        tied_embeddings=_flag(fields, "tie_word_embeddings", default=False),
        qkv_bias=family is Family.QWEN2 or has_attention_bias,
        o_bias=has_attention_bias,
        mlp_bias=family is Family.LLAMA and _flag(fields, "mlp_bias", default=False),
        qk_norm=family is Family.QWEN3,
        eos_token_ids=_eos_token_ids(folder, vocab_size),
        dtype=_dtype(fields),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file. Raises StartupError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StartupError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} holds no JSON object")
    return cast("dict[str, Any]", value)


def _family(fields: Fields) -> Family:
    model_type = fields.get("model_type")
    if model_type not in list(Family):
        raise UnsupportedCheckpoint("model_type", f"{model_type!r} is not one of {', '.join(Family)}")
    family = Family(model_type)
    architectures = fields.get("architectures")
    if architectures is not None and architectures != [ARCHITECTURES[family]]:
        raise UnsupportedCheckpoint("architectures", f"{architectures!r} is not [{ARCHITECTURES[family]!r}]")
    return family


def _refuse_unsupported(fields: Fields) -> None:
    for name in QUANTIZATION_FIELDS:
        if fields.get(name) is not None:
            raise UnsupportedCheckpoint(name, "quantised weights are not supported")
    for name in EXPERT_FIELDS:
        if fields.get(name):
            raise UnsupportedCheckpoint(name, "mixtures of experts are not supported")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedCheckpoint("hidden_act", f"{activation!r} is not 'silu'")


def _refuse_sliding_window(fields: Fields, family: Family) -> None:
    layer_types = fields.get("layer_types")
    if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        raise UnsupportedCheckpoint("layer_types", "only layers of full_attention are supported")
    if family in (Family.QWEN2, Family.QWEN3) and _flag(fields, "use_sliding_window", default=False):
        raise UnsupportedCheckpoint("use_sliding_window", "sliding window attention is not supported")
    if family is Family.MISTRAL:
        window = fields.get("sliding_window", MISTRAL_DEFAULT_SLIDING_WINDOW)
        if window is not None and window < _positive_int(fields, "max_position_embeddings"):
            raise UnsupportedCheckpoint("sliding_window", f"attention over the last {window} tokens is not supported")


def _head_dim(fields: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = _positive_int(fields, "head_dim")
    elif family is Family.QWEN3:
        head_dim = 128
    elif hidden_size % num_heads:
        raise UnsupportedCheckpoint("num_attention_heads", f"{num_heads} does not divide hidden_size {hidden_size}")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise UnsupportedCheckpoint("head_dim", f"{head_dim} is odd: the rotary embedding turns pairs")
    return head_dim


def _dtype(fields: Fields) -> str | None:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise UnsupportedCheckpoint(name, f"{value!r} is no name of a dtype")
    return value


def _rope(fields: Fields) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_scaling` beside `rope_theta` (before)."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.get(name)
    if raw is not None and not isinstance(raw, dict):
        raise UnsupportedCheckpoint(name, f"{raw!r} is no object")
    rope = cast("dict[str, Any]", raw or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _positive_float(fields, "rope_theta", DEFAULT_ROPE_THETA)
    if "rope_theta" in rope:
        theta = _positive_float(rope, "rope_theta", parent=name)
    for holder, parent in ((fields, ""), (rope, name)):
        if _positive_float(holder, "partial_rotary_factor", 1.0, parent=parent) != 1.0:
            raise UnsupportedCheckpoint("partial_rotary_factor", "only whole heads are turned")
    match kind:
        case "default":
            return DefaultRope(theta)
        case "linear":
            return LinearRope(theta, _positive_float(rope, "factor", parent=name))
        case "llama3":
            return Llama3Rope(
                theta,
                factor=_positive_float(rope, "factor", parent=name),
                low_freq_factor=_positive_float(rope, "low_freq_factor", parent=name),
                high_freq_factor=_positive_float(rope, "high_freq_factor", parent=name),
                original_max_position=_original_max_position(fields, rope, name),
            )
        case "yarn":
            return _yarn(fields, rope, name, theta)
        case _:
            raise UnsupportedCheckpoint(f"{name}.rope_type", f"{kind!r} is not default, linear, llama3 or yarn")


def _yarn(fields: Fields, rope: Fields, name: str, theta: float) -> YarnRope:
    factor = _positive_float(rope, "factor", parent=name)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return YarnRope(
        theta,
        factor=factor,
        beta_fast=_positive_float(rope, "beta_fast", 32.0, parent=name),
        beta_slow=_positive_float(rope, "beta_slow", 1.0, parent=name),
        truncate=_flag(rope, "truncate", default=True),
        attention_factor=float(attention_factor),
        original_max_position=_original_max_position(fields, rope, name),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _original_max_position(fields: Fields, rope: Fields, name: str) -> int:
    for holder, parent in ((fields, ""), (rope, name)):
        if holder.get("original_max_position_embeddings") is not None:
            return _positive_int(holder, "original_max_position_embeddings", parent=parent)
    return _positive_int(fields, "max_position_embeddings")


def _eos_token_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    ids = read_eos_ids(folder)
    if not ids:
        raise UnsupportedCheckpoint("eos_token_id", "neither generation_config.json nor config.json nor the tokenizer")
    for eos in ids:
        if not 0 <= eos < vocab_size:
            raise UnsupportedCheckpoint("eos_token_id", f"{eos} is no id of a vocabulary of {vocab_size}")
    return ids


def _positive_int(fields: Fields, name: str, default: int | None = None, *, parent: str = "") -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedCheckpoint(_path(parent, name), f"{value!r} is no positive integer")
    return value


def _positive_float(fields: Fields, name: str, default: float | None = None, *, parent: str = "") -> float:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedCheckpoint(_path(parent, name), f"{value!r} is no positive number")
    return float(value)


def _flag(fields: Fields, name: str, *, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedCheckpoint(name, f"{value!r} is neither true nor false")
    return value


def _path(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
