"""Pages between two hosts whose link is slow, and is cut."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest

from infra.two_hosts import NAME, UCX_ENV, remove_left_behind, two_hosts, why_unavailable
from tests.e2e.link_peer import LAYOUT, NUM_PAGES, digest, pages_of

BITS_PER_S = 100e6
NUM_BYTES = NUM_PAGES * LAYOUT.page_bytes
TIMEOUT_S = 30.0
PULL_TIMEOUT_S = 3.0
MIDDLE_BYTES = NUM_BYTES // 4


@pytest.fixture
def hosts():
    if reason := why_unavailable():
        pytest.skip(reason)
    with two_hosts(random.Random()) as made:
        yield made


class Peer:
    """A process in one of the hosts."""

    def __init__(self, process):
        self._process = process

    def tell(self, do, **fields):
        self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")

    async def hear(self, event):
        """What it says next, which must be `event`."""
        async with asyncio.timeout(TIMEOUT_S):
            line = b""
            while not line.startswith(b"{"):  # UCX writes its warnings to stdout
                line = await self._process.stdout.readline()
                assert line, "the peer ended"
        said = json.loads(line)
        assert said["event"] == event, said
        return said


@asynccontextmanager
async def a_process(host):
    process = await asyncio.create_subprocess_exec(
        *host.command(sys.executable, "-m", "tests.e2e.link_peer", host.address),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | UCX_ENV,
    )
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()


@asynccontextmanager
async def peers(hosts):
    """A source in host A and a puller in host B, between which the link is slow."""
    hosts.link.limit(BITS_PER_S)
    async with a_process(hosts.a) as source, a_process(hosts.b) as puller:
        for peer in (source, puller):
            await peer.hear("ready")
        yield source, puller


async def ticket(source, seed):
    source.tell("offer", seed=seed)
    return (await source.hear("offered"))["ticket"]


async def connected(source, puller):
    """What the puller finds out about the link, as workers do when they meet."""
    puller.tell("connect", ticket=await ticket(source, 0))
    return await puller.hear("connected")


async def carried(hosts, num_bytes):
    """Returns when host A has put so much more on the link."""
    wanted = hosts.link.sent_bytes(hosts.a) + num_bytes
    async with asyncio.timeout(TIMEOUT_S):
        while hosts.link.sent_bytes(hosts.a) < wanted:
            await asyncio.sleep(0.01)


async def pulled(source, puller, seed):
    puller.tell("pull", ticket=await ticket(source, seed), timeout_s=TIMEOUT_S)
    assert (await puller.hear("pulled"))["digest"] == digest(pages_of(seed))
    ended = await source.hear("ended")
    assert ended["outcome"] == "pulled"


async def test_pages_cross_a_slow_link_by_tcp(hosts):
    async with peers(hosts) as (source, puller):
        link = await connected(source, puller)
        assert link["transport"] == "tcp"
        assert link["bytes_per_s"] < BITS_PER_S / 8
        before, began_s = hosts.link.sent_bytes(hosts.a), time.monotonic()
        await pulled(source, puller, 1)
        # All of it took the link, and no faster than that carries it.
        assert hosts.link.sent_bytes(hosts.a) - before > NUM_BYTES
        assert time.monotonic() - began_s > NUM_BYTES / (BITS_PER_S / 8)


async def test_a_link_that_falls_silent_ends_both_sides_and_serves_again_when_it_is_mended(hosts):
    async with peers(hosts) as (source, puller):
        await connected(source, puller)
        puller.tell("pull", ticket=await ticket(source, 2), timeout_s=PULL_TIMEOUT_S)
        await carried(hosts, MIDDLE_BYTES)
        hosts.link.cut()
        await puller.hear("failed")
        # Nothing tells the source that the puller gave up, but it must not hold the pages to the end of the hold.
        ended = await source.hear("ended")
        assert ended["outcome"] == "failed"
        hosts.link.mend()
        await pulled(source, puller, 3)


async def test_a_link_that_is_silent_for_a_moment_costs_time_alone(hosts):
    async with peers(hosts) as (source, puller):
        await connected(source, puller)
        puller.tell("pull", ticket=await ticket(source, 1), timeout_s=TIMEOUT_S)
        await carried(hosts, MIDDLE_BYTES)
        hosts.link.cut()
        await asyncio.sleep(0.2)
        hosts.link.mend()
        assert (await puller.hear("pulled"))["digest"] == digest(pages_of(1))


def test_two_pairs_stand_side_by_side_and_leave_nothing(hosts):
    with two_hosts(random.Random()) as others:
        assert {host.namespace for host in (hosts.a, hosts.b)}.isdisjoint((others.a.namespace, others.b.namespace))
        assert hosts.machine != others.machine
        left_running = subprocess.Popen(others.a.command("sleep", "1000"))
        names = namespaces()
        assert {others.a.namespace, others.b.namespace} <= names
    assert left_running.wait() == -9
    assert namespaces() == names - {others.a.namespace, others.b.namespace}


def test_hosts_whose_maker_was_killed_are_removed(hosts):
    maker = subprocess.Popen(["true"])
    maker.wait()
    orphan = f"{NAME}-{maker.pid}-00000000-a"
    subprocess.run(["ip", "netns", "add", orphan], check=True)
    remove_left_behind()
    assert orphan not in namespaces()
    assert hosts.a.namespace in namespaces()


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}
