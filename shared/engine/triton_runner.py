"""The model over paged KV at the device's speed: Triton kernels, seats on the device, CUDA graphs.

    launch:  plan ─> tell the seats what they lack ─> send the words ─> begin ─> decoder ─> logits ─> draw ─> copy back
                     (nothing if nothing changed)                       └──── a graph, if there is one ────┘

A batch may be launched while the one before it runs: what they share lies on the device, and one stream keeps their
order; what a step does on a second one ends within the step. In Triton's interpreter the same code runs on the CPU,
without graphs.
"""

# pyright: reportUnknownMemberType=false
# torch types tolist in part.

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from shared.blocks import pages_for
from shared.engine.attention.decode import DecodeScratch
from shared.engine.attention.decode_plan import plan_decode
from shared.engine.attention.paged import PagedAttention, SideStream
from shared.engine.attention.prefill import tilings_for
from shared.engine.batch import BatchRow, Done, Launched, Sampled
from shared.engine.compiling import compile_launches
from shared.engine.graphs import StepGraphs
from shared.engine.host_copies import Event, Uploads, Words, host_tensor, new_event
from shared.engine.late_work import LateWork, LateWorkCounter
from shared.engine.layer_marks import LayerEvents, LayerMarks
from shared.engine.layers.kernels import triton_kernels
from shared.engine.layers.linear import PADDED_ROWS
from shared.engine.models.config import ModelConfig
from shared.engine.models.rope import angle_table
from shared.engine.sampling.torch_sampler import NOT_FINITE, NOTHING_LEFT
from shared.engine.sampling.triton_sampler import NOT_FINITE_TOKEN, NOTHING_LEFT_TOKEN, DrawResults, TritonSampler
from shared.engine.seats import Seats
from shared.engine.step_memory import StepMemory
from shared.engine.step_plan import (
    Draw,
    StepInputs,
    StepPlan,
    StepPlanner,
    StepShape,
    begin_step,
    num_words,
    padding_words,
)
from shared.engine.weights import Checkpoint
from shared.errors import UnsupportedCheckpoint
from shared.kv.paged_cache import PagedCache
from shared.request import TokenLogprob

NUM_AHEAD = 1

HISTORY_LENGTHS = (2, 1024)
"""PyTorch has kernels of their own for few ids."""

FAILURES = {NOT_FINITE_TOKEN: NOT_FINITE, NOTHING_LEFT_TOKEN: NOTHING_LEFT}


def refuse_large_groups(config: ModelConfig, dtype: torch.dtype) -> None:
    """Raise UnsupportedCheckpoint if more query heads share a KV head than the attention over prompts computes."""
    group = config.num_heads // config.num_kv_heads
    most = tilings_for(config.head_dim, config.num_heads, dtype, num_processors=1).max_group
    if group > most:
        raise UnsupportedCheckpoint(
            "num_attention_heads / num_key_value_heads",
            f"{group} query heads share a KV head, the Triton kernels take {most} at most in {dtype}: "
            "set kernels to torch (BATON_KERNELS)",
        )


class TritonRunner:
    """Runs a checkpoint's decoder by Triton kernels on the device that holds its weights.

    All work is on the current stream of the thread that launches, always the same one. Whoever reads or writes pages
    on another stream waits for the batch (`Launched.wait`) first.
    """

    def __init__(
        self, checkpoint: Checkpoint, num_pages: int, *, max_running: int, max_batch_tokens: int, max_context: int
    ) -> None:
        config, device = checkpoint.config, checkpoint.decoder.device
        self._decoder = checkpoint.decoder
        self._device = device
        self._cache = PagedCache(checkpoint.layout, num_pages, device)
        self._angles = angle_table(config.rope, config.head_dim, max_context, device)
        self._seats = Seats(max_running, pages_for(max_context), config.eos_token_ids, config.vocab_size, device)
        num_processors = _num_processors(device)
        tilings = tilings_for(config.head_dim, config.num_heads, checkpoint.decoder.dtype, num_processors)
        self._tilings = tilings
        group = config.num_heads // config.num_kv_heads
        self._planner = StepPlanner(
            max_running,
            max_batch_tokens,
            self._seats.nobody,
            lambda num_tokens: tilings.of(num_tokens).tokens_per_block(group),
        )
        largest = self._planner.largest_shape
        self._inputs = Uploads(num_words(largest), device)
        self._sent: StepPlan | None = None
        self._histories = Uploads(max_context, device)
        self._memory = StepMemory(device)
        self._kernels = triton_kernels(num_processors, device)
        self._scratch = DecodeScratch.allocate(
            largest.num_sampled, config.num_heads, config.num_kv_heads, config.head_dim, num_processors, device
        )
        self._side = SideStream.of(device)
        self._layer_events = LayerEvents(config.num_layers, NUM_AHEAD + 1, device)
        self._sampler = TritonSampler(config.vocab_size, max_running, largest.num_sampled, device)
        self._results = DrawResults.allocate(largest.num_sampled, device)
        self._copies = deque(ResultCopy.allocate(largest.num_sampled, device) for _ in range(NUM_AHEAD + 1))
        self._graphs = StepGraphs()
        self._late_work = LateWorkCounter(device, self._graphs)
        torch.set_float32_matmul_precision("highest")  # TF32 would break the promise of equal tokens in float32

    @property
    def cache(self) -> PagedCache:
        return self._cache

    @property
    def num_ahead(self) -> int:
        return NUM_AHEAD

    @property
    def num_uploads(self) -> int:
        """How often words were sent to the device; a steady decode step sends none."""
        return self._seats.num_uploads + self._inputs.num_sent + self._histories.num_sent

    @property
    def late_work(self) -> LateWork:
        """What was compiled, captured or allocated since `warm_up`."""
        return self._late_work.read()

    @property
    def description(self) -> str:
        """What runs, for the log."""
        most = self._planner.decode_buckets[-1]
        if not len(self._graphs):
            return f"Triton paged attention on {self._device.type}, without graphs, up to {most} decode rows"
        return f"Triton paged attention, {len(self._graphs)} graphs of steps, up to {most} decode rows"

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile what `warm_up` launches, many kernels at once, and run none of it. The weights need not be there."""
        compile_launches(self._run_all)

    @torch.inference_mode()
    def reserve(self) -> None:
        """Take the memory for steps of any size; `warm_up` does too."""
        self._memory.reserve(lambda: self._run_padding(self._planner.largest_shape))

    def warm_up(self) -> None:
        """Run every kernel, capture every graph and take all memory. Nothing in the pages changes.

        Kernels that no runner of the process has compiled before are compiled one after the other.
        """
        # cuBLAS has a handle and a workspace for each thread; those of a thread that ends go to the next one that needs
        # some: the one that launches, which may not have begun.
        with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
            thread.submit(self._warm_up).result()
        self._late_work.restart()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        self.reserve()
        with self._memory.use():
            self._run_all()
        if self._device.type == "cuda":
            for shape in self._captured_shapes:
                self._graphs.capture(shape, self._forward, self._draw)
            torch.cuda.synchronize(self._device)

    @property
    def _captured_shapes(self) -> list[StepShape]:
        """The largest first: smaller ones make do with its memory."""
        shapes = (*self._planner.prefill_shapes, *self._planner.decode_shapes)
        return sorted(shapes, key=lambda shape: -shape.num_tokens)

    def _run_all(self) -> None:
        """Launch all kernels of all steps, for steps without a row."""
        self._seats.warm_up()
        for length in HISTORY_LENGTHS:
            ids = np.zeros(min(length, len(self._histories.words)), dtype=np.int32)
            self._load_seen(self._seats.nobody, ids, len(ids) // 2)
        for shape in (self._planner.largest_shape, *self._captured_shapes, *self._smallest_shapes()):
            self._run_padding(shape)

    def _smallest_shapes(self) -> list[StepShape]:
        """Shapes between which the linear layers choose other kernels."""
        largest = self._planner.largest_shape
        return [
            StepShape(0, min(num_rows, largest.num_tokens), 0, min(num_rows, largest.num_sampled))
            for num_rows in (1, *PADDED_ROWS)
        ]

    def _run_padding(self, shape: StepShape) -> None:
        self._sent = None
        self._inputs.send(padding_words(shape, self._seats.nobody))
        logits = self._forward(shape)
        for kind in Draw:
            self._draw(shape, kind, logits)

    @torch.inference_mode()
    def launch(self, rows: tuple[BatchRow, ...], layers: LayerMarks | None = None) -> Launched:
        """Begin to compute `rows` behind all that was launched before; a graph records nothing in `layers`."""
        if not rows:
            return Done([])
        plan = self._planner.plan(rows)
        for row in self._seats.prepare(rows):
            if row.sampling.has_penalty:
                with self._memory.use():
                    self._load_seen(row.seat, np.frombuffer(row.ids[:], dtype=np.int32), row.prompt_len)
        self._send(plan)
        if not self._graphs.replay(plan.shape, plan.draw):
            stored = None if layers is None else self._layer_events.marking(layers)
            with self._memory.use():
                self._draw(plan.shape, plan.draw, self._forward(plan.shape, stored))
        copy = self._copies.popleft()
        copy.start(self._results, plan)
        return LaunchedStep(rows, plan, copy, self._copies)

    def _forward(self, shape: StepShape, stored: Callable[[int], None] | None = None) -> Tensor:
        """Logits `[num_sampled, vocab]` of the step whose words were sent."""
        inputs = StepInputs[Tensor].of(self._inputs.words, shape)
        num_decode = shape.num_decode
        begin_step(self._seats.words, inputs, num_decode)
        plan_decode(inputs.positions[:num_decode], inputs.seats[:num_decode], self._scratch.work)
        attention = PagedAttention(
            self._decoder.config,
            self._cache.pages,
            self._seats.page_table,
            inputs.seats,
            inputs.positions,
            num_decode,
            inputs.blocks,
            self._tilings.of(shape.num_tokens),
            self._angles,
            self._scratch,
            self._side,
            stored,
        )
        wanted = None if shape.is_decode else inputs.sampled_rows
        hidden = self._decoder.forward(inputs.ids, attention, self._kernels, wanted)
        return self._decoder.logits(hidden, self._kernels)

    def _draw(self, shape: StepShape, kind: Draw, logits: Tensor) -> None:
        """Draw the step's tokens into the results and the seats."""
        if not shape.num_sampled:
            return
        inputs = StepInputs[Tensor].of(self._inputs.words, shape)
        match kind:
            case Draw.GREEDY:
                draw = self._sampler.draw_greedy
            case Draw.SAMPLED:
                draw = self._sampler.draw
            case Draw.EXTRAS:
                draw = self._sampler.draw_with_extras
        draw(logits, inputs.sampled_seats, inputs.ends, self._seats.words, self._results)

    def _send(self, plan: StepPlan) -> None:
        sent = self._sent
        if sent is None or sent.shape != plan.shape or not np.array_equal(sent.words, plan.words):
            self._inputs.send(plan.words)
            self._sent = plan

    def _load_seen(self, seat: int, ids: Words, prompt_len: int) -> None:
        """Count the ids of a prompt and of what was answered so far."""
        self._histories.send(ids)
        sent = self._histories.words[: len(ids)]
        self._sampler.load_seen(seat, sent[:prompt_len], sent[prompt_len:])


@dataclass(frozen=True, slots=True)
class ResultCopy:
    """Host memory for the results of one batch in flight."""

    results: DrawResults
    done: Event

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device) -> "ResultCopy":
        """For batches of up to `max_rows` sampled rows."""
        like = DrawResults.allocate(max_rows, torch.device("cpu"))
        parts = (like.tokens, like.logprobs, like.top_ids, like.top_logprobs)
        return cls(
            DrawResults(*(host_tensor(tuple(part.shape), part.dtype, device) for part in parts)), new_event(device)
        )

    def start(self, results: DrawResults, plan: StepPlan) -> None:
        """Copy what `plan` draws as soon as it is there."""
        size = plan.shape.num_sampled
        own = self.results
        own.tokens[:size].copy_(results.tokens[:size], non_blocking=True)
        if plan.draw is Draw.EXTRAS:
            own.logprobs[:size].copy_(results.logprobs[:size], non_blocking=True)
            own.top_ids[:size].copy_(results.top_ids[:size], non_blocking=True)
            own.top_logprobs[:size].copy_(results.top_logprobs[:size], non_blocking=True)
        self.done.record()


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A batch on the device.

    Attributes:
        copy: where its results come to; goes back to `copies` once they are read.
    """

    rows: tuple[BatchRow, ...]
    plan: StepPlan
    copy: ResultCopy
    copies: deque[ResultCopy]

    def wait(self) -> list[Sampled | None]:
        """See `shared.engine.batch.Launched`. Other threads run while this one waits."""
        self.copy.done.synchronize()
        results = self.copy.results
        sampled: list[Sampled | None] = [None] * len(self.rows)
        tokens = cast("list[int]", results.tokens[: self.plan.shape.num_sampled].tolist())
        for index, place in self.plan.drawn:
            token = tokens[place]
            if token < 0:
                sampled[index] = Sampled(-1, error=FAILURES[token])
            else:
                sampled[index] = Sampled(token, _logprob(results, place, self.rows[index].sampling.logprobs))
        self.copies.append(self.copy)
        return sampled


def _logprob(results: DrawResults, place: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    ids = cast("list[int]", results.top_ids[place, :num_top].tolist())
    logprobs = cast("list[float]", results.top_logprobs[place, :num_top].tolist())
    return TokenLogprob(float(results.logprobs[place]), tuple(zip(ids, logprobs, strict=True)))


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return cast("int", torch.cuda.get_device_properties(device).multi_processor_count)
