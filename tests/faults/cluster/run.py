"""One run: a load of clients, faults among it, calm, and a judgement."""

import asyncio
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from services.ingest.admission import ModelFacts
from shared.bus.kafka import KafkaBus
from shared.text.tokeniser import Tokeniser
from shared.wire.results import RESULT_DECODER
from tests.faults import history
from tests.faults.capture import write_captures
from tests.faults.clients import END_SLACK_S, Clients, Mix, draw_wants
from tests.faults.cluster.cluster import GRACE_S, MODEL, Shape, running_cluster
from tests.faults.cluster.faults import Injector, draw_plans, unexplained_ends
from tests.faults.cluster.recovery import ALONE_BEFORE_S, recoveries, summary
from tests.faults.cluster.rest import unrest
from tests.faults.cluster.soak import Sampler, growths
from tests.faults.topics import read_history, until_all_ended

MAX_FAILED_SHARE = 0.01

CLIENT_SILENCE_S = 3.0
"""A client takes an edge that is silent for so long for gone: three keep-alives."""

LONGEST_WAIT_S = 2.0
WARM_UP_S = 3.0
CALM_TIMEOUT_S = 60.0

GENEROUS_S = 30.0
"""A request that expires after more time than this did not expire for its own tight deadline."""

REST_TIMEOUT_S = 45.0
JUDGE_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to do.

    Attributes:
        rate_per_s: of requests.
        lone_kills: of decode workers at the end, beside `faults` and so far apart that each shows its own recovery.
        protect: one process of each kind is never ended, so that what grows in it shows.
    """

    faults: int = 500
    minutes: float = 25.0
    seed: int = 1
    brokers: int = 1
    rate_per_s: float = 4.0
    timeout_s: float = 90.0
    lone_kills: int = 8
    protect: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run showed.

    Attributes:
        broken: promises that were broken, in words.
        report: figures, as JSON has them.
    """

    broken: list
    report: dict


@dataclass
class Load:
    """Clients at work until they are told to stop."""

    clients: Clients
    stopping: bool = False
    _mix: Mix = None
    _task: asyncio.Task = None

    def begin(self, mix, seed):
        self._mix = mix
        self._task = asyncio.create_task(self.clients.run_all(self._wants(mix, seed), math.inf))

    def _wants(self, mix, seed):
        for want in draw_wants(mix, seed):
            if self.stopping:
                return
            yield want

    async def end(self):
        """No more requests; wait until all have their outcome. Who gets none is sent home: the history tells."""
        self.stopping = True
        _, waiting = await asyncio.wait({self._task}, timeout=self._mix.timeout_s + 2 * END_SLACK_S)
        if waiting:
            await self.cancel()
        else:
            self._task.result()

    async def cancel(self):
        """Whoever still waits is sent home."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def num_done(self):
        return sum(capture.ended_s is not None for capture in self.clients.captures)


def impatient_clients(cluster, producer, seed):
    """Clients who look for another edge soon, and come back soon after a refusal: the load goes on among the faults."""
    return Clients(
        cluster.edge_urls,
        producer,
        random.Random(f"clients {seed}"),
        silence_s=CLIENT_SILENCE_S,
        longest_wait_s=LONGEST_WAIT_S,
    )


@asynccontextmanager
async def loaded(cluster, mix, seed):
    """Clients of the cluster's edges and of `ingest`."""
    async with KafkaBus(cluster.kafka_address, client_id="clients").producer() as producer:
        clients = impatient_clients(cluster, producer, seed)
        load = Load(clients)
        load.begin(mix, seed)
        try:
            yield load
        finally:
            await load.cancel()


async def judge(cluster, injector, captures, at_rest=None):
    """What is wrong with all that was done to the cluster, and the figures; the load has ended.

    `at_rest` is awaited when the cluster rests: the judgement itself keeps the processor from it for seconds.
    """
    broken = [f"ended by itself: {told}" for told in unexplained_ends(cluster, injector.faults)]
    bus = KafkaBus(cluster.kafka_address, client_id="judge")
    async with asyncio.timeout(JUDGE_TIMEOUT_S):
        await until_all_ended(bus, CALM_TIMEOUT_S)
        broken += [f"not at rest: {told}" for told in await unrest(cluster, REST_TIMEOUT_S)]
        if at_rest is not None:
            await at_rest()
        told = await read_history(bus, captures, [_for_history(fault, cluster) for fault in injector.faults])
    rules = history.Rules(
        Tokeniser.load(cluster.model_folder), ModelFacts.load(cluster.model_folder, MODEL), salted=True, grace_s=GRACE_S
    )
    report = await asyncio.to_thread(history.check, told, rules)
    broken += report.findings
    numbers = report.numbers
    num_late = _num_expired_in_spite_of_time(told)
    num_failed = numbers["requests_by_end"].get("failed", 0) + num_late
    share = num_failed / max(1, numbers["requests"])
    if share > MAX_FAILED_SHARE:
        broken.append(f"{num_failed} of {numbers['requests']} requests failed: over {MAX_FAILED_SHARE:.0%}")
    stories, _ = history.read_stories(told.stream_out)
    figures = {
        "faults": len(injector.faults),
        "faults_by_kind": dict(Counter(_named(fault, cluster) for fault in injector.faults)),
        "failed_share": share,
        "expired_in_spite_of_time": num_late,
        "recovery": summary(recoveries(injector.faults, stories, captures, cluster)),
        "ends_by_itself": sum(
            life.ended_s is not None and life.wanted_end is None
            for seat in cluster.seats.values()
            for life in seat.lives
        ),
    }
    return Outcome(broken, numbers | figures)


def _num_expired_in_spite_of_time(told):
    """Requests whose deadline was generous, and that still met it without an end: they count as failed."""
    accepted_s = {record.key: record.timestamp_s for record in told.ingest}
    late = set()
    for record in told.results:
        result = RESULT_DECODER.decode(record.value)
        if result.status == "expired" and record.timestamp_s - accepted_s[record.key] > GENEROUS_S:
            late.add(record.key)
    return len(late)


def _named(fault, cluster):
    seat = cluster.seats.get(fault.target)
    return f"{fault.kind} {seat.role}" if seat else str(fault.kind)


def _for_history(fault, cluster):
    seat = cluster.seats.get(fault.target)
    return history.Fault(
        fault.at_s,
        (fault.until_s or time.time()) + 5.0,
        str(fault.kind),
        fault.target,
        fault.incarnation or "",
        seat.url if seat and seat.role == "edge" else "",
    )


async def fault_run(options, say=print):
    """Start a cluster, trouble it, judge it. The folder with all logs is kept when a promise broke."""
    folder = Path(tempfile.mkdtemp(prefix="baton-faults-"))
    is_of_use = True
    try:
        async with running_cluster(folder, Shape(brokers=options.brokers)) as cluster:
            protected = frozenset(f"{role}-0" for role in ("edge", "ingest", "prefill", "decode"))
            injector = Injector(cluster, protected if options.protect else frozenset())
            mix = Mix(MODEL, options.rate_per_s, timeout_s=options.timeout_s)
            began_s = time.monotonic()
            sampler = Sampler(cluster)
            async with loaded(cluster, mix, options.seed) as load, sampler.running():
                await asyncio.sleep(WARM_UP_S)
                plans = draw_plans(options.seed, options.faults, options.minutes)
                telling = asyncio.create_task(_tell(injector, load, len(plans), say))
                try:
                    await injector.run(plans)
                finally:
                    telling.cancel()
                cluster.restore_all()
                await cluster.all_ready()
                await _kill_one_by_one(cluster, injector, options.lone_kills)
                await load.end()
            lasted_s = time.monotonic() - began_s
            captures = load.clients.captures
            say("calm; judging")
            outcome = await judge(cluster, injector, captures, sampler.sample)
            outcome.report |= {
                "options": asdict(options),
                "load_s": lasted_s,
                "faults_done": [fault.told() for fault in injector.faults],
                "memory": sampler.report(),
            }
            if options.protect:
                outcome.broken += growths(sampler, protected, len(cluster.workers))
            outcome.report["broken"] = outcome.broken
            if outcome.broken:
                write_captures(folder / "captures.jsonl", captures)
            is_of_use = bool(outcome.broken)
            return outcome
    except asyncio.CancelledError:
        is_of_use = False
        raise
    finally:
        if is_of_use:
            say(f"logs and what the clients saw: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


async def _kill_one_by_one(cluster, injector, num_kills):
    decodes = cluster.of("decode")
    for number in range(num_kills):
        await asyncio.sleep(ALONE_BEFORE_S + 1.0)
        await injector.kill(decodes[number % len(decodes)])
        await cluster.all_ready()


async def _tell(injector, load, num_plans, say):
    while True:
        await asyncio.sleep(30.0)
        say(
            f"{len(injector.faults)} of {num_plans} faults, {len(load.clients.captures)} requests, "
            f"{len(load.clients.captures) - load.num_done} under way"
        )
