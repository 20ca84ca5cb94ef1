"""Safetensors files into the decoder's merged parameters, and the fingerprint that names them."""

# pyright: reportUnknownMemberType=false
# torch types tolist, split and unflatten only in part.

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from shared.engine.models.config import DTYPES, ModelConfig, read_config, read_json
from shared.engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from shared.engine.port import EngineModel
from shared.engine.weight_reading import READING, Report, TensorCopy, WeightFile, read_header, read_tensors, samples
from shared.errors import StartupError, UnsupportedCheckpoint
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import TORCH_DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD = "lm_head.weight"

LOADABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FINGERPRINT_SAMPLE_BYTES = 4096
"""Bytes of each tensor that the fingerprint covers."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to run.

    Attributes:
        fingerprint: names config and weights; equal on every machine that holds the same files.
        layout: of its KV.
    """

    config: ModelConfig
    decoder: Decoder
    fingerprint: str
    layout: KvLayout

    @classmethod
    def of(cls, config: ModelConfig, weights: DecoderWeights, fingerprint: str, dtype: str) -> Self:
        """The model of `config` with `weights`, which are of `dtype` ("float32" or "bfloat16"), as its KV will be."""
        layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )
        return cls(config, Decoder(config, weights), fingerprint, layout)

    def model(self, name: str) -> EngineModel:
        """What others must know of it, under the name that clients call it by."""
        return EngineModel(
            name=name,
            fingerprint=self.fingerprint,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            layout=self.layout,
        )


def load_checkpoint(
    folder: Path, dtype: str | None, device: torch.device, report: Report = lambda _read, _all: None
) -> Checkpoint:
    """Load a Hugging Face checkpoint (config.json and safetensors) from `folder` onto `device`.

    Args:
        dtype: "float32" or "bfloat16", to which weights of another dtype are converted; None takes the
            checkpoint's own.
        report: told of the bytes read.

    Raises UnsupportedCheckpoint naming the field or tensor that is wrong, StartupError for missing or broken files.
    """
    opened = open_checkpoint(folder, dtype, device)
    opened.read(report)
    return opened.checkpoint


class OpenedCheckpoint:
    """A checkpoint that has been checked and given its memory; its weights have not been read.

    Attributes:
        checkpoint: may run from the start, to compile and to measure; what it computes means nothing before `read`.
        num_bytes: of the weights on the device.
    """

    def __init__(self, checkpoint: Checkpoint, copies: Sequence[TensorCopy]) -> None:
        self.checkpoint = checkpoint
        self.num_bytes = sum(copy.place.nbytes for copy in copies)
        self._copies = copies

    def read(self, report: Report) -> None:
        """Fill the weights. May run in another thread than the decoder.

        Raises StartupError for a broken file, UnsupportedCheckpoint for a head that contradicts tied embeddings.
        """
        weights, device = self.checkpoint.decoder.weights, self.checkpoint.decoder.device
        read_tensors(self._copies, device, READING[device.type], report)
        for copy in self._copies:
            if (
                copy.source.name == HEAD
                and copy.place is not weights.head
                and not torch.equal(copy.place, weights.head)
            ):
                raise UnsupportedCheckpoint(HEAD, "differs from the embedding although embeddings are tied")


def open_checkpoint(folder: Path, dtype: str | None, device: torch.device) -> OpenedCheckpoint:
    """All of `load_checkpoint` but the reading of the weights; raises as it does."""
    config = read_config(folder)
    dtype = _run_dtype(config, dtype)
    files = weight_files(folder)
    fingerprint = checkpoint_fingerprint(folder, files)
    weights = allocate_weights(config, TORCH_DTYPES[dtype], device)
    copies = plan_copies(config, weights, files)
    return OpenedCheckpoint(Checkpoint.of(config, weights, fingerprint, dtype), copies)


def weight_files(folder: Path) -> list[WeightFile]:
    """The safetensors files of a checkpoint, by name. Raises StartupError if one is missing or broken."""
    index = read_json(folder / INDEX_FILE)
    if index is None:
        names = {SINGLE_FILE}
    else:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StartupError(f"{folder / INDEX_FILE} has no weight_map")
        names = {str(name) for name in cast("dict[str, Any]", weight_map).values()}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise StartupError(f"{folder} has no weight file {name}")
    return [read_header(folder / name) for name in sorted(names)]


def checkpoint_fingerprint(folder: Path, files: Sequence[WeightFile]) -> str:
    """32 hex digits over config.json and, of each weight file, its name, size, header and a sample of each tensor.

    The sample is the middle 4 KiB: enough to tell a fine-tuned tensor from its base without reading all of it.
    """
    digest = sha256((folder / "config.json").read_bytes())
    for file in files:
        digest.update(f"\0{file.path.name}\0{file.num_bytes}\0".encode())
        digest.update(file.header)
        for sample in samples(file, FINGERPRINT_SAMPLE_BYTES):
            digest.update(sample)
    return digest.hexdigest()[:32]


def allocate_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Uninitialised weights of the shapes that `config` asks for."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def bias(wanted: bool, size: int) -> Tensor | None:
        return empty(size) if wanted else None

    hidden, qkv_size = config.hidden_size, config.q_size + 2 * config.kv_size
    embed = empty(config.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=bias(config.qkv_bias, qkv_size),
            q_norm=bias(config.qk_norm, config.head_dim),
            k_norm=bias(config.qk_norm, config.head_dim),
            o=empty(hidden, config.q_size),
            o_bias=bias(config.o_bias, hidden),
            post_norm=empty(hidden),
            gate_up=empty(2 * config.intermediate_size, hidden),
            gate_up_bias=bias(config.mlp_bias, 2 * config.intermediate_size),
            down=empty(hidden, config.intermediate_size),
            down_bias=bias(config.mlp_bias, hidden),
        )
        for _ in range(config.num_layers)
    )
    head = embed if config.tied_embeddings else empty(config.vocab_size, hidden)
    return DecoderWeights(embed=embed, layers=layers, norm=empty(hidden), head=head)


def plan_copies(config: ModelConfig, weights: DecoderWeights, files: Sequence[WeightFile]) -> list[TensorCopy]:
    """Which tensor of `files` goes where. Raises UnsupportedCheckpoint for a missing, extra or misshapen one.

    A head that a checkpoint of tied embeddings repeats gets a place of its own, to be compared with the embedding.
    """
    places = tensor_places(config, weights)
    copies: list[TensorCopy] = []
    for file in files:
        for tensor in file.tensors:
            if tensor.name.endswith(".rotary_emb.inv_freq"):  # old checkpoints store what the config implies
                continue
            if tensor.name == HEAD and config.tied_embeddings:
                place = torch.empty_like(weights.embed)
            else:
                place = places.pop(tensor.name, None)
            if place is None:
                raise UnsupportedCheckpoint(tensor.name, f"the model has no such tensor ({file.path.name})")
            if tensor.shape != place.shape:
                raise UnsupportedCheckpoint(tensor.name, f"shape {list(tensor.shape)} is not {list(place.shape)}")
            if tensor.dtype not in LOADABLE_DTYPES:
                raise UnsupportedCheckpoint(tensor.name, f"{tensor.dtype} weights are not supported")
            copies.append(TensorCopy(tensor, place))
    if places:
        raise UnsupportedCheckpoint(min(places), f"the tensor is missing ({len(places)} missing in all)")
    return copies


def tensor_places(config: ModelConfig, weights: DecoderWeights) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes, by its Hugging Face name: views into the merged parameters."""
    places = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        places[HEAD] = weights.head
    for index, layer in enumerate(weights.layers):
        for name, place in _layer_places(config, layer).items():
            if place is not None:
                places[f"model.layers.{index}.{name}"] = place
    return places


def _layer_places(config: ModelConfig, layer: LayerWeights) -> dict[str, Tensor | None]:
    qkv_sizes = [config.q_size, config.kv_size, config.kv_size]
    gate_up_sizes = [config.intermediate_size] * 2
    q, k, v = _parts(layer.qkv, qkv_sizes)
    gate, up = _parts(layer.gate_up, gate_up_sizes)
    places: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        "self_attn.o_proj.weight": layer.o,
        "self_attn.o_proj.bias": layer.o_bias,
        "post_attention_layernorm.weight": layer.post_norm,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    if layer.qkv_bias is not None:
        for part, place in zip("qkv", _parts(layer.qkv_bias, qkv_sizes), strict=True):
            places[f"self_attn.{part}_proj.bias"] = place
    if layer.gate_up_bias is not None:
        for part, place in zip(("gate", "up"), _parts(layer.gate_up_bias, gate_up_sizes), strict=True):
            places[f"mlp.{part}_proj.bias"] = place
    return places


def _parts(merged: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", merged.split(sizes))


def _run_dtype(config: ModelConfig, dtype: str | None) -> str:
    wanted = config.dtype if dtype is None else dtype
    if wanted not in DTYPES:
        raise UnsupportedCheckpoint("dtype", f"{wanted!r} is not one of {', '.join(DTYPES)}: say which to run in")
    return wanted
