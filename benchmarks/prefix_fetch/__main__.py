"""Command line; `--help` says the rest, `benchmarks/README.md` how to read the result."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.engine.machine import commit, machine, process_age_s
from benchmarks.kv_transfer.pair import Child, children
from shared.blocks import PAGE_TOKENS

MODULE = "benchmarks.prefix_fetch.ends"
NUM_WARM = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        shape: of the model, see `benchmarks.engine.build.SHAPES`.
        prefixes: tokens that the peer holds, of prompts of `rest` tokens more.
        batch_tokens: of a step at most.
        busy_tokens: of the prompts that the source computes meanwhile, where it is busy.
        repeats: of each measurement.
    """

    device: str
    shape: str
    prefixes: Sequence[int]
    rest: int
    batch_tokens: int
    busy_tokens: int
    repeats: int


FULL = Plan("cuda", "llama-3.1-8b", (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), 64, 8192, 8192, 7)
TRIAL = Plan("cpu", "small", (64, 128, 256, 512, 1024), 64, 512, 256, 3)


class Measuring:
    """Both workers, and prompts that nobody has seen."""

    def __init__(self, plan: Plan, source: Child, puller: Child) -> None:
        self._plan = plan
        self._source = source
        self._puller = puller
        self._seed = 0
        self._num_other_tokens = 0

    async def link(self) -> dict[str, Any]:
        self._address = await self._source.ask("where")
        return await self._puller.ask("connect", address=self._address)

    async def rows(self) -> list[dict[str, Any]]:
        """Raises RuntimeError if a prefix did not come."""
        rows = [await self._row(prefix) for prefix in self._plan.prefixes]
        await self._source.ask("be_busy", num_tokens=self._plan.busy_tokens)
        for row, prefix in zip(rows, self._plan.prefixes, strict=True):
            fetched, _ = await self._fetches(prefix)
            row["fetch_from_busy_ms"] = median(fetched)
        await self._source.ask("rest")
        return rows

    @property
    def num_other_tokens(self) -> int:
        """Prompts behind whose fetched pages another token came than behind the source's own."""
        return self._num_other_tokens

    async def _row(self, prefix: int) -> dict[str, Any]:
        num_bytes = prefix // PAGE_TOKENS * await self._puller.ask("page_bytes")
        before_s, _ = await self._puller.ask("fetched_s")
        fetched, computed = await self._fetches(prefix, compares=True)
        after_s, _ = await self._puller.ask("fetched_s")
        only_s = (after_s - before_s) / (NUM_WARM + self._plan.repeats)
        return {
            "prefix_tokens": prefix,
            "mib": num_bytes / 2**20,
            "compute_ms": median(computed),
            "fetch_ms": median(fetched),
            "fetch_alone_ms": 1e3 * only_s,
            "fetch_gb_per_s": num_bytes / only_s / 1e9,
        }

    async def _fetches(self, prefix: int, *, compares: bool = False) -> tuple[list[float], list[float]]:
        """Milliseconds to the first token with the prefix fetched, and if compared of another prompt without."""
        fetched: list[float] = []
        computed: list[float] = []
        for _ in range(NUM_WARM + self._plan.repeats):
            self._seed += 1
            num_tokens = prefix + self._plan.rest
            _, there = await self._source.ask("compute", seed=self._seed, num_tokens=num_tokens)
            fetch_ms, here = await self._puller.ask(
                "fetch",
                address=self._address,
                seed=self._seed,
                num_tokens=num_tokens,
                num_pages=prefix // PAGE_TOKENS,
            )
            self._num_other_tokens += here != there
            fetched.append(fetch_ms)
            if compares:
                self._seed += 1
                compute_ms, _ = await self._puller.ask("compute", seed=self._seed, num_tokens=num_tokens)
                computed.append(compute_ms)
        return fetched[NUM_WARM:], computed[NUM_WARM:]


async def measure(plan: Plan, gpus: Sequence[str]) -> dict[str, Any]:
    """The link, and a row for each length."""
    longest = max(*plan.prefixes, plan.busy_tokens) + plan.rest
    job = {"device": plan.device, "shape": plan.shape, "longest": longest, "batch_tokens": plan.batch_tokens}
    jobs = [{"end": end, **job} for end in ("source", "puller")]
    async with children(MODULE, jobs, gpus if plan.device == "cuda" else None) as (source, puller):
        measuring = Measuring(plan, source, puller)
        link = await measuring.link()
        rows = await measuring.rows()
    return {
        "link": link,
        "rows": rows,
        "other_tokens": measuring.num_other_tokens,
        "crossover_tokens": crossover(rows, "fetch_ms"),
        "crossover_from_busy_tokens": crossover(rows, "fetch_from_busy_ms"),
    }


def crossover(rows: Sequence[dict[str, Any]], name: str) -> int | None:
    """The shortest prefix from which on fetching is always faster; None: it never is."""
    found: int | None = None
    for row in reversed(rows):
        if row[name] >= row["compute_ms"]:
            break
        found = row["prefix_tokens"]
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    told = [f"link: {result['link']}", " prefix       MiB  compute ms  fetch ms  from busy  alone ms    GB/s"]
    told += [
        f"{row['prefix_tokens']:7} {row['mib']:9.1f} {row['compute_ms']:11.1f} {row['fetch_ms']:9.1f}"
        f" {row['fetch_from_busy_ms']:10.1f} {row['fetch_alone_ms']:9.2f} {row['fetch_gb_per_s']:7.1f}"
        for row in result["rows"]
    ]
    idle, busy = result["crossover_tokens"], result["crossover_from_busy_tokens"]
    told.append(f"fetching is faster from {idle} tokens on; from a source that computes, from {busy} on")
    return [*told, f"other tokens behind fetched pages than behind computed ones: {result['other_tokens']}"]


def main(
    *,
    device: Annotated[str, typer.Option(help="cuda, or cpu: a small trial.")] = "cuda",
    gpus: Annotated[str, typer.Option(help="GPUs of the source and of the puller.")] = "0,1",
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure both ways to a prompt's first token. Exit status 1: a token was another one behind fetched pages."""
    plan = FULL if device == "cuda" else TRIAL
    result = asyncio.run(measure(plan, gpus.split(","))) | {
        "plan": asdict(plan),
        "gpus": gpus if device == "cuda" else None,
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": revision or commit(),
        "took_s": round(process_age_s(), 1),
    }
    sys.stdout.write("\n".join(lines(result)) + f"\n\n{result['took_s']} s in all\n")
    if out:
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(1 if result["other_tokens"] else 0)


if __name__ == "__main__":
    typer.run(main)
