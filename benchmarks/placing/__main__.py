"""What placing takes with the store in it, and that two ingests never place too much: `python -m benchmarks.placing`.

Ingests are processes of their own with a full line each (`ingest.py`); the store is a real one. This process plays the
workers: they beat, announce blocks, and give credits back when a prompt would be computed and an answer done. Meanwhile
it looks at all credits again and again. A placement takes what it takes to decide and to take the credits; the records
that follow it are not written here.
"""

import asyncio
import heapq
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import orjson
import typer
import uvloop

from benchmarks.control_plane.machine import commit, machine
from benchmarks.placement import LINK
from benchmarks.placing.ingest import MODEL
from infra.local.redis import redis_server
from shared.blocks import BlockHash
from shared.policy.costs import UNMEASURED
from shared.request import Incarnation, PlacementId, WorkerRef
from shared.state import keys
from shared.state.port import BlockNews, LiveWorker, Role, State, WorkerCard, WorkerLoad, pieces
from shared.state.redis import redis_state
from shared.wire.topics import NUM_SLOTS

MAX_BATCH_TOKENS = 8192
PAGE_BYTES = 8 << 20
MAX_CONTEXT = 131_072

LEASE_MS = 60_000
"""Long: a busy machine must not end a worker here."""

ANNOUNCE_INTERVAL_S = 0.25
NUM_NEWS_BLOCKS = 16
LOOK_INTERVAL_S = 0.02
GIVE_BACK_INTERVAL_S = 0.002

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Workers:
    """All of them: half for each role."""

    def __init__(self, state: State, num_workers: int, num_pages: int, max_running: int, stay_s: float) -> None:
        self._state = state
        self._random = Random(1)
        names = [Incarnation(f"worker-{number}") for number in range(num_workers)]
        links = dict.fromkeys(names, LINK)
        self._load = WorkerLoad(num_pages, 0, 0, profile=UNMEASURED, links=links)
        self._cards = [_card(name, number, num_pages, max_running) for number, name in enumerate(names)]
        self._refs: list[WorkerRef] = []
        self._stay_s = stay_s
        self._due: list[tuple[float, str, PlacementId, Incarnation]] = []
        self.num_looks = 0
        self.fullest = 0.0

    async def claim(self) -> None:
        for card in self._cards:
            slot = await self._state.claim_slot(card, self._load, num_slots=NUM_SLOTS, lease_ms=LEASE_MS)
            assert slot is not None
            self._refs.append(WorkerRef(slot, card.incarnation))

    async def beat_for_ever(self) -> None:
        while True:
            for ref, card in zip(self._refs, self._cards, strict=True):
                load = replace(self._load, num_free_pages=self._random.randrange(card.num_pages))
                assert await self._state.beat(ref.slot, card, load, lease_ms=LEASE_MS)
            await asyncio.sleep(keys.BEAT_INTERVAL_S)

    async def announce_for_ever(self, num_blocks: int) -> None:
        """A list of so many blocks each at first, then some more again and again."""
        sequences = dict.fromkeys(self._refs, 0)
        num_new = num_blocks
        while True:
            for ref in self._refs:
                blocks = tuple(BlockHash(self._random.randbytes(16)) for _ in range(num_new))
                for news in pieces(BlockNews(blocks)):
                    await self._state.announce_blocks(ref.incarnation, sequences[ref], news)
                    sequences[ref] += 1
            num_new = NUM_NEWS_BLOCKS
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    def run(self, placement: PlacementId, prefill: Incarnation, decode: Incarnation, prefill_s: float) -> None:
        """Compute the prompt and then the answer."""
        now_s = time.monotonic()
        heapq.heappush(self._due, (now_s + prefill_s, "computed", placement, prefill))
        if prefill != decode:
            heapq.heappush(self._due, (now_s + prefill_s, "give_back", placement, prefill))
        heapq.heappush(self._due, (now_s + prefill_s + self._stay_s, "give_back", placement, decode))

    async def give_back_for_ever(self) -> None:
        while True:
            now_s = time.monotonic()
            due: list[tuple[float, str, PlacementId, Incarnation]] = []
            while self._due and self._due[0][0] <= now_s:
                due.append(heapq.heappop(self._due))
            calls = {"computed": self._state.computed, "give_back": self._state.give_back}
            await asyncio.gather(*(calls[name](placement, worker) for _, name, placement, worker in due))
            await asyncio.sleep(GIVE_BACK_INTERVAL_S)

    async def look_for_ever(self) -> None:
        """Raises AssertionError if more is placed on a worker than it holds."""
        while True:
            for worker in await self.look():
                assert worker.num_credit_pages <= worker.card.num_pages, f"{worker} has more than its pages"
                assert worker.num_credits <= worker.card.max_running, f"{worker} has more than it runs"
                self.fullest = max(self.fullest, worker.num_credits / worker.card.max_running)
            self.num_looks += 1
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def look(self) -> Sequence[LiveWorker]:
        return await self._state.workers(num_slots=NUM_SLOTS)

    async def all_is_back(self) -> None:
        """Wait until all that runs has ended. Raises AssertionError if credits are left then."""
        while self._due:  # noqa: ASYNC110 - what is due is a heap that another task empties
            await asyncio.sleep(LOOK_INTERVAL_S)
        await asyncio.sleep(1.0)
        left = [worker for worker in await self.look() if worker.num_credits or worker.credit_work_s]
        assert not left, f"credits are left: {left}"


def _card(name: Incarnation, number: int, num_pages: int, max_running: int) -> WorkerCard:
    return WorkerCard(
        incarnation=name,
        role=Role.PREFILL if number % 2 else Role.DECODE,
        name=name,
        model=MODEL,
        model_fingerprint="f",
        max_context=MAX_CONTEXT,
        num_pages=num_pages,
        max_running=max_running,
        max_batch_tokens=MAX_BATCH_TOKENS,
        page_bytes=PAGE_BYTES,
        num_host_pages=0,
        transfer_address="127.0.0.1:1",
        layout_fingerprint="l",
    )


async def _ingest(url: str, options: dict[str, Any], workers: Workers) -> dict[str, Any]:
    """Run one to its end; its figures."""
    process: Process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.placing.ingest", url, orjson.dumps(options).decode(), stdout=PIPE
    )
    assert process.stdout is not None
    measured: dict[str, Any] = {}
    async for line in process.stdout:
        told = orjson.loads(line)
        if "measured" in told:
            measured = told["measured"]
        else:
            workers.run(**told)
    assert await process.wait() == 0, "an ingest failed"
    return measured


async def measure(
    *,
    ingests: int,
    workers: int,
    pages: int,
    running: int,
    stay_s: float,
    blocks: int,
    **options: Any,
) -> dict[str, Any]:
    """All figures. Raises AssertionError if too much was placed, or if credits are left."""
    with TemporaryDirectory() as folder:
        async with redis_server(Path(folder)) as url, redis_state(url) as state:
            players = Workers(state, workers, pages, running, stay_s)
            await players.claim()
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(each)
                    for each in (
                        players.beat_for_ever(),
                        players.announce_for_ever(-(-blocks // workers)),
                        players.give_back_for_ever(),
                        players.look_for_ever(),
                    )
                ]
                runs = [_ingest(url, options | {"seed": seed}, players) for seed in range(ingests)]
                measured = await asyncio.gather(*runs)
                await players.all_is_back()
                for loop in loops:
                    loop.cancel()
    return {
        "ingests": measured,
        "looks": players.num_looks,
        "fullest_worker": round(players.fullest, 3),
        "overshoots": 0,
    }


@app.command()
def main(
    *,
    ingests: Annotated[int, typer.Option(help="Processes that place.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Half of them for each role.", min=2, max=NUM_SLOTS)] = 64,
    rate: Annotated[float, typer.Option(help="Placements a second of each ingest; 0: as they can.", min=0)] = 1000.0,
    waiting: Annotated[int, typer.Option(help="In each ingest's line, always.", min=1)] = 10_000,
    first: Annotated[int, typer.Option(help="Placements of each ingest before the measured ones.", min=0)] = 2000,
    placements: Annotated[int, typer.Option(help="Measured, of each ingest.", min=2)] = 10_000,
    tokens: Annotated[int, typer.Option(help="Of each prompt.", min=1)] = 1000,
    blocks: Annotated[int, typer.Option(help="That the workers announce at first, in all.", min=0)] = 200_000,
    pages: Annotated[int, typer.Option(help="Of each worker.", min=1)] = 13_000,
    running: Annotated[int, typer.Option(help="Requests that a worker runs at once.", min=1)] = 256,
    stay_s: Annotated[float, typer.Option(help="An answer takes so long.", min=0)] = 4.0,
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
    at_commit: Annotated[str, typer.Option("--commit", help="Where this copy has no git folder.")] = "",
) -> None:
    """Place from full lines, and look whether too much is placed."""
    options: dict[str, Any] = {
        "ingests": ingests,
        "workers": workers,
        "rate": rate,
        "num_waiting": waiting,
        "num_first": first,
        "num_measured": placements,
        "num_tokens": tokens,
        "blocks": blocks,
        "pages": pages,
        "running": running,
        "stay_s": stay_s,
    }
    measured = uvloop.run(measure(**options))
    about = {"machine": machine(), "commit": at_commit or commit(), "date": time.strftime("%Y-%m-%d")}
    text = json.dumps(options | measured | about, indent=1)
    typer.echo(text)
    if out:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    app()
