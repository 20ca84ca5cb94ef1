"""`python -m infra.local.random_model --shape llama-3.1-8b FOLDER`: a model of a real shape with random weights.

Speed and memory of serving depend on a model's shape and not on what it knows. The tokenizer is SmolLM2's, with a name
for every id beyond its vocabulary, so that each token of an answer can be told from its text.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from infra.local.model import smollm2_folder
from shared.engine.models.config import read_config
from shared.engine.weights import INDEX_FILE, allocate_weights, tensor_places
from shared.errors import StartupError

STD = 0.02
NUM_FILES = 8
BYTES_PER_WEIGHT = 2

Config = Mapping[str, Any]

LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA_3: Config = LLAMA | {"vocab_size": 128256, "max_position_embeddings": 131072}


def _llama_3_rope(factor: float) -> Config:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


SHAPES: Mapping[str, Config] = {
    "llama-3.1-8b": LLAMA_3
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
        "rope_parameters": _llama_3_rope(8.0),
    },
    "llama-3.2-1b": LLAMA_3
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": _llama_3_rope(32.0),
    },
    # For tries on a CPU.
    "tiny": LLAMA
    | {
        "vocab_size": 50000,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor: its Hugging Face name, and the number that its random values depend on."""

    name: str
    shape: tuple[int, ...]
    seed: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES_PER_WEIGHT

    def values(self, device: torch.device) -> torch.Tensor:
        """bf16 on `device`: ones for a norm, else normal with `STD`."""
        values = torch.empty(self.shape, dtype=torch.bfloat16, device=device)
        if self.name.endswith("norm.weight"):
            return values.fill_(1.0)
        return values.normal_(0.0, STD, generator=torch.Generator(device).manual_seed(self.seed))


def write_random_model(folder: Path, shape: Config, tokenizer: Path, device: torch.device, *, seed: int = 0) -> int:
    """Writes a checkpoint that the engine loads to `folder`, which must not exist yet; returns the bytes of weights.

    The same seed, shape and kind of device give the same weights. `tokenizer` is a folder that has one.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise StartupError(f"{folder} exists already") from None
    _write_json(folder / "config.json", shape)
    _write_json(folder / "generation_config.json", {name: shape[name] for name in ("bos_token_id", "eos_token_id")})
    write_tokenizer(tokenizer, folder, shape["vocab_size"])
    config = read_config(folder)
    places = tensor_places(config, allocate_weights(config, torch.bfloat16, torch.device("meta")))
    tensors = [
        TensorPlan(name, tuple(place.shape), seed + index) for index, (name, place) in enumerate(sorted(places.items()))
    ]
    files = split(tensors, NUM_FILES)
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(lambda name, part: write_safetensors(folder / name, part, device), names, files))
    total = sum(tensor.num_bytes for tensor in tensors)
    weight_map = {tensor.name: name for name, part in zip(names, files, strict=True) for tensor in part}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def split(tensors: Sequence[TensorPlan], num_files: int) -> list[list[TensorPlan]]:
    """At most `num_files` lists of about as many bytes each; the largest tensors are given out first."""
    files: list[list[TensorPlan]] = [[] for _ in range(min(num_files, len(tensors)))]
    sizes = [0] * len(files)
    for tensor in sorted(tensors, key=lambda tensor: -tensor.num_bytes):
        smallest = sizes.index(min(sizes))
        files[smallest].append(tensor)
        sizes[smallest] += tensor.num_bytes
    return files


def write_safetensors(path: Path, tensors: Sequence[TensorPlan], device: torch.device) -> None:
    """Draws and writes one tensor after the other: the library would want all of them in memory at once."""
    bounds = [0]
    for tensor in tensors:
        bounds.append(bounds[-1] + tensor.num_bytes)
    entries: dict[str, object] = {
        tensor.name: {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        for tensor, offsets in zip(tensors, pairwise(bounds), strict=True)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors:
            file.write(tensor.values(device).cpu().flatten().view(torch.uint8).numpy().data)


def write_tokenizer(source: Path, folder: Path, vocab_size: int) -> None:
    """The tokenizer of `source`, where ids up to `vocab_size` that it does not know are called `<|id|>`."""
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = content["model"]["vocab"]
    # Added tokens that are not in it would be numbered anew, behind all that are.
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
    known = set(vocab.values())
    if max(known) >= vocab_size:
        raise StartupError(f"the tokenizer of {source} has ids up to {max(known)}, vocab_size is {vocab_size}")
    vocab |= {f"<|{token_id}|>": token_id for token_id in range(vocab_size) if token_id not in known}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")],
    device: Annotated[str, typer.Option(help="Where the numbers are drawn; by default on a GPU if there is one.")] = "",
) -> None:
    """Write a model of a real shape with random weights (bf16), for measurements."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    began_s = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        num_bytes = write_random_model(folder, SHAPES[shape], smollm2_folder(), where)
    except StartupError as error:
        sys.exit(f"baton: {error}")
    took_s = time.monotonic() - began_s
    sys.stdout.write(f"{folder}: {num_bytes / 1e9:.2f} GB in {took_s:.1f} s, drawn on {where}\n")


if __name__ == "__main__":
    typer.run(main)
