"""One ingest's share of a run: a line that is always full, placed at a pace, by the code of the service itself.

For each placement a line on stdout, for whoever plays the workers; the last line is what was measured.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from statistics import quantiles
from typing import Any
from uuid import uuid4

import orjson
import structlog
import uvloop
from prometheus_client import CollectorRegistry

from services.ingest.admission import Admitted
from services.ingest.backlog import Backlog
from services.ingest.cluster import Cluster
from services.ingest.jobs import Job
from services.ingest.lengths import Lengths
from services.ingest.placer import Placer
from services.ingest.service import FEED_INTERVAL_S, VIEW_INTERVAL_S
from services.ingest.work import InHand, Placed, Waiting
from shared.blocks import token_ids
from shared.observe.metrics import IngestMetrics
from shared.policy.placement import Rules
from shared.request import PlacementId, RequestId, SamplingParams
from shared.runtime.run import settle_memory
from shared.state.redis import redis_state
from shared.wire.openai import GenerationSpec
from shared.wire.to_ingest import LogPosition
from shared.wire.topics import INGEST

MODEL = "m"
NUM_TENANTS = 8
MAX_TOKENS = 512
DEADLINE_S = 600.0
VOCABULARY = 32_000


async def place_for(
    url: str, *, rate: float, num_waiting: int, num_first: int, num_measured: int, num_tokens: int, seed: int
) -> None:
    """Place at `rate` a second from a line of `num_waiting`; 0: as fast as there is room. The first do not count."""
    settle_memory()
    metrics, log = IngestMetrics(CollectorRegistry()), structlog.get_logger()
    async with redis_state(url) as state:
        cluster = Cluster(state, metrics, time.time)
        lengths = Lengths(metrics)
        placer = Placer(
            state,
            cluster,
            lengths,
            Rules(ttft_goal_s=2.0, tpot_goal_s=0.1),
            clock_s=time.time,
            new_placement_id=lambda: PlacementId(uuid4().hex),
            metrics=metrics,
        )
        backlog = Backlog(placer, lengths, has_ended=lambda _: False, clock_s=time.time, metrics=metrics, log=log)
        coming = _requests(Random(seed), num_tokens)
        for _ in range(num_waiting):
            backlog.add(next(coming))
        while not (await cluster.refresh()).decode:  # noqa: ASYNC110 - a store that is polled
            await asyncio.sleep(VIEW_INTERVAL_S)
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(_every(VIEW_INTERVAL_S, cluster.refresh)),
                tasks.create_task(_every(FEED_INTERVAL_S, cluster.follow_feeds)),
            ]
            await _place(backlog, coming, num_first, rate)
            used_s = time.process_time()
            taken_s, took_s = await _place(backlog, coming, num_measured, rate)
            used_s = time.process_time() - used_s
            for loop in loops:
                loop.cancel()
        _say(measured=_figures(taken_s, took_s) | {"processor_share": round(used_s / took_s, 3)})


async def _place(backlog: Backlog, coming: Iterator[Waiting], count: int, rate: float) -> tuple[list[float], float]:
    """Seconds that each placement took, and that all did."""
    taken_s: list[float] = []
    began_s = time.perf_counter()
    for number in range(count):
        early_s = number / rate - (time.perf_counter() - began_s) if rate else 0.0
        if early_s > 0:
            await asyncio.sleep(early_s)
        asked_s = time.perf_counter()
        _, settled = await backlog.next()
        taken_s.append(time.perf_counter() - asked_s)
        assert isinstance(settled, Placed)
        assert settled.chosen is not None
        placement = settled.placement
        _say(
            placement=placement.id,
            prefill=placement.prefill.incarnation,
            decode=placement.decode.incarnation,
            prefill_s=settled.chosen.prefill_s,
        )
        backlog.add(next(coming))
        await asyncio.sleep(0)  # as dispatching would
    return taken_s, time.perf_counter() - began_s


def _requests(random: Random, num_tokens: int) -> Iterator[Waiting]:
    """For ever, of several tenants, each with a prompt of its own."""
    spec = GenerationSpec(chat=False, model=MODEL, prompt="", max_tokens=MAX_TOKENS)
    base = [random.randrange(VOCABULARY) for _ in range(num_tokens)]
    while True:
        now_s = time.time()
        tenant = f"tenant-{random.randrange(NUM_TENANTS)}"
        position = LogPosition(0, 0)
        job = Job(RequestId(uuid4().hex), position, b"", tenant, now_s, now_s + DEADLINE_S, None, None)
        start = random.randrange(num_tokens)
        ids = token_ids((random.randrange(VOCABULARY), *base[start:], *base[:start]))
        admitted = Admitted(job, spec, ids, SamplingParams(max_tokens=MAX_TOKENS), (), tenant)
        yield Waiting(InHand(INGEST.name, position), admitted, 0, 1, token_ids(()), now_s)


def _figures(taken_s: list[float], took_s: float) -> dict[str, Any]:
    cuts = quantiles(taken_s, n=1000)
    return {
        "placements": len(taken_s),
        "per_s": round(len(taken_s) / took_s, 1),
        "placement_ms": {name: round(cuts[at] * 1e3, 3) for name, at in (("p50", 499), ("p90", 899), ("p99", 989))},
        "slowest_ms": round(max(taken_s) * 1e3, 3),
    }


async def _every(interval_s: float, do: Callable[[], Awaitable[object]]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await do()
            await asyncio.sleep(interval_s)


def _say(**members: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(members) + b"\n")
    sys.stdout.buffer.flush()


def main(url: str, options: dict[str, Any]) -> None:
    """Run one ingest."""
    uvloop.run(place_for(url, **options))


if __name__ == "__main__":
    main(sys.argv[1], orjson.loads(sys.argv[2]))
