"""`python -m benchmarks.placement`: what a placement among 64 workers takes, and what it takes to know who holds what.

One process, one thread, no store: an index of as many blocks as asked for, then placements of prompts of which half
begin with what some workers hold, over workers under random loads. Times are of this thread's processor; placements a
second include hashing the prompt, as ingest does. Bytes a block are by the growth of this process.
"""

import json
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Annotated, Any, TypeVar

import psutil
import typer

from benchmarks.control_plane.machine import commit, machine
from shared.blocks import BlockHash, TokenIds, hash_chain, root_hash
from shared.policy.costs import UNMEASURED
from shared.policy.holders import Holders
from shared.policy.placement import Chosen, Decision, Rules, place
from shared.policy.profile import LinkRate
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import Incarnation, RequestId, WorkerRef

MODEL = "m"
ROOT = root_hash(MODEL, "tenant")
RULES = Rules(ttft_goal_s=2.0, tpot_goal_s=0.1)
LINK = LinkRate(latency_s=3.5e-4, bytes_per_s=3.4e11)
VOCABULARY = 32_000
NEWS_BLOCKS = 64
SECOND_HOLDER_SHARE = 0.1
HOST_SHARE = 0.25
HELD_SHARE = 0.5

T = TypeVar("T")


class Announcer:
    """Speaks for all workers."""

    def __init__(self, names: Sequence[Incarnation], rng: Random) -> None:
        self.holders = Holders()
        self._sequences = dict.fromkeys(names, 0)
        self._names = names
        self._rng = rng

    def announce(self, blocks: Sequence[BlockHash]) -> None:
        """Somebody has these, on its GPU or its host."""
        name = self._rng.choice(self._names)
        is_on_host = self._rng.random() < HOST_SHARE
        news = ((), (), blocks, ()) if is_on_host else (blocks, (), (), ())
        self.holders.update(name, self._sequences[name], *news)
        self._sequences[name] += 1

    def fill(self, num_blocks: int) -> None:
        """So many blocks that no prompt begins with, some of them at two workers."""
        for _ in range(0, num_blocks, NEWS_BLOCKS):
            blocks = [BlockHash(self._rng.randbytes(16)) for _ in range(NEWS_BLOCKS)]
            self.announce(blocks)
            if self._rng.random() < SECOND_HOLDER_SHARE:
                self.announce(blocks)

    def hold_beginnings(self, prompts: Sequence[TokenIds]) -> None:
        """Half of the prompts: one to three workers have some of their blocks."""
        for prompt in prompts:
            blocks = hash_chain(ROOT, prompt)
            if blocks and self._rng.random() < HELD_SHARE:
                for _ in range(self._rng.randint(1, 3)):
                    self.announce(blocks[: self._rng.randint(1, len(blocks))])


def a_cluster(num_workers: int, rng: Random) -> ClusterView:
    """Half the workers for each role, under random loads."""
    refs = [WorkerRef(slot, Incarnation(f"w{slot}")) for slot in range(num_workers)]
    links = {ref.incarnation: LINK for ref in refs}

    def view(ref: WorkerRef, *, is_decode: bool) -> WorkerView:
        num_credits = rng.randrange(100 if is_decode else 6)
        num_pages = num_credits * 24
        return WorkerView(
            ref=ref,
            model=MODEL,
            num_pages=13_000,
            num_credit_pages=num_pages,
            num_credits=num_credits,
            max_running=256,
            max_context=131_072,
            layout_fingerprint="l",
            max_batch_tokens=2048 if is_decode else 8192,
            page_bytes=8 << 20,
            profile=UNMEASURED,
            links=links,
            queued_prefill_s=0.0 if is_decode else num_credits * rng.random() * 0.2,
            num_context_tokens=num_pages * 64 if is_decode else 0,
            takes_work=True,
        )

    half = num_workers // 2
    return ClusterView(
        tuple(view(ref, is_decode=False) for ref in refs[:half]),
        tuple(view(ref, is_decode=True) for ref in refs[half:]),
    )


def measure(num_workers: int, num_blocks: int, num_prompts: int, num_tokens: int, rng: Random) -> dict[str, Any]:
    """All figures. Raises AssertionError if a prompt found no place."""
    cluster = a_cluster(num_workers, rng)
    announcer = Announcer([worker.ref.incarnation for worker in (*cluster.prefill, *cluster.decode)], rng)
    process = psutil.Process()
    before_bytes, began_s = process.memory_info().rss, time.thread_time()
    announcer.fill(num_blocks)
    fill_s = time.thread_time() - began_s
    grown_bytes = process.memory_info().rss - before_bytes

    prompts = [array("i", (rng.randrange(VOCABULARY) for _ in range(num_tokens))) for _ in range(num_prompts)]
    announcer.hold_beginnings(prompts)
    holders = announcer.holders
    requests = [a_request(prompt) for prompt in prompts]
    numbered = list(enumerate(requests))

    def decide(numbered: tuple[int, RequestView]) -> Decision:
        return place(numbered[1], cluster, holders, RULES, tie_break=numbered[0])

    def hash_and_decide(prompt: TokenIds) -> Decision:
        return decide((0, a_request(prompt)))

    chosen = [decision for decision in map(decide, numbered) if isinstance(decision, Chosen)]
    assert len(chosen) == num_prompts, "a prompt found no room"
    from_prompt_us = each_us(hash_and_decide, prompts)
    return {
        "workers": num_workers,
        "blocks": num_blocks,
        "index": {
            "grown_mib": round(grown_bytes / 2**20),
            "bytes_per_block": round(grown_bytes / max(num_blocks, 1)),
            "announce_us_per_block": round(fill_s / max(num_blocks, 1) * 1e6, 2),
        },
        "prompts": num_prompts,
        "prompt_tokens": num_tokens,
        "local": sum(each.prefill == each.decode for each in chosen),
        "fetched": sum(each.fetch is not None for each in chosen),
        "matches_us": spread(each_us(lambda request: holders.matches(request.blocks), requests)),
        "place_us": spread(each_us(decide, numbered)),
        "placements_per_s": round(num_prompts / sum(from_prompt_us) * 1e6),
    }


def a_request(prompt: TokenIds) -> RequestView:
    return RequestView(
        request_id=RequestId("r"),
        choice=0,
        model=MODEL,
        num_tokens=len(prompt),
        max_new_tokens=1024,
        expected_new_tokens=200.0,
        usual_new_tokens=200.0,
        reserve_new_tokens=400,
        blocks=tuple(hash_chain(ROOT, prompt)),
    )


def each_us(do: Callable[[T], object], items: Sequence[T]) -> list[float]:
    """Microseconds that each item takes."""
    taken: list[float] = []
    for item in items:
        began_ns = time.thread_time_ns()
        do(item)
        taken.append((time.thread_time_ns() - began_ns) / 1000)
    return taken


def spread(taken_us: Sequence[float]) -> dict[str, float]:
    """The middle and the 99th of a hundred."""
    cuts = quantiles(taken_us, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


def main(
    *,
    workers: Annotated[int, typer.Option(help="Half of them for each role.", min=2, max=64)] = 64,
    blocks: Annotated[int, typer.Option(help="In the index.", min=0)] = 2_000_000,
    prompts: Annotated[int, typer.Option(help="Placements.", min=2)] = 5000,
    tokens: Annotated[int, typer.Option(help="Of each prompt.", min=1)] = 1000,
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure placements and the index of blocks."""
    measured = measure(workers, blocks, prompts, tokens, Random(1))
    text = json.dumps(
        measured | {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}, indent=1
    )
    typer.echo(text)
    if out:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
