"""From a checkpoint's folder to an engine that is ready.

open: config, headers, memory ─┬─> weights are read ───────────────────────────────────┬─> pages ─> runner ─> warm up
                               └─> on a GPU: compile all, measure the largest step ────┘
"""

# pyright: reportUnknownMemberType=false
# torch types its devices' properties in part.

import gc
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from shared.blocks import pages_for, token_ids
from shared.engine.batch import BatchRow
from shared.engine.engine import PagedEngine
from shared.engine.models.config import ModelConfig
from shared.engine.page_budget import GRAPH_BYTES, MIN_PAGES, DeviceMemory, measure_memory, pages_that_fit
from shared.engine.port import EngineLimits
from shared.engine.step_times import measure_steps
from shared.engine.torch_runner import TorchRunner
from shared.engine.weight_reading import Report
from shared.engine.weights import Checkpoint, OpenedCheckpoint, open_checkpoint
from shared.errors import StartupError
from shared.policy.profile_fit import MeasuredStep
from shared.request import SamplingParams

if TYPE_CHECKING:
    from shared.engine.late_work import LateWork
    from shared.engine.triton_runner import TritonRunner

KernelKind = Literal["triton", "torch"]

PLAIN = "PyTorch alone"

MEASURE_S = {"cuda": 3.0, "cpu": 0.5}
"""How long steps may be measured, by the type of device."""

KERNEL_SHARED_BYTES = 163 * 2**10
"""What an A100 lets a block have. The largest tiles of the Triton kernels, compiled for one, take up to 144 KB."""

COSTLIEST_SAMPLING = SamplingParams(
    max_tokens=2, min_tokens=2, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, logprobs=20
)
"""What takes the most memory beside the logits."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine to start.

    Attributes:
        folder: of the checkpoint.
        name: what clients call the model.
        dtype: of weights and KV, "float32" or "bfloat16"; None takes the checkpoint's own.
        num_pages: KV pages; None, on a GPU only, takes as many as fit.
        gpu_memory_share: of the GPU's memory, what this process may take in all.
        reserved_bytes: of the GPU's memory, what this process will allocate itself once the engine stands.
        host_cache_bytes: of the host's memory, for pages that go from the cache; 0: none.
    """

    folder: Path
    name: str
    device: torch.device
    dtype: str | None
    kernels: KernelKind
    num_pages: int | None
    gpu_memory_share: float
    reserved_bytes: int
    max_running: int
    max_batch_tokens: int
    host_cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that is ready, and what it took.

    Attributes:
        runs: what computes its steps, in words.
        late_work: what the runner has compiled, captured and allocated since it was warm; None if it does not count.
        weight_bytes, kv_bytes: of device memory.
        peak_bytes: of device memory, weights and largest step together; None on a CPU.
        load_s: from the beginning until the weights were there and the largest step had run.
        warm_up_s: the rest: pages allocated, every shape of a step run, graphs captured, some steps measured.
        measured_steps: what these steps computed and how long they took.
    """

    engine: PagedEngine
    runs: str
    late_work: "Callable[[], LateWork] | None"
    weight_bytes: int
    kv_bytes: int
    peak_bytes: int | None
    load_s: float
    warm_up_s: float
    measured_steps: tuple[MeasuredStep, ...]


def start_engine(plan: EnginePlan, report: Report, clock_s: Callable[[], float]) -> StartedEngine:
    """Load, measure, allocate and warm up.

    Args:
        report: told of the bytes of weights read.

    Raises UnsupportedCheckpoint, or StartupError for missing files and for what does not fit the device.
    """
    began_s = clock_s()
    if plan.kernels == "triton" and plan.device.type == "cuda":
        properties = cast("Any", torch.cuda.get_device_properties(plan.device))
        refuse_small_processors(properties.name, properties.shared_memory_per_block_optin)
    opened, memory = _load(plan, report)
    loaded_s = clock_s()
    checkpoint = opened.checkpoint
    num_pages = _num_pages(plan, checkpoint, memory)
    runner = _runner(plan, checkpoint, num_pages)
    if not isinstance(runner, TorchRunner):
        with _steps_that_fit(plan):
            runner.warm_up()
    engine = PagedEngine(
        runner,
        checkpoint.model(plan.name),
        EngineLimits(
            max_context=checkpoint.config.max_context,
            num_pages=num_pages,
            max_running=plan.max_running,
            max_batch_tokens=plan.max_batch_tokens,
            num_host_pages=_num_host_pages(plan, checkpoint.layout.page_bytes),
        ),
    )
    measured_steps = measure_steps(runner, engine.limits, budget_s=MEASURE_S[plan.device.type], clock_s=clock_s)
    return StartedEngine(
        engine,
        runs=PLAIN if isinstance(runner, TorchRunner) else runner.description,
        late_work=None if isinstance(runner, TorchRunner) else lambda: runner.late_work,
        weight_bytes=opened.num_bytes,
        kv_bytes=num_pages * checkpoint.layout.page_bytes,
        peak_bytes=None if memory is None else memory.peak_bytes,
        load_s=loaded_s - began_s,
        warm_up_s=clock_s() - loaded_s,
        measured_steps=measured_steps,
    )


def refuse_small_processors(gpu: str, shared_bytes: int) -> None:
    """Raise StartupError for a GPU whose blocks may have `shared_bytes` of shared memory, if the kernels need more."""
    if shared_bytes < KERNEL_SHARED_BYTES:
        raise StartupError(
            f"the Triton kernels need {KERNEL_SHARED_BYTES // 2**10} KB of shared memory a block, and "
            f"{gpu} has {shared_bytes // 2**10} KB: set kernels to torch (BATON_KERNELS)"
        )


def largest_batches(config: ModelConfig, max_running: int, max_batch_tokens: int) -> list[tuple[BatchRow, ...]]:
    """Steps that no other exceeds in memory: all seats at once, and one chunk as long as a step may be.

    Their KV goes to page 0 and means nothing.
    """
    even = [max_batch_tokens // max_running] * max_running
    return [_batch_of(config, lengths) for lengths in (even, [max_batch_tokens])]


def _batch_of(config: ModelConfig, lengths: list[int]) -> tuple[BatchRow, ...]:
    rows: list[BatchRow] = []
    for seat, wanted in enumerate(lengths):
        length = min(wanted, config.max_context - 1)
        rows.append(
            BatchRow(
                key=f"largest-{seat}",
                sequence=seat,
                seat=seat,
                ids=token_ids([0] * length),
                start=0,
                end=length,
                pages=(0,) * pages_for(length),
                prompt_len=length,
                sample=True,
                sampling=COSTLIEST_SAMPLING,
                choice=0,
                forbid_end=True,
            )
        )
    return tuple(rows)


def _load(plan: EnginePlan, report: Report) -> tuple[OpenedCheckpoint, DeviceMemory | None]:
    try:
        opened = open_checkpoint(plan.folder, plan.dtype, plan.device)
    except torch.OutOfMemoryError as error:
        raise StartupError(f"the weights of {plan.folder} do not fit the GPU: {error}") from error
    if plan.kernels == "triton":
        from shared.engine.triton_runner import refuse_large_groups  # noqa: PLC0415 - needed, and there, on GPUs alone

        refuse_large_groups(opened.checkpoint.config, opened.checkpoint.decoder.dtype)
    if plan.device.type == "cpu":
        opened.read(report)
        return opened, None
    # Kernels are compiled while the weights come; what runs meanwhile computes on whatever is in memory.
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        reading = pool.submit(opened.read, report)
        with _steps_that_fit(plan):
            memory = measure_memory(lambda: _run_largest(plan, opened.checkpoint), plan.device)
        reading.result()
    return opened, memory


@contextmanager
def _steps_that_fit(plan: EnginePlan) -> Generator[None, None, None]:
    """Raises StartupError where the GPU has no memory for the steps that run in this context."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the largest steps do not fit the GPU: set less than {plan.max_batch_tokens} max_batch_tokens, "
            f"{plan.max_running} max_running or, where they are set, fewer num_pages: {error}"
        ) from error


def _run_largest(plan: EnginePlan, checkpoint: Checkpoint) -> None:
    runner = _runner(plan, checkpoint, MIN_PAGES)
    if not isinstance(runner, TorchRunner):
        runner.compile()
        runner.reserve()
    for batch in largest_batches(checkpoint.config, plan.max_running, plan.max_batch_tokens):
        runner.launch(batch).wait()
    del runner
    gc.collect()  # what it held goes back to PyTorch's pool, and the runner that stays takes it from there


def _num_pages(plan: EnginePlan, checkpoint: Checkpoint, memory: DeviceMemory | None) -> int:
    if plan.num_pages is not None:
        return plan.num_pages
    if memory is None:
        raise StartupError("num_pages must be set where the engine runs on the CPU")
    return pages_that_fit(
        memory,
        checkpoint.layout.page_bytes,
        share=plan.gpu_memory_share,
        reserved_bytes=plan.reserved_bytes + (GRAPH_BYTES if plan.kernels == "triton" else 0),
    )


def _num_host_pages(plan: EnginePlan, page_bytes: int) -> int:
    num_pages = plan.host_cache_bytes // page_bytes
    if plan.host_cache_bytes and not num_pages:
        raise StartupError(
            f"a host cache (BATON_HOST_CACHE_GB) of {plan.host_cache_bytes} bytes holds no page ({page_bytes})"
        )
    return num_pages


def _runner(plan: EnginePlan, checkpoint: Checkpoint, num_pages: int) -> "TorchRunner | TritonRunner":
    try:
        if plan.kernels == "torch":
            return TorchRunner(checkpoint, num_pages)
        from shared.engine.triton_runner import TritonRunner  # noqa: PLC0415 - needed, and there, on GPUs alone

        return TritonRunner(
            checkpoint,
            num_pages,
            max_running=plan.max_running,
            max_batch_tokens=plan.max_batch_tokens,
            max_context=checkpoint.config.max_context,
        )
    except torch.OutOfMemoryError as error:
        raise StartupError(f"{num_pages} KV pages do not fit the GPU: {error}") from error
