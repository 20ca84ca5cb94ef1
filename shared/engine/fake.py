"""A runner whose answers a person can check by hand, and whose KV really travels.

The rule, for a sequence of ids of which the first `prompt_len` are prompt:

    index = len(ids) - prompt_len
    next  = (sum of all ids + 3 * last id + 7 * index) mod vocab_size
    at temperature above 0, add 101 * seed + 13 * choice + 17 * index before the mod

    [10, 20, 30], all prompt, greedy:  60 + 90 + 0 = 150;  then [10, 20, 30, 150]:  210 + 450 + 7 = 667

- A prompt that ends in `END_AT, k` has its end in it: the token with index k is the first EOS id, whatever the rule
  says. (The rule also meets an EOS id now and then by itself.)
- While no end is allowed (`forbid_end`), a token that would end the choice is counted up, mod vocab_size, to the next
  one that would not.
- With logprobs, token t has -(1 + t mod 7) / 8; the k-th rival is (t + k) mod vocab_size with k / 4 less.
- top-k, top-p, min-p and penalties change nothing.
- A salted runner adds `salt_of(key)`, the CRC-32 of the row's key, before the mod. The key is the placement, so the
  tokens of two placements differ: an answer that mixes them cannot be taken for that of one.

KV of a token at position p is K = (id, p + 1) and V = (-id, -p - 1), one layer, one head, float32. The next token is
computed from the ids read back from the pages, not from the row: KV that is missing or of another position raises
AssertionError, KV of other ids gives other tokens.

It computes a batch as late as a device may, when it is waited for, and spoils what the batch is to write when it is
launched: whoever reads a page too early finds no KV, and whoever writes to a page that a batch in flight uses is found
out. With a `Pace` a batch takes as long as on a device of that speed.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from shared.blocks import PAGE_TOKENS, TokenIds, pages_for
from shared.engine.batch import BatchRow, Launched, Sampled
from shared.engine.engine import PagedEngine
from shared.engine.layer_marks import LayerMarks
from shared.engine.port import EngineLimits, EngineModel
from shared.kv.host_pages import PinnedPages
from shared.kv.host_tier import HostPages
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import SamplingParams, TokenLogprob

FAKE_VOCAB_SIZE = 1000
FAKE_EOS_TOKEN_ID = 2
END_AT = 998
"""Second to last id of a prompt whose answer ends at the index that the last id gives."""

SPOILT = -1
"""In the KV where an id should be: a batch in flight is going to write there."""


def fake_model(
    name: str = "fake",
    vocab_size: int = FAKE_VOCAB_SIZE,
    eos_token_ids: tuple[int, ...] = (FAKE_EOS_TOKEN_ID,),
) -> EngineModel:
    """The model that a FakeRunner runs."""
    return EngineModel(
        name=name,
        fingerprint=name,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        layout=KvLayout(model_fingerprint=name, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32"),
    )


def salt_of(key: str) -> int:
    """What a salted runner adds to the tokens of the request `key`."""
    return crc32(key.encode())


def fake_answer(
    ids: TokenIds,
    prompt_len: int,
    sampling: SamplingParams,
    choice: int = 0,
    count: int | None = None,
    *,
    vocab_size: int = FAKE_VOCAB_SIZE,
    eos_token_ids: tuple[int, ...] = (FAKE_EOS_TOKEN_ID,),
    salted_by: str | None = None,
) -> list[int]:
    """The tokens that follow `ids`, up to and with the one that ends the choice; `count` at most.

    `salted_by`: the key under which a salted runner makes them; None: as a runner without salt.
    """
    model = fake_model(vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    salt = 0 if salted_by is None else salt_of(salted_by)
    enders = _enders(sampling, eos_token_ids)
    end_index = _end_index(ids[:prompt_len])
    id_sum, last_id = sum(ids), ids[-1]
    answer: list[int] = []
    for index in range(len(ids) - prompt_len, sampling.max_tokens):
        if count is not None and len(answer) == count:
            break
        forbidden = enders if index < sampling.min_tokens else frozenset[int]()
        last_id = _next_token(
            model,
            id_sum=id_sum,
            last_id=last_id,
            index=index,
            end_index=end_index,
            sampling=sampling,
            choice=choice,
            forbidden=forbidden,
            salt=salt,
        )
        id_sum += last_id
        answer.append(last_id)
        if last_id in enders:
            break
    return answer


class Pace:
    """The time of a device that runs one batch after the other, each for `step_s`, whatever its host does meanwhile.

    Args:
        clock_s, sleep: seconds by a clock that never jumps back, and waiting by it.
    """

    def __init__(
        self,
        step_s: float,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._step_s = step_s
        self._clock_s = clock_s
        self._sleep = sleep
        self._idle_from_s = clock_s()

    def launch(self) -> float:
        """When a batch that is launched now is done."""
        self._idle_from_s = max(self._clock_s(), self._idle_from_s) + self._step_s
        return self._idle_from_s

    def wait_until(self, done_s: float) -> None:
        """Wait as for a batch that is done then."""
        left_s = done_s - self._clock_s()
        if left_s > 0:
            self._sleep(left_s)


class FakeRunner:
    """`shared.engine.batch.Runner` that runs the rule above on the CPU.

    Args:
        poison_token_id: a row that has this id in its KV fails as if its logits held a NaN; None: no id does.
        salted: tokens depend on the row's key.
        pace: how long batches take; None: no longer than the work.
    """

    def __init__(
        self,
        model: EngineModel,
        num_pages: int,
        poison_token_id: int | None = None,
        num_ahead: int = 1,
        *,
        salted: bool = False,
        pace: Pace | None = None,
    ) -> None:
        self._model = model
        self._cache = PagedCache(model.layout, num_pages, torch.device("cpu"))
        self._pages: NDArray[np.float32] = self._cache.pages.numpy()  # the same memory
        self._poison_token_id = poison_token_id
        self._num_ahead = num_ahead
        self._salted = salted
        self._pace = pace
        self._in_flight: deque[_FakeLaunched] = deque()
        self._drawn: dict[int, tuple[int, int, int]] = {}  # by seat: the newest token's sequence, position and id

    @property
    def cache(self) -> PagedCache:
        return self._cache

    @property
    def num_ahead(self) -> int:
        return self._num_ahead

    def launch(
        self,
        rows: tuple[BatchRow, ...],
        layers: LayerMarks | None = None,  # noqa: ARG002 - all its layers are done at one moment, as in a graph
    ) -> Launched:
        if len(self._in_flight) > self._num_ahead:
            raise AssertionError(f"{len(self._in_flight)} batches are in flight already")
        _refuse_shared_writes(rows)
        for row in rows:
            self._write_kv(row, np.full(row.end - row.start, SPOILT))
        done_s = None if self._pace is None else self._pace.launch()
        launched = _FakeLaunched(self, tuple(replace(row, ids=row.ids[:]) for row in rows), done_s)
        self._in_flight.append(launched)
        return launched

    def compute(self, launched: "_FakeLaunched") -> list[Sampled | None]:
        """What the batch draws; it must be the oldest in flight."""
        if launched is not self._in_flight.popleft():
            raise AssertionError("a batch is waited for before an older one")
        if self._pace is not None and launched.done_s is not None:
            self._pace.wait_until(launched.done_s)
        for row in launched.rows:
            self._write_kv(row, self._new_ids(row))
        results = [self._sample(row, self._read(row)) for row in launched.rows]
        for row, sampled in zip(launched.rows, results, strict=True):
            if sampled is not None:
                self._drawn[row.seat] = row.sequence, row.end, max(sampled.token_id, 0)
        return results

    def _new_ids(self, row: BatchRow) -> NDArray[np.int32]:
        """ids[start:end], the last one from the seat if the host did not know it."""
        if row.end <= len(row.ids):
            return np.array(row.ids[row.start : row.end], dtype=np.int32)
        sequence, position, token_id = self._drawn.get(row.seat, (-1, -1, -1))
        if (sequence, position, position) != (row.sequence, row.start, len(row.ids)):
            raise AssertionError(
                f"request {row.key!r} wants position {row.start} of its {len(row.ids)} ids and what seat {row.seat}"
                f" drew, which is position {position} of sequence {sequence}"
            )
        return np.array([token_id], dtype=np.int32)

    def _write_kv(self, row: BatchRow, ids: NDArray[np.int32]) -> None:
        positions = np.arange(row.start, row.end)
        pages, offsets = np.asarray(row.pages)[positions // PAGE_TOKENS], positions % PAGE_TOKENS
        kv = np.stack((ids, positions + 1), axis=-1)
        self._pages[pages, 0, 0, offsets, 0] = kv
        self._pages[pages, 0, 1, offsets, 0] = -kv

    def _read(self, row: BatchRow) -> NDArray[np.int64]:
        """Ids of positions [0, end) as the pages have them."""
        pages = row.pages[: pages_for(row.end)]
        kv = self._pages[list(pages), 0, :, :, 0].swapaxes(0, 1).reshape(2, -1, 2)[:, : row.end]
        wrong = (kv[0, :, 1] != np.arange(1, row.end + 1)) | (kv[0] != -kv[1]).any(axis=-1) | (kv[0, :, 0] == SPOILT)
        if wrong.any():
            position = int(wrong.argmax())
            raise AssertionError(
                f"request {row.key!r}: page {pages[position // PAGE_TOKENS]} should hold position {position},"
                f" its K is {kv[0, position].tolist()} and its V {kv[1, position].tolist()}"
            )
        return kv[0, :, 0].astype(np.int64)

    def _sample(self, row: BatchRow, ids: NDArray[np.int64]) -> Sampled | None:
        if not row.sample:
            return None
        if self._poison_token_id is not None and (ids == self._poison_token_id).any():
            return Sampled(-1, error="NaN in the logits")
        forbidden = _enders(row.sampling, self._model.eos_token_ids) if row.forbid_end else frozenset[int]()
        token_id = _next_token(
            self._model,
            id_sum=int(ids.sum()),
            last_id=int(ids[-1]),
            index=row.end - row.prompt_len,
            end_index=_end_index(ids[: row.prompt_len]),
            sampling=row.sampling,
            choice=row.choice,
            forbidden=forbidden,
            salt=salt_of(row.key) if self._salted else 0,
        )
        return Sampled(token_id, _logprob(token_id, row.sampling, self._model.vocab_size))


class _FakeLaunched:
    """A batch of a FakeRunner, with the ids as they were at its launch, and when a paced one is done."""

    def __init__(self, runner: FakeRunner, rows: tuple[BatchRow, ...], done_s: float | None) -> None:
        self._runner = runner
        self.rows = rows
        self.done_s = done_s

    def wait(self) -> list[Sampled | None]:
        return self._runner.compute(self)


def fake_engine(
    *,
    model: EngineModel | None = None,
    num_pages: int = 64,
    max_context: int = 4096,
    max_running: int = 8,
    max_batch_tokens: int = 256,
    poison_token_id: int | None = None,
    num_ahead: int = 1,
    salted: bool = False,
    pace: Pace | None = None,
    num_host_pages: int = 0,
    host_pages: Callable[[PagedCache, int], HostPages] = PinnedPages,
) -> PagedEngine:
    """A PagedEngine over a FakeRunner."""
    model = model or fake_model()
    limits = EngineLimits(max_context, num_pages, max_running, max_batch_tokens, num_host_pages)
    runner = FakeRunner(model, num_pages, poison_token_id, num_ahead, salted=salted, pace=pace)
    return PagedEngine(runner, model, limits, host_pages=host_pages)


def _next_token(
    model: EngineModel,
    *,
    id_sum: int,
    last_id: int,
    index: int,
    end_index: int | None,
    sampling: SamplingParams,
    choice: int,
    forbidden: AbstractSet[int],
    salt: int,
) -> int:
    if index == end_index:
        token_id = model.eos_token_ids[0]
    else:
        draw = 101 * sampling.seed + 13 * choice + 17 * index if sampling.temperature > 0 else 0
        token_id = (id_sum + 3 * last_id + 7 * index + draw + salt) % model.vocab_size
    while token_id in forbidden:
        token_id = (token_id + 1) % model.vocab_size
    return token_id


def _end_index(prompt: TokenIds | NDArray[np.int64]) -> int | None:
    return int(prompt[-1]) if len(prompt) >= 2 and prompt[-2] == END_AT else None


def _enders(sampling: SamplingParams, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """Tokens that end a choice."""
    return frozenset(sampling.stop_token_ids + (() if sampling.ignore_eos else eos_token_ids))


def _logprob(token_id: int, sampling: SamplingParams, vocab_size: int) -> TokenLogprob | None:
    if sampling.logprobs is None:
        return None
    logprob = -(1 + token_id % 7) / 8
    top = tuple(((token_id + k) % vocab_size, logprob - k / 4) for k in range(sampling.logprobs))
    return TokenLogprob(logprob, top)


def _refuse_shared_writes(rows: tuple[BatchRow, ...]) -> None:
    """Raise AssertionError if a row writes a page that another row of the batch has too, or sits in its seat."""
    if len({row.seat for row in rows}) < len(rows):
        raise AssertionError("two rows of one batch have the same seat")
    writer: dict[int, str] = {}
    num_written = 0
    for row in rows:
        for page in row.pages[row.start // PAGE_TOKENS : pages_for(row.end)]:
            writer[page] = row.key
            num_written += 1
    for row in rows:
        for page in row.pages[: row.start // PAGE_TOKENS]:
            if page in writer:
                raise AssertionError(f"page {page} of request {row.key!r} is written by {writer[page]!r}")
    if num_written != len(writer):
        raise AssertionError("two rows of one batch write the same page")
