"""What grows: memory, open files, tasks and pages of each process, keys of Redis, looked at every so often."""

import asyncio
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.faults.cluster.rest import metrics_of

INTERVAL_S = 30.0
TASKS = "baton_asyncio_tasks"

SETTLED_SHARE = 0.25
"""The first part of a run fills caches: growth is counted from its end on."""

MAX_RSS_GROWTH = 0.10
RSS_SLACK_BYTES = 24 * 2**20
FILES_SLACK = 24
TASKS_SLACK = 12


class Sampler:
    """Samples by process: {"at_s", "rss_bytes", "open_files", "tasks", "pages_used"}; and of Redis its keys by kind."""

    def __init__(self, cluster):
        self._cluster = cluster
        self.by_life = defaultdict(list)
        self.redis_keys = []

    @asynccontextmanager
    async def running(self):
        over = asyncio.Event()
        task = asyncio.create_task(self._run(over))
        try:
            yield self
        finally:
            over.set()  # no cancel: a library in the middle of a sample may take it for its own, and it is lost
            await task

    async def _run(self, over):
        while not over.is_set():
            await self.sample()
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), INTERVAL_S)

    async def sample(self):
        async with httpx.AsyncClient(timeout=5.0) as http:
            for seat in self._cluster.seats.values():
                if seat.is_alive and not seat.life.is_stopped:
                    await self._sample_seat(http, seat)
        try:
            async with asyncio.timeout(5.0), Redis.from_url(self._cluster.redis_url) as redis:
                names = [key.decode().split(":")[1] async for key in redis.scan_iter(count=1000)]
        except (RedisError, OSError, TimeoutError):
            return
        self.redis_keys.append({"at_s": time.time(), **Counter(names)})

    async def _sample_seat(self, http, seat):
        life = seat.life
        try:
            now = await metrics_of(http, seat)
        except httpx.HTTPError:
            return
        rss_bytes = _rss_bytes(life.pid)
        if rss_bytes is None or not now:
            return
        self.by_life[seat.name, life.number].append(
            {
                "at_s": time.time(),
                "rss_bytes": rss_bytes,
                "open_files": now.get("process_open_fds"),
                "tasks": now.get(TASKS),
                "pages_used": now.get("baton_kv_pages", 0) - now.get("baton_kv_pages_free", 0),
            }
        )

    def report(self):
        return {
            "processes": {f"{name}.{number}": samples for (name, number), samples in self.by_life.items()},
            "redis_keys": self.redis_keys,
        }


def _rss_bytes(pid):
    """What the process has of its own: what it shares with the template it was forked from does not grow."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024 if "VmRSS" in fields else None


def growths(sampler, protected, num_workers):
    """What did not return to its start, of protected processes that lived from the begin to the end, in words.

    Keys of requests run out hours later, each by itself: that they do is looked at when the cluster rests.
    """
    found = []
    for (name, number), samples in sampler.by_life.items():
        settled = samples[int(SETTLED_SHARE * len(samples)) :]
        if name not in protected or number > 0 or len(settled) < 2:
            continue
        found += _grown(name, settled[0], settled[-1])
    last = sampler.redis_keys[-1]
    found += [
        f"Redis has {last.get(kind)} keys of kind {kind} at the end, for {num_workers} workers"
        for kind in ("slot", "worker")
        if last.get(kind) != num_workers
    ]
    return found


def _grown(name, first, last):
    if last["rss_bytes"] > first["rss_bytes"] * (1 + MAX_RSS_GROWTH) + RSS_SLACK_BYTES:
        yield f"{name} grew from {first['rss_bytes'] >> 20} to {last['rss_bytes'] >> 20} MiB"
    for what, slack in (("open_files", FILES_SLACK), ("tasks", TASKS_SLACK), ("pages_used", 0)):
        if last[what] is not None and last[what] > (first[what] if slack else 0) + slack:
            yield f"{name} has {last[what]:.0f} {what} at the end, {first[what]:.0f} before"
