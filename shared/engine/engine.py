"""The engine: schedule, launch, collect.

A runner may be one batch ahead: a batch is launched before the tokens of the one before it are known, so that the
device never waits for the host. A step is what lies between two tokens of a sequence:

    step          launch C         wait for B, take its tokens          launch D         wait for C, ...
    device   ── B ──────────────────┤├── C ──────────────────────────────────────────────┤├── D ...

C continues the sequences of B behind tokens that only the device knows. The price: B may end a sequence (EOS, failure,
abort) that has a row in C already. That row is thrown away, and the scheduler keeps the pages it writes until then.
With a runner that is not ahead (`num_ahead` 0) each step launches one batch and waits for it.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Names
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from shared.blocks import PAGE_TOKENS, BlockHash, pages_for
from shared.engine.batch import MAX_ENDS, MAX_LOGPROBS, BatchRow, Launched, Runner, Sampled
from shared.engine.layer_marks import LayerMarks
from shared.engine.port import (
    BlockChanges,
    EngineLimits,
    EngineModel,
    EngineRequest,
    EngineStats,
    Fill,
    Reservation,
    StepOutput,
    TokenOutput,
)
from shared.engine.scheduler import Batch, Scheduler
from shared.engine.sequence import Sequence, SequenceState
from shared.kv.host_pages import PinnedPages
from shared.kv.host_tier import HostPages
from shared.kv.loan import Loan
from shared.kv.paged_cache import PagedCache
from shared.kv.progress import Chunk
from shared.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class InFlight:
    """A batch that has been launched.

    Attributes:
        layers: told when the batch is done; None if nobody asks how far it is.
    """

    batch: Batch
    launched: Launched
    layers: LayerMarks | None


class PagedEngine:
    """`shared.engine.port.Engine` over any runner."""

    def __init__(
        self,
        runner: Runner,
        model: EngineModel,
        limits: EngineLimits,
        *,
        host_pages: Callable[[PagedCache, int], HostPages] = PinnedPages,
    ) -> None:
        """`host_pages`: makes the host memory for so many pages of a cache, if the limits have any."""
        if runner.cache.layout != model.layout:
            raise ValueError("the runner's KV layout is not the model's")
        if runner.cache.num_pages != limits.num_pages:
            raise ValueError(f"num_pages is {limits.num_pages}, the runner's cache has {runner.cache.num_pages}")
        self._runner = runner
        self._model = model
        self._limits = limits
        self._eos_token_ids = frozenset(model.eos_token_ids)
        host = host_pages(runner.cache, limits.num_host_pages) if limits.num_host_pages else None
        self._scheduler = Scheduler(limits, model.fingerprint, host)
        self._blocks = self._scheduler.blocks
        self._num_pages_computed = 0
        self._while_waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @property
    def model(self) -> EngineModel:
        return self._model

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def cache(self) -> PagedCache:
        """The pages that reservations and holds speak of."""
        return self._runner.cache

    def add(self, request: EngineRequest) -> None:
        if request.on_chunk is not None and not request.hold_kv:
            raise ValueError("on_chunk tells of pages that stay, which takes hold_kv")
        self._refuse(request, num_coming=0)
        self._scheduler.add(request)

    def reserve(self, request: EngineRequest) -> Reservation | None:
        if request.hold_kv:
            raise ValueError("hold_kv is for prefill: an imported request decodes")
        self._refuse(request, num_coming=1)
        return self._scheduler.reserve(request)

    def imported(self, key: str, token_id: int, *, exact: bool = True) -> None:
        if not 0 <= token_id < self._model.vocab_size:
            raise ValueError(f"token_id is {token_id}, it must be between 0 and {self._model.vocab_size - 1}")
        self._scheduler.imported(key, token_id, exact=exact)

    def fill(self, request: EngineRequest, num_pages: int) -> Fill | None:
        return self._scheduler.fill(request, num_pages)

    def filled(self, fill: Fill, num_arrived: int) -> None:
        self._blocks.filled(fill, num_arrived)

    def bring(self, names: Names[BlockHash], over: Callable[[], None]) -> None:
        self._scheduler.bring(names, over)

    def lend(self, names: Names[BlockHash]) -> Loan:
        return self._blocks.lend(names)

    def give_back(self, loan: Loan) -> None:
        self._blocks.give_back(loan)

    def abort(self, key: str) -> None:
        self._scheduler.abort(key)

    def step(self) -> StepOutput:
        started: tuple[str, ...] = ()
        self._blocks.advance(self._num_pages_computed)
        self._num_pages_computed = 0
        while len(self._in_flight) <= self._runner.num_ahead:
            batch = self._scheduler.schedule()
            if not batch.rows:
                break
            layers = self._announce(batch)
            self._in_flight.append(InFlight(batch, self._runner.launch(batch.rows, layers), layers))
            started += batch.started
            self._num_pages_computed += pages_for(batch.num_tokens)
        if not self._in_flight:
            tier = self._blocks.tier
            if tier is not None and tier.is_restoring:
                with self._while_waiting():
                    tier.wait()  # there is nothing else to do
            return StepOutput()
        oldest = self._in_flight.popleft()
        with self._while_waiting():
            results = oldest.launched.wait()
        if oldest.layers is not None:
            oldest.layers.done()
        return self._collect(oldest.batch, results, started)

    def let_in(self, while_waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._while_waiting = while_waiting

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def take_block_changes(self) -> BlockChanges:
        return self._blocks.take_changes()

    def take_all_blocks(self) -> BlockChanges:
        return self._blocks.take_all()

    def stats(self) -> EngineStats:
        scheduler, pool, tier = self._scheduler, self._blocks.pool, self._blocks.tier
        return EngineStats(
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_held=scheduler.num_held,
            num_importing=scheduler.num_importing,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_host_pages=0 if tier is None else tier.num_used,
            num_host_hits=self._blocks.num_host_hits,
            num_lost_blocks=pool.num_lost,
            num_saved_bytes=0 if tier is None else tier.num_saved_bytes,
            num_restored_bytes=0 if tier is None else tier.num_restored_bytes,
        )

    def check(self) -> None:
        self._scheduler.check()

    def _announce(self, batch: Batch) -> LayerMarks | None:
        """Tell whoever wants to know of the chunks to be computed; None if nobody does."""
        layers: LayerMarks | None = None
        for row, sequence in zip(batch.rows[batch.num_decode :], batch.sequences[batch.num_decode :], strict=True):
            on_chunk = sequence.request.on_chunk
            if on_chunk is not None:
                layers = layers or LayerMarks(self._model.layout.num_layers)
                on_chunk(Chunk(row.start, row.end, layers), row.pages)
        return layers

    def _refuse(self, request: EngineRequest, *, num_coming: int) -> None:
        """Raise ValueError, naming the limit, for a request that can never run here.

        `num_coming` tokens, made elsewhere, follow the ids before one is made here.
        """
        if request.key in self._scheduler:
            raise ValueError(f"key {request.key!r} is in use")
        num_ids, prompt_len, max_tokens = len(request.ids), request.prompt_len, request.sampling.max_tokens
        if not 1 <= prompt_len <= num_ids:
            raise ValueError(f"prompt_len is {prompt_len}, it must be between 1 and the number of ids ({num_ids})")
        num_made = num_ids - prompt_len + num_coming
        if num_made >= max_tokens:
            raise ValueError(f"max_tokens is {max_tokens} and {num_made} tokens are made already")
        if prompt_len + max_tokens > self._limits.max_context:
            raise ValueError(
                f"prompt ({prompt_len}) and max_tokens ({max_tokens}) exceed max_context ({self._limits.max_context})"
            )
        num_pages = pages_for(num_ids if request.hold_kv else prompt_len + max_tokens)
        if num_pages > self._limits.num_pages:
            raise ValueError(f"the request needs {num_pages} pages, num_pages is {self._limits.num_pages}")
        ids = np.frombuffer(request.ids, dtype=np.int32)
        if ids.min() < 0 or ids.max() >= self._model.vocab_size:
            raise ValueError(f"ids must be between 0 and vocab_size - 1 ({self._model.vocab_size - 1})")
        self._refuse_sampling(request.sampling)

    def _refuse_sampling(self, sampling: SamplingParams) -> None:
        """Raise ValueError for what no row may ask of a runner."""
        if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs is {sampling.logprobs}, it must be between 0 and {MAX_LOGPROBS}")
        num_ends = len(sampling.ends(self._eos_token_ids))
        if sampling.min_tokens and num_ends > MAX_ENDS:
            raise ValueError(f"min_tokens beside {num_ends} EOS and stop ids, of which {MAX_ENDS} can be forbidden")

    def _collect(self, batch: Batch, results: list[Sampled | None], started: tuple[str, ...]) -> StepOutput:
        """Move the sequences of a batch that is done on by what their rows gave."""
        self._scheduler.collected(batch)
        tokens: list[TokenOutput] = []
        for row, sequence, sampled in zip(batch.rows, batch.sequences, results, strict=True):
            if sequence.state is SequenceState.ENDED:
                continue  # it ended after the row had been launched
            if sampled is not None and sampled.error is not None:
                tokens.append(self._fail(sequence, sampled.error))
                continue
            if row.end >= (sequence.num_published + 1) * PAGE_TOKENS:
                self._scheduler.publish(sequence, row.end)
            if sampled is not None:
                tokens.append(self._take(row, sequence, sampled))
        return StepOutput(tuple(tokens), started, batch.work, len(self._in_flight))

    def _take(self, row: BatchRow, sequence: Sequence, sampled: Sampled) -> TokenOutput:
        """Add a token to its sequence."""
        token_id = sampled.token_id
        index = row.end - row.prompt_len
        num_cached_tokens: int | None = None
        if not sequence.has_output:
            sequence.has_output = True
            num_cached_tokens = sequence.num_cached_tokens
            if sequence.is_prefilled:
                self._num_prompt_tokens += row.prompt_len
        self._num_generated_tokens += 1
        finish = self._finish(row.sampling, index, token_id)
        if sequence.request.hold_kv:
            self._scheduler.hold(sequence)
        elif finish is not None:
            self._scheduler.end(sequence)
        else:
            sequence.ids.append(token_id)
        return TokenOutput(row.key, index, token_id, finish, sampled.logprob, num_cached_tokens)

    def _fail(self, sequence: Sequence, error: str) -> TokenOutput:
        num_cached_tokens = None if sequence.has_output else sequence.num_cached_tokens
        self._scheduler.fail(sequence)
        return TokenOutput(
            sequence.request.key,
            sequence.index,
            -1,
            FinishReason.FAILED,
            num_cached_tokens=num_cached_tokens,
            error=error,
        )

    def _finish(self, sampling: SamplingParams, index: int, token_id: int) -> FinishReason | None:
        """Whether the token ends the choice."""
        if token_id in sampling.ends(self._eos_token_ids):
            return FinishReason.STOP
        if index + 1 >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None
