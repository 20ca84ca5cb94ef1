"""The one schedule of a run: which request is sent when, how long it is, which blocks its prompt shares.

It is drawn once, from one seed, before anything is sent; the sender only executes it. Its bytes, and so its hash,
depend on the arguments alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random

import orjson

from loadgen.arrivals import Arrivals, constant_times, gamma_times, poisson_times, spread_ticks
from loadgen.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from shared.errors import StartupError


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """What is replayed, and how fast.

    Attributes:
        seed: of arrivals, of the spreading of ticks and of all prompt tokens.
        rows: half-open slice of the trace's rows, or None for all.
        window_s: half-open slice of the trace's own seconds, or None for all.
        num_prompts: at most this many rows, or None for all that are left.
        arrivals: the trace's clock or a rate.
        speed: the trace's clock runs this many times faster (trace arrivals only).
        jitter_ticks: spread requests that a quantised clock put on one instant (trace arrivals only).
        request_rate_per_s: requests a second (other arrivals only).
        burstiness: gamma shape (gamma arrivals only).
        length_scale: factor on prompt, answer and block lengths.
        max_input_tokens, max_output_tokens: longer ones, after scaling, are cut to this; None leaves them.
    """

    seed: int = 0
    rows: tuple[int, int | None] | None = None
    window_s: tuple[float, float | None] | None = None
    num_prompts: int | None = None
    arrivals: Arrivals = Arrivals.TRACE
    speed: float = 1.0
    jitter_ticks: bool = False
    request_rate_per_s: float | None = None
    burstiness: float = 1.0
    length_scale: float = 1.0
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PromptBlock:
    """`num_tokens` prompt tokens; those of one hash id are everywhere the same, a shorter block is a prefix."""

    hash_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One request to send.

    Attributes:
        row: its place in the schedule, from 0.
        trace_index: its place in the trace.
        at_us: microseconds after the start of the run at which it is to be sent.
        blocks: what the prompt is made of, `input_tokens` in all; empty for a prompt that shares nothing.
    """

    row: int
    trace_index: int
    at_us: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[PromptBlock, ...]

    @property
    def at_s(self) -> float:
        """Seconds after the start of the run at which it is to be sent."""
        return self.at_us / 1e6


@dataclass(frozen=True, slots=True)
class Schedule:
    """All requests of a run in the order of their times.

    Attributes:
        clipped_inputs, clipped_outputs: rows that were cut to the maximum.
        stretched: rows that scaling would have left without a prompt or answer token: they have one.
    """

    seed: int
    rows: tuple[ScheduledRow, ...]
    clipped_inputs: int
    clipped_outputs: int
    stretched: int

    @property
    def span_s(self) -> float:
        """Seconds from the start of the run to the last send."""
        return self.rows[-1].at_s

    def to_bytes(self, request_shape: Mapping[str, object]) -> bytes:
        """JSON lines: first what shapes every request, then the rows."""
        head = {"version": 1, "seed": self.seed, "request": request_shape}
        return b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in (head, *self.rows))

    def digest(self, request_shape: Mapping[str, object]) -> str:
        """sha256 of `to_bytes`: two runs of one digest send the same requests at the same times."""
        return sha256(self.to_bytes(request_shape)).hexdigest()

    def shared_input_tokens(self) -> int:
        """Prompt tokens that an earlier row's prompt began with too: what a perfect prefix cache could save."""
        longest: dict[int, int] = {}
        shared = 0
        for row in self.rows:
            unbroken = True
            for block in row.blocks:
                known = longest.get(block.hash_id, 0)
                shared += min(known, block.num_tokens) if unbroken else 0
                unbroken = unbroken and known >= block.num_tokens
                longest[block.hash_id] = max(known, block.num_tokens)
        return shared


def draw_schedule(trace: Sequence[TraceRow], settings: ScheduleSettings) -> Schedule:
    """The schedule of `trace` under `settings`. Raises StartupError if no row is left."""
    chosen = _slice(trace, settings)
    if not chosen:
        raise StartupError("the slice of the trace is empty: see --rows, --window and --num-prompts")
    times_s = _times(chosen, settings)
    rows: list[ScheduledRow] = []
    clipped_inputs = clipped_outputs = stretched = 0
    for at_s, source in zip(times_s, chosen, strict=True):
        scaled_input = round(source.input_tokens * settings.length_scale)
        scaled_output = round(source.output_tokens * settings.length_scale)
        input_tokens = _clip(max(1, scaled_input), settings.max_input_tokens)
        output_tokens = _clip(max(1, scaled_output), settings.max_output_tokens)
        stretched += scaled_input < 1 or scaled_output < 1
        clipped_inputs += input_tokens < scaled_input
        clipped_outputs += output_tokens < scaled_output
        rows.append(
            ScheduledRow(
                row=len(rows),
                trace_index=source.index,
                at_us=round(at_s * 1e6),
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                blocks=prompt_blocks(source.hash_ids, input_tokens, settings.length_scale),
            )
        )
    return Schedule(settings.seed, tuple(rows), clipped_inputs, clipped_outputs, stretched)


def prompt_blocks(hash_ids: Sequence[int], input_tokens: int, length_scale: float) -> tuple[PromptBlock, ...]:
    """The scaled blocks of a prompt of `input_tokens` (scaled) tokens.

    Block k ends at round((k + 1) * 512 * scale). An id always stands at the same place, because it names all blocks
    before it too, so rounding gives its block the same length in every prompt and the sum of lengths stays exact.
    """
    blocks: list[PromptBlock] = []
    start = 0
    for place, hash_id in enumerate(hash_ids, start=1):
        is_last = place == len(hash_ids)
        end = input_tokens if is_last else min(input_tokens, round(place * MOONCAKE_BLOCK_TOKENS * length_scale))
        if end > start:
            blocks.append(PromptBlock(hash_id, end - start))
        start = end
    return tuple(blocks)


def _slice(trace: Sequence[TraceRow], settings: ScheduleSettings) -> list[TraceRow]:
    first, last = settings.rows or (0, None)
    rows = list(trace[first:last])
    if settings.window_s is not None:
        from_s, to_s = settings.window_s
        rows = [row for row in rows if from_s <= row.at_s and (to_s is None or row.at_s < to_s)]
    return rows[: settings.num_prompts]


def _times(rows: Sequence[TraceRow], settings: ScheduleSettings) -> list[float]:
    # A string seeds through sha512, the same in every process.
    rng = Random(f"{settings.seed}/arrivals")
    if settings.arrivals is Arrivals.TRACE:
        if settings.request_rate_per_s is not None:
            raise StartupError("--request-rate sets the times; use --speed to make the trace's own clock faster")
        times_s = [row.at_s for row in rows]
        times_s = spread_ticks(times_s, rng) if settings.jitter_ticks else times_s
        start_s = times_s[0]
        return [(at_s - start_s) / settings.speed for at_s in times_s]
    rate_per_s = settings.request_rate_per_s
    if rate_per_s is None:
        raise StartupError(f"--arrivals {settings.arrivals} needs --request-rate")
    if settings.jitter_ticks or settings.speed != 1:
        raise StartupError("--speed and --jitter-ticks belong to the trace's own clock, not to --request-rate")
    if settings.burstiness != 1 and settings.arrivals is not Arrivals.GAMMA:
        raise StartupError("--burstiness belongs to --arrivals gamma")
    match settings.arrivals:
        case Arrivals.POISSON:
            return poisson_times(len(rows), rate_per_s, rng)
        case Arrivals.CONSTANT:
            return constant_times(len(rows), rate_per_s)
        case Arrivals.GAMMA:
            return gamma_times(len(rows), rate_per_s, settings.burstiness, rng)


def _clip(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)
