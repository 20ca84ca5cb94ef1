"""`python -m benchmarks.host_tier`: what host memory for pages is worth, and what it costs.

Crossover: the first token of a prompt whose pages are nowhere, in host memory, or on the device. Steps: decode steps
alone, and beside copies between pages and host memory of so many pages at a time.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import typer

from benchmarks.engine.build import SHAPES, SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.drive import DecodeRows, Work, greedy, run_all
from benchmarks.engine.machine import commit, machine
from shared.blocks import PAGE_TOKENS
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest
from shared.kv.host_pages import PinnedPages
from shared.kv.host_tier import Copied

POLL_S = 1e-3
SETTLED_POLLS = 20
"""Looks at an idle tier without a copy more: it has saved what it wants to."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Attributes:
        lengths: of prompts, in pages.
        num_rows, context: of the decode steps.
        copies: pages on their way at a time beside a step.
    """

    num_pages: int
    num_host_pages: int
    max_running: int
    max_batch_tokens: int
    lengths: tuple[int, ...]
    repeats: int
    num_rows: int
    context: int
    num_steps: int
    copies: tuple[int, ...]


FULL = Sizes(
    num_pages=2048,
    num_host_pages=2048,
    max_running=64,
    max_batch_tokens=8192,
    lengths=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    repeats=5,
    num_rows=64,
    context=1024,
    num_steps=200,
    copies=(10, 64, 256),
)

TINY = Sizes(
    num_pages=48,
    num_host_pages=48,
    max_running=8,
    max_batch_tokens=256,
    lengths=(1, 4),
    repeats=1,
    num_rows=2,
    context=100,
    num_steps=4,
    copies=(2,),
)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds to the first token of a prompt, the median.

    Attributes:
        num_tokens: of the prompt's full pages; one token more is computed each time.
        computed_s, restored_s, found_s: its pages are nowhere, in host memory alone, on the device.
    """

    num_tokens: int
    computed_s: float
    restored_s: float
    found_s: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps beside copies.

    Attributes:
        direction: "down" to the host, "up" from it, "both", or "none".
        num_pages: on their way at a time, in each direction.
        bytes_per_s: copied meanwhile, both directions together.
    """

    direction: str
    num_pages: int
    mean_s: float
    p99_s: float
    bytes_per_s: float


def first_tokens(engine: PagedEngine, work: Work, sizes: Sizes) -> Iterator[FirstToken]:
    """A row for each length."""
    for num_pages in sizes.lengths:
        num_tokens = num_pages * PAGE_TOKENS
        taken = [_first_token(engine, work, num_tokens) for _ in range(sizes.repeats + 1)][1:]
        computed_s, restored_s, found_s = (median(times) for times in zip(*taken, strict=True))
        yield FirstToken(num_tokens, computed_s, restored_s, found_s)


def _first_token(engine: PagedEngine, work: Work, num_tokens: int) -> tuple[float, float, float]:
    ids = work.prompt(num_tokens + 1)

    def timed() -> float:
        wanted = EngineRequest(key=work.key(), ids=ids, prompt_len=len(ids), sampling=greedy(1))
        return run_all(engine, [wanted])

    before = engine.stats()
    computed_s = timed()
    push_out(engine, work)
    pushed = engine.stats()
    restored_s = timed()
    restored = engine.stats()
    found_s = timed()
    found = engine.stats()
    if pushed.num_prefix_hits != before.num_prefix_hits:
        raise RuntimeError("a prompt was found that nobody sent before")
    if restored.num_host_hits - pushed.num_host_hits != num_tokens or found.num_host_hits != restored.num_host_hits:
        raise RuntimeError(f"{num_tokens} tokens were not brought back from host memory: {found}")
    return computed_s, restored_s, found_s


def push_out(engine: PagedEngine, work: Work) -> None:
    """Let all blocks go from the device, none of them before it is saved."""
    piece = -(-engine.limits.num_pages // engine.limits.max_running)
    keys: list[str] = []
    while num_pages := min(piece, engine.stats().num_free_pages):
        settle(engine)
        ids = work.prompt((num_pages - 1) * PAGE_TOKENS + 1)
        wanted = EngineRequest(key=work.key(), ids=ids, prompt_len=len(ids), sampling=greedy(2))
        if engine.reserve(wanted) is None:
            break
        keys.append(wanted.key)
    for key in keys:
        engine.abort(key)


def settle(engine: PagedEngine) -> None:
    """Wait until the tier has saved what it wants to."""
    num_quiet, num_bytes = 0, -1
    while num_quiet < SETTLED_POLLS:
        engine.take_block_changes()
        now_bytes = engine.stats().num_saved_bytes
        num_quiet = num_quiet + 1 if now_bytes == num_bytes else 0
        num_bytes = now_bytes
        time.sleep(POLL_S / 10)


class Traffic:
    """Keeps copies on their way, of pages that nobody uses, through host memory of its own."""

    def __init__(self, host: PinnedPages, pages: Sequence[int], direction: str, num_pages: int) -> None:
        slots = range(num_pages)
        starts: dict[str, Callable[[], Copied]] = {
            "down": lambda: host.save(pages[:num_pages], slots),
            "up": lambda: host.restore(slots, pages[:num_pages]),
        }
        self._starts = [start for name, start in starts.items() if direction in {name, "both"}]
        self._on_way: list[Copied | None] = [None] * len(self._starts)
        self._bytes_a_copy = num_pages * host.page_bytes
        self.num_bytes = 0

    def go_on(self) -> None:
        """Begin again what has ended."""
        for lane, start in enumerate(self._starts):
            copied = self._on_way[lane]
            if copied is None or copied.query():
                self.num_bytes += self._bytes_a_copy if copied else 0
                self._on_way[lane] = start()

    def end(self) -> None:
        for copied in self._on_way:
            if copied is not None:
                copied.synchronize()
                self.num_bytes += self._bytes_a_copy


@contextmanager
def unused_pages(engine: PagedEngine, work: Work, number: int) -> Iterator[tuple[int, ...]]:
    """Pages that nobody else has meanwhile."""
    ids = work.prompt(number * PAGE_TOKENS)
    reservation = engine.reserve(EngineRequest("unused", ids, len(ids), greedy(2)))
    if reservation is None:
        raise RuntimeError(f"no {number} pages are free: {engine.stats()}")
    try:
        yield reservation.pages
    finally:
        engine.abort("unused")


def decode_steps(engine: PagedEngine, work: Work, sizes: Sizes) -> Iterator[Steps]:
    """Steps alone before each kind of company: the clock of a GPU drifts."""
    num_most = max(sizes.copies)
    host = PinnedPages(engine.cache, num_most)
    with unused_pages(engine, work, num_most) as pages:
        for num_pages in sizes.copies:
            for direction in ("none", "down", "up", "both"):
                traffic = Traffic(host, pages, direction, num_pages)
                yield _steps(engine, work, sizes, direction, traffic, num_pages)


def _steps(engine: PagedEngine, work: Work, sizes: Sizes, direction: str, traffic: Traffic, num_pages: int) -> Steps:
    num_tokens = sizes.num_steps + 16
    rows = DecodeRows(engine, work, sizes.num_rows, sizes.context, greedy(num_tokens))
    rows.steps(4)  # the first of them carry the rows' entry
    taken: list[float] = []
    began_s = time.perf_counter()
    for _ in range(sizes.num_steps):
        traffic.go_on()
        taken.append(rows.steps(1))
    traffic.end()
    took_s = time.perf_counter() - began_s
    rows.close()
    p99_s = sorted(taken)[int(0.99 * (len(taken) - 1))]
    return Steps(direction, num_pages if direction != "none" else 0, mean(taken), p99_s, traffic.num_bytes / took_s)


def crossover(rows: Sequence[FirstToken]) -> int | None:
    """The shortest measured prompt from which on restoring always beat computing; None: none."""
    shortest: int | None = None
    for row in reversed(rows):
        if row.restored_s >= row.computed_s:
            break
        shortest = row.num_tokens
    return shortest


def table(rows: Sequence[FirstToken], steps: Sequence[Steps], page_bytes: int) -> str:
    """Both measurements, for people."""
    lines = ["| tokens | computed ms | from the host ms | found ms | host to device GB/s |", "|--:|--:|--:|--:|--:|"]
    for row in rows:
        num_bytes = row.num_tokens // PAGE_TOKENS * page_bytes
        rate = num_bytes / max(row.restored_s - row.found_s, 1e-9) / 1e9
        times = (row.computed_s, row.restored_s, row.found_s)
        lines.append(f"| {row.num_tokens} | {' | '.join(f'{1e3 * each:.2f}' for each in times)} | {rate:.1f} |")
    lines += ["", f"from the host beats computing from {crossover(rows)} tokens on", ""]
    lines += ["| copies beside the steps | pages | step ms | p99 ms | GB/s |", "|---|--:|--:|--:|--:|"]
    for each in steps:
        figures = f"{1e3 * each.mean_s:.3f} | {1e3 * each.p99_s:.3f} | {each.bytes_per_s / 1e9:.1f}"
        lines.append(f"| {each.direction} | {each.num_pages} | {figures} |")
    return "\n".join(lines)


def main(
    *,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure restore against recompute, and what copies do to decode steps."""
    sizes = TINY if shape in {"tiny", "small"} else FULL
    plan = BenchPlan(
        device=device,
        dtype=dtype,
        runner="triton" if device == "cuda" else "torch",
        num_pages=sizes.num_pages,
        max_running=sizes.max_running + 1,
        max_batch_tokens=sizes.max_batch_tokens,
        num_host_pages=sizes.num_host_pages,
    )
    built, _ = start_engine(shape, plan, SPEED_WEIGHTS)
    engine = built.engine
    work = Work(engine.model.vocab_size, seed)
    rows = list(first_tokens(engine, work, sizes))
    steps = list(decode_steps(engine, work, sizes))
    engine.check()
    result = {
        "shape": shape,
        "runs": built.runs,
        "sizes": asdict(sizes),
        "page_bytes": engine.model.layout.page_bytes,
        "first_tokens": [asdict(row) for row in rows],
        "crossover_tokens": crossover(rows),
        "steps": [asdict(each) for each in steps],
        "late_work": built.late_work(),
        "engine": asdict(engine.stats()),
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": revision or commit(),
    }
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{table(rows, steps, engine.model.layout.page_bytes)}\n")


if __name__ == "__main__":
    typer.run(main)
