"""One client process: sends its share of a load to an edge and notes when what came back.

`python -m benchmarks.control_plane.client JOB OUT` reads a job (JSON: setup, load, edges, share, shares), makes its
requests, writes "ready" to its standard output, begins when it reads a line, and writes what it saw (JSON). Requests
leave through loadgen's HTTP client.
"""

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.control_plane.loads import Load, Setup, closed_job, job_maker, open_rows
from benchmarks.control_plane.samples import FIRST_PIECE, RECEIVED, SENT, Sample
from loadgen.client import Clock, ExchangeFailed, HttpTransport, Observation, Transport, open_http
from loadgen.jobs import COMPLETIONS, Job, JobMaker
from loadgen.measure import COMPLETED, Record
from loadgen.replay import Progress, replay


class Spread:
    """Gives requests to several edges in turn."""

    def __init__(self, transports: list[HttpTransport]) -> None:
        self._transports = transports

    async def exchange(self, job: Job, seen: Observation) -> None:
        await self._transports[job.row.trace_index % len(self._transports)].exchange(job, seen)


async def run_share(job: Mapping[str, Any]) -> dict[str, Any]:
    """Sends one share of the load; all that was seen."""
    setup, load = Setup(**job["setup"]), Load(**job["load"])
    share, shares = job["share"], job["shares"]
    maker = job_maker(setup, f"{job['run_id']}-{load.name}-{share}")
    clock = Clock(asyncio.get_running_loop().time, time.time)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(open_http(edge)) for edge in job["edges"]]
        transport = Spread([HttpTransport(client, COMPLETIONS, {}, clock) for client in clients])
        if load.rate_per_s is None:
            return await _closed(load, setup, maker, transport, clock, share, shares)
        return await _open(load, setup, maker, transport, clock, share, shares)


async def _open(
    load: Load, setup: Setup, maker: JobMaker, transport: Transport, clock: Clock, share: int, shares: int
) -> dict[str, Any]:
    mine = [row for row in open_rows(load, setup) if row.row % shares == share]
    # Replaying counts rows from 0; the trace index goes on naming the prompt.
    rows = [replace(row, row=place) for place, row in enumerate(mine)]
    jobs = [maker.make(row) for row in rows]
    await _start_signal()
    with ThreadPoolExecutor(1) as pool:
        replayed = await replay(
            rows,
            lambda row: jobs[row.row],
            transport,
            maker_pool=pool,
            exact_length=True,
            clock=clock,
            stop=asyncio.Event(),
            progress=Progress(len(rows)),
        )
    started_unix_s = replayed.started_unix_s
    done = [record for record in replayed.records if record.completed]
    return _told((_sample_of(record, started_unix_s) for record in done), _failures(replayed.records))


async def _closed(
    load: Load, setup: Setup, maker: JobMaker, transport: Transport, clock: Clock, share: int, shares: int
) -> dict[str, Any]:
    places = count(share, shares)
    samples: list[Sample] = []
    failures: Counter[str] = Counter()
    num_streams = sum(stream % shares == share for stream in range(load.streams))
    await _start_signal()
    started_s, started_unix_s = clock.monotonic(), clock.unix()

    async def stream() -> None:
        while clock.monotonic() - started_s < load.total_s:
            await asyncio.sleep(load.pause_s)
            job, seen = closed_job(maker, load, next(places), setup), Observation()
            try:
                async with asyncio.timeout(job.timeout_s):
                    await transport.exchange(job, seen)
            except ExchangeFailed as failure:
                failures[str(failure)] += 1
                continue
            except TimeoutError:
                failures["timeout"] += 1
                continue
            assert seen.sent_s is not None
            assert seen.first_token_s is not None
            samples.append(
                Sample(
                    at_s=seen.sent_s - started_s,
                    sent_s=seen.sent_s - started_s,
                    first_token_s=seen.first_token_s - started_s,
                    gaps_s=seen.gaps_s,
                    output_tokens=seen.output_tokens or 0,
                    cached_tokens=seen.cached_tokens or 0,
                    stamps=_stamps(
                        seen.stamps, seen.sent_s, seen.first_token_s, seen.answered_s, started_unix_s - started_s
                    ),
                )
            )

    async with asyncio.TaskGroup() as streams:
        for _ in range(num_streams):
            streams.create_task(stream())
    return _told(samples, failures)


def _sample_of(record: Record, started_unix_s: float) -> Sample:
    assert record.sent_s is not None
    assert record.first_token_s is not None
    return Sample(
        at_s=record.row.at_s,
        sent_s=record.sent_s,
        first_token_s=record.first_token_s,
        gaps_s=record.gaps_s,
        output_tokens=record.output_tokens or 0,
        cached_tokens=record.cached_tokens or 0,
        stamps=_stamps(record.stamps, record.sent_s, record.first_token_s, record.answered_s, started_unix_s),
    )


def _stamps(
    served: Mapping[Any, float], sent_s: float, first_token_s: float, answered_s: float | None, to_unix_s: float
) -> dict[str, float]:
    """The servers' stamps with the client's own; `to_unix_s` turns the client's seconds into unix time."""
    stamps = {str(event): at_s for event, at_s in served.items()}
    stamps[SENT] = sent_s + to_unix_s
    stamps[FIRST_PIECE] = first_token_s + to_unix_s
    if answered_s is not None:
        stamps[RECEIVED] = answered_s + to_unix_s
    return stamps


def _failures(records: Iterable[Record]) -> Counter[str]:
    return Counter(f"{record.bucket}: {record.detail}" for record in records if record.bucket != COMPLETED)


def _told(samples: Iterable[Sample], failures: Counter[str]) -> dict[str, Any]:
    return {"samples": [asdict(sample) for sample in samples], "failures": dict(failures)}


async def _start_signal() -> None:
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)


def main() -> None:
    job_path, out_path = map(Path, sys.argv[1:3])
    out_path.write_text(json.dumps(asyncio.run(run_share(json.loads(job_path.read_text())))))


if __name__ == "__main__":
    main()
