"""What a run shows while it goes on: a live line in a terminal, a plain line now and then otherwise."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadgen.client import Clock
from loadgen.measure import COMPLETED
from loadgen.replay import Progress

LIVE_PERIOD_S = 0.25
PLAIN_PERIOD_S = 5.0


def progress_line(progress: Progress, elapsed_s: float) -> str:
    """Counts so far, in one line."""
    completed = progress.buckets[COMPLETED]
    line = (
        f"{elapsed_s:7.1f} s  sent {progress.sent}/{progress.scheduled}  in flight {progress.in_flight}  "
        f"completed {completed}  failed {progress.ended - completed}  "
        f"worst send lateness {progress.worst_lateness_s * 1000:.0f} ms"
    )
    failures = [f"{label} {count}" for label, count in progress.buckets.most_common() if label != COMPLETED]
    return f"{line}  ({', '.join(failures)})" if failures else line


@asynccontextmanager
async def shown(progress: Progress, console: Console, clock: Clock) -> AsyncIterator[None]:
    """Shows `progress` on `console` while the body runs, and once more at its end."""
    started_s = clock.monotonic()

    def line() -> str:
        return progress_line(progress, clock.monotonic() - started_s)

    async def repeat_live(live: Live) -> None:
        while True:
            live.update(Text(line()), refresh=True)
            await asyncio.sleep(LIVE_PERIOD_S)

    async def repeat_plain() -> None:
        while True:
            await asyncio.sleep(PLAIN_PERIOD_S)
            console.print(Text(line()), soft_wrap=True)

    if console.is_terminal and not console.is_dumb_terminal:
        with Live(Text(line()), console=console, auto_refresh=False) as live:
            async with _running(repeat_live(live)):
                yield
            live.update(Text(line()), refresh=True)
    else:
        async with _running(repeat_plain()):
            yield
        console.print(Text(line()), soft_wrap=True)


@asynccontextmanager
async def _running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
