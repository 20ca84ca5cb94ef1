"""Runs a few steps of many sizes to see how long they take, before anybody waits for an answer.

Without that a decode worker would know nothing of prompts, which it computes only where it is known to be quick at it.
The runner is asked itself, so that no engine counts, caches or announces what is computed here: it means nothing, as
what stands in pages that nobody holds. All shapes are such as the runner has warmed up for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS, pages_for, token_ids
from shared.engine.batch import BatchRow, Launched, Runner, work_of
from shared.engine.port import EngineLimits
from shared.policy.profile_fit import MeasuredStep
from shared.request import SamplingParams

NUM_REPEATS = 3
"""Steps of each size that count; the one before them pays for what happens once."""

DECODE_ROWS_SHARES = (0.0, 0.25, 1.0)
"""Of the seats: 0 is one row."""

DECODE_CONTEXTS = (250, 1800)
"""Not at powers of two: those that belong together shall not fall into two bins of a fit."""

CHUNK_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)
"""Of the longest chunk."""

REACHES = (0, 2, 4)
"""Positions before the longest chunk, in multiples of it: attention's share shows there."""

FIRST_SEQUENCE = -2
"""Numbers that no sequence of an engine has; -1 is nobody's."""

PLAIN = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, slots=True)
class _Size:
    """Rows that begin behind `before` positions, of `num_tokens` each; decode rows if `decodes`."""

    num_rows: int
    before: int
    num_tokens: int
    decodes: bool

    @property
    def cost_tokens(self) -> int:
        """What it takes against others, roughly."""
        return self.num_rows * (self.num_tokens + self.before // 16)


def measure_steps(
    runner: Runner, limits: EngineLimits, *, budget_s: float, clock_s: Callable[[], float]
) -> tuple[MeasuredStep, ...]:
    """The times of steps of all sizes that are expected to run within `budget_s`, small ones first."""
    # As in warming up: what the runner's libraries keep for a thread goes on to the one that will launch.
    with ThreadPoolExecutor(1, thread_name_prefix="measure") as thread:
        return thread.submit(_measure_all, runner, limits, budget_s, clock_s).result()


def _measure_all(
    runner: Runner, limits: EngineLimits, budget_s: float, clock_s: Callable[[], float]
) -> tuple[MeasuredStep, ...]:
    began_s = clock_s()
    measured: list[MeasuredStep] = []
    s_per_token = {True: 0.0, False: 0.0}
    for number, size in enumerate(sorted(_sizes(limits), key=lambda size: size.cost_tokens)):
        started_s = clock_s()
        expected_s = s_per_token[size.decodes] * size.cost_tokens
        if started_s + expected_s - began_s > budget_s:
            continue
        measured += _measure(runner, _batches(size, limits, number), clock_s)
        s_per_token[size.decodes] = (clock_s() - started_s) / size.cost_tokens
    return tuple(measured)


def _sizes(limits: EngineLimits) -> Iterator[_Size]:
    longest = min(limits.max_batch_tokens, limits.num_pages * PAGE_TOKENS, limits.max_context) - NUM_REPEATS - 1
    for share in DECODE_ROWS_SHARES:
        for context in DECODE_CONTEXTS:
            yield _Size(max(1, int(share * limits.max_running)), min(context, longest), 1, decodes=True)
    for share in CHUNK_SHARES:
        yield _Size(1, 0, max(1, int(share * longest)), decodes=False)
    for reach in REACHES[1:]:
        if (reach + 1) * longest <= min(limits.max_context, limits.num_pages * PAGE_TOKENS):
            yield _Size(1, reach * longest, longest, decodes=False)


def _batches(size: _Size, limits: EngineLimits, number: int) -> Iterator[tuple[BatchRow, ...]]:
    """One after the other: decode rows go on, chunks are computed again. Rows share pages where these are few."""
    last_end = size.before + size.num_tokens + (NUM_REPEATS if size.decodes else 0)
    num_pages = pages_for(last_end)
    ids = token_ids([0] * last_end)
    pages = [
        tuple((row * num_pages + index) % limits.num_pages for index in range(num_pages))
        for row in range(size.num_rows)
    ]
    for repeat in range(1 + NUM_REPEATS):
        start = size.before + (repeat if size.decodes else 0)
        yield tuple(
            BatchRow(
                key=f"measured-{row}",
                sequence=FIRST_SEQUENCE - number,
                seat=row,
                ids=ids,
                start=start,
                end=start + size.num_tokens,
                pages=pages[row],
                prompt_len=size.before or size.num_tokens,
                sample=True,
                sampling=PLAIN,
                choice=0,
                forbid_end=False,
            )
            for row in range(size.num_rows)
        )


def _measure(
    runner: Runner, batches: Iterator[tuple[BatchRow, ...]], clock_s: Callable[[], float]
) -> Iterator[MeasuredStep]:
    """Launch them as an engine does that is never idle; from one that is done to the next is a step."""
    in_flight: deque[tuple[tuple[BatchRow, ...], Launched]] = deque()
    done_s: float | None = None

    def wait() -> Iterator[MeasuredStep]:
        nonlocal done_s
        rows, launched = in_flight.popleft()
        launched.wait()
        now_s = clock_s()
        if done_s is not None:
            decodes = rows[0].end - rows[0].start == 1
            yield MeasuredStep(work_of(rows, len(rows) if decodes else 0), now_s - done_s)
        done_s = now_s

    for rows in batches:
        in_flight.append((rows, runner.launch(rows)))
        if len(in_flight) > runner.num_ahead:
            yield from wait()
    while in_flight:
        yield from wait()
