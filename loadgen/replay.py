"""The open loop: each request leaves at its scheduled time, whatever became of those before it."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field

from loadgen.client import Clock, ExchangeFailed, Observation, Transport
from loadgen.jobs import Job
from loadgen.measure import COMPLETED, Record, bucket_of_answer, record_of
from loadgen.schedule import ScheduledRow

PREPARED_AHEAD = 64
"""Jobs made before their time comes, so that making a long prompt does not delay a send."""


@dataclass(slots=True)
class Progress:
    """Counts for the live view.

    Attributes:
        buckets: rows that have ended, by bucket.
        output_tokens: of completed rows.
        worst_lateness_s: of all sends so far.
    """

    scheduled: int
    sent: int = 0
    output_tokens: int = 0
    worst_lateness_s: float = 0.0
    buckets: Counter[str] = field(default_factory=Counter[str])

    @property
    def ended(self) -> int:
        """Rows that were sent and have ended."""
        return self.buckets.total()

    @property
    def in_flight(self) -> int:
        """Rows that were sent and have not ended."""
        return self.sent - self.ended


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a schedule.

    Attributes:
        records: one for each row, in the schedule's order.
        started_unix_s: start of the run, the origin of all intended times.
        duration_s: from there to the end of the last row.
        interrupted: it was stopped before every row had ended.
    """

    records: list[Record]
    started_unix_s: float
    duration_s: float
    interrupted: bool


@dataclass(slots=True)
class _Attempt:
    row: ScheduledRow
    seen: Observation = field(default_factory=Observation)
    prompt_tokens: int | None = None
    ended_s: float | None = None
    bucket: str | None = None
    detail: str = ""


async def replay(
    rows: Sequence[ScheduledRow],
    make_job: Callable[[ScheduledRow], Job],
    transport: Transport,
    *,
    maker_pool: Executor,
    exact_length: bool,
    clock: Clock,
    stop: asyncio.Event,
    progress: Progress,
) -> Replayed:
    """Sends every row at its time and waits for all answers.

    Args:
        rows: ascending in time.
        maker_pool: where jobs are made, ahead of their time; one thread is enough.
        exact_length: answers must have `output_tokens` tokens (else: at most that many).
        stop: once set, nothing more is sent and what is under way is cancelled; those rows are counted as such.
    """
    attempts = [_Attempt(row) for row in rows]
    exchanges: set[asyncio.Task[None]] = set()
    started_s, started_unix_s = clock.monotonic(), clock.unix()

    async def send_all() -> None:
        nonlocal started_s, started_unix_s
        async with aclosing(_prepared(rows, make_job, maker_pool)) as jobs:
            first = await anext(jobs)
            started_s, started_unix_s = clock.monotonic(), clock.unix()
            await send_at_its_time(first)
            async for job in jobs:
                await send_at_its_time(job)
        await asyncio.gather(*exchanges)

    async def send_at_its_time(job: Job) -> None:
        attempt = attempts[job.row.row]
        attempt.prompt_tokens = job.prompt_tokens
        await asyncio.sleep(max(0.0, started_s + job.row.at_s - clock.monotonic()))
        task = asyncio.create_task(_exchange(attempt, job, transport, exact_length, clock, progress))
        exchanges.add(task)
        # Let it send now: rows of the same instant would all wait until the last of them is made.
        await asyncio.sleep(0)
        if attempt.seen.sent_s is not None:
            lateness_s = attempt.seen.sent_s - started_s - job.row.at_s
            progress.worst_lateness_s = max(progress.worst_lateness_s, lateness_s)

    sending = asyncio.create_task(send_all())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    interrupted = not sending.done()
    for task in (sending, stopping, *exchanges):
        task.cancel()
    await asyncio.gather(stopping, *exchanges, return_exceptions=True)
    if interrupted:
        await asyncio.gather(sending, return_exceptions=True)
    else:
        sending.result()
    duration_s = clock.monotonic() - started_s
    return Replayed([_record(attempt, started_s) for attempt in attempts], started_unix_s, duration_s, interrupted)


async def _prepared(
    rows: Sequence[ScheduledRow], make_job: Callable[[ScheduledRow], Job], pool: Executor
) -> AsyncGenerator[Job]:
    loop = asyncio.get_running_loop()
    ahead = deque(loop.run_in_executor(pool, make_job, row) for row in rows[:PREPARED_AHEAD])
    try:
        await asyncio.gather(*ahead)
        for row in rows[PREPARED_AHEAD:]:
            yield await ahead.popleft()
            ahead.append(loop.run_in_executor(pool, make_job, row))
        while ahead:
            yield await ahead.popleft()
    finally:
        for job in ahead:
            job.cancel()


async def _exchange(
    attempt: _Attempt, job: Job, transport: Transport, exact_length: bool, clock: Clock, progress: Progress
) -> None:
    progress.sent += 1
    seen = attempt.seen
    try:
        async with asyncio.timeout(job.timeout_s):
            await transport.exchange(job, seen)
        attempt.bucket = bucket_of_answer(seen, job.row.output_tokens, exact_length=exact_length)
    except ExchangeFailed as failure:
        attempt.bucket, attempt.detail = failure.label, failure.detail
    except TimeoutError:
        attempt.bucket, attempt.detail = "timeout", f"no full answer within {job.timeout_s:g} s"
    except asyncio.CancelledError:
        attempt.bucket = "cancelled"
        raise
    except Exception as error:  # noqa: BLE001 - a row that trips this client is counted as failed, like any other
        attempt.bucket, attempt.detail = f"client_{type(error).__name__}", str(error)
    finally:
        attempt.ended_s = clock.monotonic()
        if attempt.bucket is not None:
            progress.buckets[attempt.bucket] += 1
        if attempt.bucket == COMPLETED:
            progress.output_tokens += seen.output_tokens or 0


def _record(attempt: _Attempt, started_s: float) -> Record:
    # Without a bucket its task never ran: the stop came between its making and its first step, or before.
    bucket = attempt.bucket or "not_sent"
    return record_of(
        attempt.row,
        attempt.seen,
        started_s=started_s,
        ended_s=attempt.ended_s,
        prompt_tokens=attempt.prompt_tokens,
        bucket=bucket,
        detail=attempt.detail,
    )
