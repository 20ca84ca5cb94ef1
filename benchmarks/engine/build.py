"""Engines to measure: a model of a real shape with random weights, made on the device that runs it."""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from infra.local.random_model import LLAMA
from infra.local.random_model import SHAPES as REAL_SHAPES
from shared.engine.engine import PagedEngine
from shared.engine.models.config import ModelConfig, read_config
from shared.engine.port import EngineLimits
from shared.engine.torch_runner import TorchRunner
from shared.engine.weights import Checkpoint, allocate_weights, tensor_places
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import TORCH_DTYPES

SMALL: Mapping[str, Any] = dict(LLAMA) | {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

SHAPES: Mapping[str, Mapping[str, Any]] = {**REAL_SHAPES, "small": SMALL}
"""By name. `small` is for runs that ask whether all is right rather than how fast it is."""

RUNNERS = ("torch", "triton")

SPARE_BYTES = 10 * 2**30
"""Memory of a GPU that is left beside weights and pages: activations, logits of all rows, graphs."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How random weights are drawn: uniform in ±bound, norms either likewise or ones."""

    bound: float
    norms_are_ones: bool = False


SPEED_WEIGHTS = Weights(1e-3)
"""What other engines draw for a dummy load. Zeros would run faster: a chip's clock depends on its data."""

TOKEN_WEIGHTS = Weights(0.05, norms_are_ones=True)
"""Answers that depend on every token before them, with few ties among their logits."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """One engine.

    Attributes:
        device: "cuda" or "cpu".
        dtype: "bfloat16" or "float32".
        runner: one of RUNNERS.
        num_pages: pages at most; a GPU with less memory gets fewer.
        num_host_pages: pages of host memory for what goes from those.
    """

    device: str
    dtype: str
    runner: str
    num_pages: int
    max_running: int
    max_batch_tokens: int
    num_host_pages: int = 0


def random_checkpoint(shape: Mapping[str, Any], dtype: str, device: torch.device, weights: Weights) -> Checkpoint:
    """A model of `shape` (the fields of a config.json) that no file holds. The same on the same kind of device."""
    config = config_of(shape)
    allocated = allocate_weights(config, TORCH_DTYPES[dtype], device)
    generator = torch.Generator(device).manual_seed(0)
    for name, place in sorted(tensor_places(config, allocated).items()):
        if weights.norms_are_ones and name.endswith("norm.weight"):
            place.fill_(1.0)
        else:
            place.uniform_(-weights.bound, weights.bound, generator=generator)
    fingerprint = f"random-{weights.bound}-{dtype}"
    return Checkpoint.of(config, allocated, fingerprint, dtype)


def config_of(shape: Mapping[str, Any]) -> ModelConfig:
    """What the engine reads from a checkpoint with these fields."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(shape)))
        return read_config(Path(folder))


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that is ready: where its runner compiles or captures, it has.

    Attributes:
        runs: what computes its steps, in words.
        late_work: what the runner has compiled, captured and allocated since, by name; empty if it counts nothing.
    """

    engine: PagedEngine
    runs: str
    late_work: Callable[[], Mapping[str, int]]


def engine_over(checkpoint: Checkpoint, plan: BenchPlan) -> BuiltEngine:
    """An engine that runs the checkpoint."""
    num_pages = _affordable_pages(checkpoint.layout, plan)
    model = checkpoint.model("random")
    limits = EngineLimits(
        max_context=checkpoint.config.max_context,
        num_pages=num_pages,
        max_running=plan.max_running,
        max_batch_tokens=plan.max_batch_tokens,
        num_host_pages=plan.num_host_pages,
    )
    if plan.runner == "torch":
        return BuiltEngine(PagedEngine(TorchRunner(checkpoint, num_pages), model, limits), "PyTorch alone", dict)
    # By name: a machine without Triton measures the torch runner.
    runner = import_module("shared.engine.triton_runner").TritonRunner(
        checkpoint,
        num_pages,
        max_running=plan.max_running,
        max_batch_tokens=plan.max_batch_tokens,
        max_context=checkpoint.config.max_context,
    )
    if plan.device == "cuda":
        runner.compile()  # many kernels at once, as workers do while they read the weights
    runner.warm_up()
    return BuiltEngine(PagedEngine(runner, model, limits), runner.description, lambda: asdict(runner.late_work))


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from nothing to an engine that is ready.

    Attributes:
        weights_s: drawn on the device; a checkpoint's are read from a disk instead.
        ready_s: pages allocated, kernels compiled, graphs captured.
        is_cold: the kernels' compile cache was empty.
    """

    weights_s: float
    ready_s: float
    is_cold: bool


def start_engine(shape: str, plan: BenchPlan, weights: Weights) -> tuple[BuiltEngine, Start]:
    """An engine of one of the SHAPES, and how long it took."""
    device = torch.device(plan.device)
    is_cold = plan.runner != "triton" or not _has_compiled_kernels()
    began_s = time.perf_counter()
    checkpoint = random_checkpoint(SHAPES[shape], plan.dtype, device, weights)
    synchronize(device)
    drawn_s = time.perf_counter()
    built = engine_over(checkpoint, plan)
    synchronize(device)
    settle_memory()
    return built, Start(drawn_s - began_s, time.perf_counter() - drawn_s, is_cold)


def settle_memory() -> None:
    """As a worker does when it is ready: the garbage collector never looks again at what lives for good."""
    gc.collect()
    gc.freeze()


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _affordable_pages(layout: KvLayout, plan: BenchPlan) -> int:
    if plan.device != "cuda":
        return plan.num_pages
    free_bytes, _ = torch.cuda.mem_get_info()
    return min(plan.num_pages, (free_bytes - SPARE_BYTES) // layout.page_bytes)


def _has_compiled_kernels() -> bool:
    folder = Path(import_module("triton").knobs.cache.dir)
    return folder.is_dir() and any(folder.iterdir())
