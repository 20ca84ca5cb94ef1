"""Registration of a worker with those that it may pull from, on the twin and a virtual clock."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry

from shared.errors import KvTransferFailed, StartupError
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.state import keys
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import Role, WorkerCard, WorkerLoad
from shared.transfer.local import LocalNetwork, LocalTransfer
from shared.transfer.plan import LinkSpeed
from shared.transfer.port import LinkReport, Refusal
from shared.worker.link_metrics import LinkMetrics
from shared.worker.peers import GONE_AFTER_S, LONGEST_RETRY_S, LinkFloor, Peers
from tests.virtual_loop import run_virtually

LAYOUT = KvLayout("f", num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
BEAT_S = keys.BEAT_INTERVAL_S
GB = 10**9


class Told:
    """A log that remembers."""

    def __init__(self):
        self.lines = []

    def info(self, event, **fields):
        self.lines.append(("info", event, fields))

    def warning(self, event, **fields):
        self.lines.append(("warning", event, fields))

    def of(self, event):
        return [fields for _, said, fields in self.lines if said == event]


class WithUnreadable(MemoryState):
    """Workers of another version hold slots too."""

    unreadable = frozenset()

    async def registry(self, *, num_slots):
        return replace(await super().registry(num_slots=num_slots), unreadable=self.unreadable)


class Place:
    """One host with prefill workers that come and go, and our decode worker."""

    def __init__(self, lifetime):
        self.clock_s = asyncio.get_running_loop().time
        self.store = MemoryStore(clock=self.clock_s)
        self.state = WithUnreadable(self.store)
        self.network = LocalNetwork(delay_s=20e-6, bytes_per_s=2 * GB)
        self.told = Told()
        self._lifetime = lifetime

    async def transfer(self, name, address=None):
        """The transfer of a worker that runs to the end of the test."""
        return await self._lifetime.enter_async_context(self.end(name, address or f"{name}:1"))

    def end(self, name, address):
        return LocalTransfer(
            self.network,
            PagedCache(LAYOUT, 4, torch.device("cpu")),
            address=address,
            incarnation=Incarnation(name),
            clock=self.clock_s,
            max_part_bytes=2**20,
        )

    async def register(self, name, *, role=Role.PREFILL, address=None, layout=LAYOUT):
        card = WorkerCard(
            incarnation=Incarnation(name),
            role=role,
            name=f"the {name}",
            model="m",
            model_fingerprint="f",
            max_context=64,
            num_pages=4,
            max_running=1,
            max_batch_tokens=64,
            page_bytes=layout.page_bytes,
            num_host_pages=0,
            transfer_address=address or f"{name}:1",
            layout_fingerprint=layout.fingerprint,
        )
        slot = await self.state.claim_slot(card, WorkerLoad(4, 0, 0), num_slots=8, lease_ms=10**9)
        assert slot is not None
        return slot

    async def leave(self, slot, name):
        await self.state.release_slot(slot, Incarnation(name))

    def peers(self, transfer, floor=None, role=Role.DECODE):
        return Peers(
            transfer,
            self.state,
            role=role,
            incarnation=Incarnation("me"),
            layout_fingerprint=LAYOUT.fingerprint,
            floor=floor,
            log=self.told,
            clock_s=self.clock_s,
        )


def on_one_host(check):
    async def run():
        async with AsyncExitStack() as lifetime:
            await check(Place(lifetime))

    run_virtually(run())


@asynccontextmanager
async def running(peers):
    task = asyncio.create_task(peers.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def names(peers):
    return [link.peer for link in peers.links()]


def test_prefill_workers_of_our_layout_are_connected_to_and_told_of_once():
    async def check(place):
        for name in ("a", "b"):
            await place.transfer(name)
            await place.register(name)
        await place.register("c", layout=replace(LAYOUT, num_layers=2))
        peers = place.peers(await place.transfer("me"))
        async with running(peers):
            await asyncio.sleep(10 * BEAT_S)
        assert names(peers) == ["the a", "the b"]
        assert peers.num_missing() == 0
        assert place.told.of("link measured") == [
            {
                "peer": f"the {name}",
                "address": f"{name}:1",
                "transport": "memory",
                "gb_per_s": 2.0,
                "latency_us": 20.0,
                "below_floor": False,
                "warning": None,
                "floor_gb_per_s": None,
            }
            for name in ("a", "b")
        ]
        assert [level for level, _, _ in place.told.lines] == ["info", "info"]

    on_one_host(check)


def test_a_prefill_worker_takes_over_from_nobody():
    async def check(place):
        await place.transfer("a")
        await place.register("a")
        peers = place.peers(await place.transfer("me"), role=Role.PREFILL)
        await peers.refresh()
        assert peers.health() == {"status": "ok", "links": []}

    on_one_host(check)


@pytest.mark.parametrize("role", Role)
def test_all_others_are_reached_one_a_beat_behind_those_whose_prompts_are_taken_over(role):
    async def check(place):
        roles = {"a": Role.DECODE, "b": Role.DECODE, "c": Role.PREFILL, "me": role}
        me = await place.transfer("me")
        for name, each in roles.items():
            if name != "me":
                await place.transfer(name)
            await place.register(name, role=each)
        peers = place.peers(me, role=role)
        first = ["the c"] if role is Role.DECODE else []
        async with running(peers):
            for num_more in (1, 2, 3, 4):
                await asyncio.sleep(BEAT_S / 2)
                reached = names(peers)
                assert reached[: len(first)] == first
                assert len(reached) == min(3, len(first) + num_more)
                assert peers.num_missing() == 0
                await asyncio.sleep(BEAT_S / 2)
            assert set(peers.rates()) == {"a", "b", "c"}
            assert peers.health()["status"] == "ok"

    on_one_host(check)


def test_one_that_only_prefixes_could_come_from_and_that_does_not_answer_is_no_fault():
    async def check(place):
        await place.register("a")
        peers = place.peers(await place.transfer("me"), role=Role.PREFILL)
        async with running(peers):
            await asyncio.sleep(LONGEST_RETRY_S)
            assert len(place.told.of("no link")) > 2
            assert peers.health() == {"status": "ok", "links": []}
            assert peers.num_missing() == 0

    on_one_host(check)


def test_a_peer_that_restarts_is_connected_to_anew_and_the_old_one_forgotten():
    async def check(place):
        async with place.end("a", "host:1"):
            slot = await place.register("a", address="host:1")
            peers = place.peers(await place.transfer("me"))
            await peers.refresh()
            assert names(peers) == ["the a"]
        await place.leave(slot, "a")
        await peers.refresh()
        assert names(peers) == []
        await place.transfer("a2", address="host:1")
        await place.register("a2", address="host:1")
        await peers.refresh()
        assert names(peers) == ["the a2"]
        assert peers.num_missing() == 0

    on_one_host(check)


def test_a_peer_that_does_not_answer_is_tried_less_and_less_often_until_it_does():
    async def check(place):
        await place.register("a")
        peers = place.peers(await place.transfer("me"))
        async with running(peers):
            await asyncio.sleep(5 * LONGEST_RETRY_S)
            waits_s = [fields["retry_s"] for fields in place.told.of("no link")]
            assert waits_s[:4] == [BEAT_S, 2 * BEAT_S, 4 * BEAT_S, 8 * BEAT_S]
            assert waits_s == sorted(waits_s)
            assert waits_s[-1] == LONGEST_RETRY_S
            assert peers.num_missing() == 1
            (shown,) = peers.health()["links"]
            assert (shown["peer"], shown["address"]) == ("the a", "a:1")
            assert "does not answer" in shown["warning"]
            assert peers.health()["status"] == "degraded"
            await place.transfer("a")
            await asyncio.sleep(LONGEST_RETRY_S + BEAT_S)
            assert names(peers) == ["the a"]
            assert peers.health()["status"] == "ok"

    on_one_host(check)


def test_a_peer_that_is_gone_is_not_tried_again_and_comes_back_without_delay():
    async def check(place):
        slot = await place.register("a")
        peers = place.peers(await place.transfer("me"))
        async with running(peers):
            await asyncio.sleep(LONGEST_RETRY_S)
            await place.leave(slot, "a")
            await asyncio.sleep(BEAT_S)
            tried = len(place.told.of("no link"))
            await asyncio.sleep(3 * LONGEST_RETRY_S)
            assert len(place.told.of("no link")) == tried
            assert peers.health() == {"status": "ok", "links": []}
            await place.transfer("a")
            await place.register("a")
            await asyncio.sleep(2 * BEAT_S)
            assert names(peers) == ["the a"]

    on_one_host(check)


def test_without_the_store_links_stay():
    async def check(place):
        await place.transfer("a")
        await place.register("a")
        peers = place.peers(await place.transfer("me"))
        await peers.refresh()
        place.state.cut_off = True
        await peers.refresh()
        assert names(peers) == ["the a"]

    on_one_host(check)


class Links:
    """A transfer whose links are what the test says; one connect at a time."""

    def __init__(self, *reports):
        self.reports = {report.incarnation: report for report in reports}
        self.up = []
        self.connecting = 0
        self.num_connects = 0
        self.refusals = Counter()

    async def connect(self, address, incarnation):
        assert self.connecting == 0, "self-tests disturb each other"
        self.connecting += 1
        self.num_connects += 1
        await asyncio.sleep(1.0)
        self.connecting -= 1
        report = self.reports[incarnation]
        assert report.address == address
        self.up = [each for each in self.up if each.incarnation != incarnation] + [report]
        return report

    def links(self):
        return tuple(self.up)


def a_report(name="a", gb_per_s=2.0, warning=None, transport="tcp"):
    return LinkReport(f"{name}:1", Incarnation(name), transport, LinkSpeed(gb_per_s * GB, 1e-4), warning)


def test_self_tests_follow_one_another_and_a_link_that_broke_is_made_again():
    async def check(place):
        transfer = Links(a_report("a"), a_report("b"))
        for name in ("a", "b"):
            await place.register(name)
        peers = place.peers(transfer)
        async with running(peers):
            await asyncio.sleep(5.0)
            assert transfer.num_connects == 2
            del transfer.up[0]
            await asyncio.sleep(2.0)
        assert transfer.num_connects == 3
        assert peers.num_missing() == 0

    on_one_host(check)


def test_a_link_that_a_pull_made_is_measured_too():
    async def check(place):
        transfer = Links(a_report("a"))
        transfer.up = [replace(a_report("a"), speed=None)]
        await place.register("a")
        peers = place.peers(transfer, LinkFloor(1.0))
        await peers.refresh()
        assert peers.links()[0].gb_per_s == 2.0

    on_one_host(check)


def test_a_link_that_broke_and_that_a_pull_made_again_at_once_is_measured_again():
    async def check(place):
        transfer = Links(a_report("a"))
        await place.register("a")
        peers = place.peers(transfer, LinkFloor(1.0))
        await peers.refresh()
        transfer.up = [replace(a_report("a"), speed=None)]
        assert peers.num_missing() == 1
        await peers.refresh()
        assert peers.links()[0].gb_per_s == 2.0
        assert transfer.num_connects == 2

    on_one_host(check)


def test_a_link_below_the_floor_makes_the_worker_degraded():
    async def check(place):
        await place.register("a")
        peers = place.peers(Links(a_report(gb_per_s=0.4)), LinkFloor(0.5))
        await peers.refresh()
        peers.check_floor()
        health = peers.health()
        assert health["status"] == "degraded"
        (shown,) = health["links"]
        assert (shown["peer"], shown["transport"], shown["gb_per_s"], shown["below_floor"]) == (
            "the a",
            "tcp",
            0.4,
            True,
        )
        ((level, _, fields),) = place.told.lines
        assert (level, fields["floor_gb_per_s"]) == ("warning", 0.5)

    on_one_host(check)


def test_a_link_with_a_warning_makes_the_worker_degraded_without_a_floor_too():
    async def check(place):
        await place.register("a")
        peers = place.peers(Links(a_report(warning="no pid: host")))
        await peers.refresh()
        assert peers.health()["status"] == "degraded"
        assert peers.health()["links"][0]["warning"] == "no pid: host"
        assert place.told.lines[0][0] == "warning"

    on_one_host(check)


@pytest.mark.parametrize(("gb_per_s", "refused"), [(0.4, True), (0.5, False)])
def test_a_floor_that_refuses_names_floor_figure_transport_and_cure(gb_per_s, refused):
    async def check(place):
        await place.register("a")
        peers = place.peers(Links(a_report(gb_per_s=gb_per_s, warning="use pid: host")), LinkFloor(0.5, refuse=True))
        peers.check_floor()  # nobody there yet
        await peers.refresh()
        if not refused:
            peers.check_floor()
            return
        with pytest.raises(StartupError, match=r"the a at a:1 carries 0\.4 GB/s by tcp, under the floor of 0\.5 .*pid"):
            peers.check_floor()

    on_one_host(check)


def test_a_failure_to_connect_does_not_end_the_worker_that_refuses_slow_links():
    class Deaf(Links):
        async def connect(self, address, incarnation):
            raise KvTransferFailed(f"{address} does not answer {incarnation}")

    async def check(place):
        await place.register("a")
        peers = place.peers(Deaf(), LinkFloor(0.5, refuse=True))
        await peers.refresh()
        peers.check_floor()

    on_one_host(check)


def test_metrics_tell_of_links_and_refusals_as_they_are_when_asked():
    async def check(place):
        await place.register("a")
        await place.register("b")
        transfer = Links(a_report("a", gb_per_s=0.4), a_report("b", transport="cuda_ipc"))
        peers = place.peers(transfer, LinkFloor(0.5))
        registry = CollectorRegistry()
        registry.register(LinkMetrics(peers.links, peers.num_missing, lambda: transfer.refusals))
        await peers.refresh()
        transfer.refusals[Refusal.WRONG_SECRET] += 2

        def shown(name, **labels):
            return registry.get_sample_value(name, labels)

        tcp = {"peer": "the a", "address": "a:1", "transport": "tcp"}
        ipc = {"peer": "the b", "address": "b:1", "transport": "cuda_ipc"}
        assert shown("baton_kv_link_bytes_per_second", **tcp) == 0.4 * GB
        assert shown("baton_kv_link_latency_seconds", **tcp) == 1e-4
        assert [shown("baton_kv_link_below_floor", **each) for each in (tcp, ipc)] == [1, 0]
        assert shown("baton_kv_links_missing") == 0
        assert shown("baton_kv_refusals_total", reason="wrong_secret") == 2
        assert shown("baton_kv_refusals_total", reason="unknown_key") == 0
        del transfer.up[1]
        assert shown("baton_kv_link_bytes_per_second", **ipc) is None
        assert shown("baton_kv_links_missing") == 1

    on_one_host(check)


def test_a_peer_is_gone_when_the_registry_read_all_the_time_lacks_it():
    async def check(place):
        slot = await place.register("a")
        await place.register("b", layout=replace(LAYOUT, num_layers=2))
        peers = place.peers(await place.transfer("me"))
        a, b = Incarnation("a"), Incarnation("b")
        async with running(peers):
            await asyncio.sleep(2 * GONE_AFTER_S)
            assert not peers.is_gone(a, 0.0)
            assert not peers.is_gone(b, 0.0), "though nothing may be pulled from it"
            assert peers.is_gone(Incarnation("of before"), 0.0)
            now_s = place.clock_s()
            assert not peers.is_gone(Incarnation("newer than the last reading"), now_s)
            await asyncio.sleep(GONE_AFTER_S + 2 * BEAT_S)
            assert peers.is_gone(Incarnation("newer than the last reading"), now_s)
            await place.leave(slot, "a")
            await asyncio.sleep(GONE_AFTER_S - 2 * BEAT_S)
            place.state.cut_off = True
            await asyncio.sleep(2 * GONE_AFTER_S)
            assert not peers.is_gone(a, 0.0), "unseen is not gone"
            place.state.cut_off = False
            await asyncio.sleep(GONE_AFTER_S - 2 * BEAT_S)
            assert not peers.is_gone(a, 0.0)
            await asyncio.sleep(4 * BEAT_S)
            assert peers.is_gone(a, 0.0)
            assert not peers.is_gone(b, 0.0)

    on_one_host(check)


def test_a_peer_that_cannot_be_read_is_not_gone():
    async def check(place):
        peers = place.peers(await place.transfer("me"))
        place.state.unreadable = frozenset({Incarnation("newer")})
        async with running(peers):
            await asyncio.sleep(2 * GONE_AFTER_S)
            assert not peers.is_gone(Incarnation("newer"), 0.0)

    on_one_host(check)


def test_one_reading_of_an_emptied_registry_makes_nobody_gone():
    async def check(place):
        await place.register("a")
        peers = place.peers(await place.transfer("me"))
        await peers.refresh()
        await asyncio.sleep(2 * GONE_AFTER_S)
        place.store.flush()
        await peers.refresh()
        assert not peers.is_gone(Incarnation("a"), 0.0)

    on_one_host(check)
