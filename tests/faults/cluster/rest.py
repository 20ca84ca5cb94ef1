"""What is to be true of a cluster that has come to rest."""

import asyncio
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from shared.state import keys

POLL_S = 0.5

LASTING_KEYS = {keys.up()}
"""The only key of Redis without an end."""


async def metrics_of(http, seat):
    """Samples of one process, summed over labels; empty if it does not answer."""
    try:
        answer = await http.get(f"{seat.url}/metrics")
    except httpx.TransportError:
        return {}
    totals = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def unrest(cluster, timeout_s):
    """What of the workers and of Redis is not as if nothing had ever run, in words, as soon as it is nothing or at the
    end of the time."""
    deadline_s = time.monotonic() + timeout_s
    async with httpx.AsyncClient(timeout=10.0) as http, Redis.from_url(cluster.redis_url) as redis:
        while True:
            found = [
                *[line for seat in cluster.workers for line in await _of_worker(http, seat)],
                *await _of_redis(redis),
            ]
            if not found or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(POLL_S)


async def _of_worker(http, seat):
    now = await metrics_of(http, seat)
    if not now:
        return [f"{seat}: does not answer"]
    found = []
    if now["baton_kv_pages_free"] != now["baton_kv_pages"]:
        found.append(f"{seat}: {now['baton_kv_pages_free']:.0f} of {now['baton_kv_pages']:.0f} pages are free")
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "baton_kv_held_requests")
    return found + [f"{seat}: {name} is {now[name]:.0f}" for name in busy if now[name]]


async def _of_redis(redis):
    found = []
    async for key in redis.scan_iter(count=1000):
        name = key.decode()
        if name not in LASTING_KEYS and await redis.pttl(key) == -1:
            found.append(f"Redis: {name} has no end")
        if name.startswith(keys.worker_credits("")) and await redis.exists(keys.worker(name.rpartition(":")[2])):
            pages, work_us = (int(each or 0) for each in await redis.hmget(key, "total", "work"))
            if pages or work_us:
                found.append(f"Redis: {name} has {pages} pages and {work_us} us of work that were not given back")
    return found
