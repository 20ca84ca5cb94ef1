"""One seed, one schedule: what is asked of the system and what befalls it, then calm until all has ended."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random

from shared.bus.memory import Append, Fate
from shared.bus.port import BusUnavailable
from shared.errors import LeaseLost
from shared.request import Priority, RequestId
from shared.state.port import Role
from shared.transfer.local import LocalTransfer
from shared.wire import topics
from shared.wire.to_ingest import HEADER_PRIORITY
from tests.flow.system import MODEL
from tests.sim.checks import Asked, accepted, at_rest, findings, work_kept
from tests.sim.clients import Client, Manners
from tests.sim.conditions import Conditions, draw_conditions, set_up
from tests.sim.faults import FAULTS, FURTHER_FAULTS, LINK_FAULTS, SENDER_FAULTS, Fault, Strike, calm_down, outside
from tests.sim.processes import Process, run_processes
from tests.sim.world import EDGE, INGEST, KINDS, REFUSED_ID, Host, Toolbox, World

TROUBLE_S = 6.0
"""Requests come and faults happen for so long."""

CALM_S = 45.0
"""Then all must have ended within this."""

LOOK_S = 0.5

LATEST_COPY_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a schedule gave."""

    seed: int
    findings: tuple[str, ...]
    journal: tuple[str, ...]
    num_requests: int
    num_faults: int
    virtual_s: float
    digest: int


def run_schedule(seed: int, tools: Toolbox, *, full_journal: bool = False) -> Outcome:
    """Run the schedule of a seed; the same each time."""
    processes: list[Process] = []

    async def run() -> Outcome:
        conditions = draw_conditions(seed)
        with set_up(conditions, Random(f"misled {seed}")):
            return await Schedule(seed, tools, conditions, processes, full_journal=full_journal).run()

    return run_processes(run(), processes)


@dataclass(frozen=True)
class Trigger:
    """A fault in the moment in which a process of this kind appends to this topic for the n-th time."""

    kind: str
    topic: str
    number: int
    after: bool
    faults: tuple[Fault, ...]


TRIGGERS = (
    *((INGEST, topics.PREFILL.name),) * 2,
    *((INGEST, topics.STREAM_OUT.name),) * 3,
    (EDGE, topics.INGEST.name),
    (EDGE, topics.RESULTS.name),
    (EDGE, topics.INGEST_RESUME.name),
    (EDGE, topics.STREAM_OUT.name),
    (Role.PREFILL, topics.DECODE.name),
    (Role.PREFILL, topics.STREAM_OUT.name),
    (Role.DECODE, topics.STREAM_OUT.name),
)


class Schedule:
    """See the module."""

    def __init__(
        self, seed: int, tools: Toolbox, conditions: Conditions, processes: list[Process], *, full_journal: bool
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.conditions = conditions
        self.world = World(seed, tools, conditions, full_journal=full_journal)
        self.world.processes = processes
        self.asked: dict[RequestId, Asked] = {}
        self.clients: list[Client] = []
        self.loop = asyncio.get_running_loop()
        self.calm = False
        self.num_faults = 0
        self.last_copy_s = 0.0
        self.appends: Counter[tuple[str, str]] = Counter()
        self.triggers: list[Trigger] = []
        self.keepers: list[asyncio.Task] = []
        self.bodies: dict[bytes, Asked] = {}

    async def run(self) -> Outcome:
        world, rng = self.world, self.rng
        counts = {INGEST: 2, EDGE: 2, Role.PREFILL: rng.choice((2, 2, 3)), Role.DECODE: rng.choice((2, 3))}
        for kind, number in counts.items():
            self.keepers += [asyncio.create_task(self._keep(kind)) for _ in range(number)]
        step_s = self.conditions.step_s
        world.step_s = lambda: step_s * world.rng.uniform(0.5, 1.5)
        world.journal.note("world", repr(self.conditions))
        async with asyncio.timeout(30):
            await asyncio.sleep(0.1)
            await world.ready()
        await asyncio.sleep(self.conditions.age_s)
        work = self._draw_requests()
        if self.conditions.has_faults:
            work += self._draw_faults()
        await asyncio.sleep(TROUBLE_S)
        self.calm = True
        world.journal.note("world", "calm")
        if self.conditions.has_faults:
            world.calm_s = world.clock_s()
        calm_down(world)
        rested = await self._rest(work)
        if rested and rng.random() < 0.2:
            world.rested_s = world.clock_s()
            rested = await self._rest([asyncio.create_task(self._ask(rng.uniform(0, LOOK_S))) for _ in range(2)])
        found = list(findings(world, self._asked_by_id(), self._captures()))
        if not rested and not found:
            found.append("clients did not come to their end")
        if world.journal.full:
            world.journal.lines += [f"FOUND {each}" for each in found]
        return Outcome(
            self.seed,
            tuple(found),
            tuple(world.journal.lines),
            len(accepted(world)),
            self.num_faults,
            world.clock_s() - 1000,
            self._digest(),
        )

    # What is asked

    def _draw_requests(self) -> list[asyncio.Task]:
        """Those that come by themselves, and rushes, each of which brings a worker."""
        rng = self.rng
        times_s = [rng.uniform(0, 0.6 * TROUBLE_S) for _ in range(self.conditions.num_asked)]
        for _ in range(self.conditions.num_joining):
            kind, at_s = rng.choice((Role.PREFILL, Role.PREFILL, Role.DECODE)), rng.uniform(0, 0.6 * TROUBLE_S)
            self.keepers.append(asyncio.create_task(self._keep(kind, at_s)))
            times_s += [at_s + rng.uniform(0, 0.5) for _ in range(2)]
        return [asyncio.create_task(self._ask(at_s)) for at_s in times_s]

    async def _ask(self, at_s: float) -> None:
        rng = Random(self.rng.random())
        await asyncio.sleep(at_s)
        asked = Asked(
            prompt=self._prompt(rng),
            num_new=rng.choice((1, 2, 4, 8, 16)),
            num_choices=rng.choice((1, 1, 1, 2)),
            refused_by_decode=rng.random() < 0.05,
        )
        if asked.refused_by_decode:
            asked.prompt[0] = REFUSED_ID
        body = {
            "model": MODEL,
            "prompt": asked.prompt,
            "max_tokens": asked.num_new,
            "n": asked.num_choices,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        way = rng.random()
        if way < 0.5:
            request_id = RequestId(self.world.name("job"))
            priority = list(Priority)[len(self.asked) % len(Priority)]
            self.asked[request_id] = asked
            await self.world.submit(body, request_id=request_id, headers=[(HEADER_PRIORITY, priority.encode())])
            return
        manners = Manners(
            key=self.world.name("key") if rng.random() < 0.5 else None,
            patience_s=rng.uniform(1.5, 4),
            leaves_after_s=rng.uniform(0, 4) if rng.random() < 0.15 else None,
            cancels_after_s=rng.uniform(0, 4) if rng.random() < 0.15 else None,
        )
        client = Client(self.world, body, manners, rng)
        self.bodies[client.body] = asked
        self.clients.append(client)
        await client.run()

    def _prompt(self, rng: Random) -> list[int]:
        new = [rng.randrange(3, 990) for _ in range(rng.choice((3, 20, 70, 140)))]
        histories = self.conditions.histories
        if histories and rng.random() < 0.8:
            return rng.choice(histories)[: rng.choice((64, 130, 192, 260))] + new
        return new

    def _asked_by_id(self) -> dict[RequestId, Asked]:
        by_body = {request_id: self.bodies.get(record.value) for request_id, record in accepted(self.world).items()}
        return self.asked | {request_id: asked for request_id, asked in by_body.items() if asked is not None}

    def _captures(self):
        return [capture for client in self.clients for capture in client.captures.values()]

    # Who runs

    async def _keep(self, kind: str, from_s: float = 0.0) -> None:
        """Run one of the kind, and the next one when it has ended."""
        await asyncio.sleep(from_s)
        while True:
            host = self.world.start_host(kind)
            error = await asyncio.shield(host.process.ended)
            self._explain(host, error)
            self.world.kill(host)
            await asyncio.sleep(self.world.rng.uniform(0.1, 1.0))

    def _explain(self, host: Host, error: BaseException | None) -> None:
        self.world.journal.note(host.incarnation, f"ended: {error!r}")
        rest: BaseException | None = error
        if isinstance(error, BaseExceptionGroup):
            rest = error.split((LeaseLost, BusUnavailable))[1]
        if rest is not None and not isinstance(rest, LeaseLost):
            self.world.journal.error(host.incarnation, f"ended by {rest!r}")

    # What befalls it

    def _draw_faults(self) -> list[asyncio.Task]:
        """Those that do not wait for others to do something are under way."""
        rng = self.rng
        self._draw_ways()
        self.triggers = [self._draw_trigger() for _ in range(rng.choice((0, 1, 1, 2)))]
        if rng.random() < 0.3:
            self._strike_links(rng.sample(range(12), 2))
        num_clusters = rng.choice((0, 1, 2, 2, 3))
        return [asyncio.create_task(self._cluster(rng.uniform(0.1, TROUBLE_S))) for _ in range(num_clusters)]

    def _draw_ways(self) -> None:
        """How sure and how quick log and store are in this schedule."""
        rng, world = self.rng, self.world
        log_rng, store_rng = Random(rng.random()), Random(rng.random())
        loss = rng.choice((0.0, 0.02, 0.1))
        late = rng.choice((0.0, 0.03, 0.1))
        slow = rng.choice((0.0, 0.05, 0.2))
        store_slow = rng.choice((0.0, 0.02, 0.1))

        def fate(append: Append) -> Fate:
            self._count(append)
            draw = log_rng.random
            delay_s = log_rng.uniform(0.1, 1.0) if draw() < slow else log_rng.uniform(0, 0.005)
            late_copy_s = log_rng.uniform(0.0, LATEST_COPY_S) if draw() < late else None
            if late_copy_s is not None:
                self.last_copy_s = max(self.last_copy_s, self.loop.time() + delay_s + late_copy_s)
            return Fate(delay_s, lands=draw() >= loss, acked=draw() >= loss, late_copy_s=late_copy_s)

        def way_s() -> tuple[float, float]:
            if store_rng.random() >= store_slow:
                return 0.0, 0.0
            return store_rng.uniform(0, 0.4), store_rng.uniform(0, 0.4)

        world.log.fate, world.store.way_s = fate, way_s

    def _draw_trigger(self) -> Trigger:
        rng = self.rng
        kind, topic = rng.choice(TRIGGERS)
        faults = [rng.choice(SENDER_FAULTS)]
        if rng.random() < 0.6:
            faults.append(rng.choice(FURTHER_FAULTS))
        return Trigger(kind, topic, rng.randint(1, 6), rng.random() < 0.5, tuple(faults))

    def _count(self, append: Append) -> None:
        if self.calm:
            return
        kind = append.client_id.rpartition("-")[0]
        self.appends[kind, append.topic] += 1
        for trigger in self.triggers:
            if (trigger.kind, trigger.topic, trigger.number) == (kind, append.topic, self.appends[kind, append.topic]):
                host = next(host for host in self.world.hosts if host.incarnation == append.client_id)
                for fault in trigger.faults:
                    outside(partial(self._strike, fault, host), 0.02 if trigger.after else 0.0)

    def _strike_links(self, numbers: list[int]) -> None:
        """Befall one of the two that the n-th link of this schedule joins, for these n."""
        begun = count()

        def strike(*ends: LocalTransfer) -> None:
            if next(begun) in numbers:
                address = self.rng.choice(ends).address
                host = next(host for host in self.world.hosts if host.transfer and host.transfer.address == address)
                fault = self.rng.choice(LINK_FAULTS)
                outside(partial(self._strike, fault, host), self.rng.uniform(0, 2 * self.conditions.delay_s))

        self.world.network.on_link = strike

    async def _cluster(self, at_s: float) -> None:
        """One fault, or some at about the same time: it takes more than one for most things to go wrong."""
        rng = Random(self.rng.random())
        for _ in range(rng.choice((1, 1, 2, 3))):
            fault, kind = rng.choice(FAULTS), rng.choice(KINDS)
            outside(partial(self._strike_any, fault, kind), at_s + rng.uniform(0, 0.8))

    def _strike_any(self, fault: Fault, kind: str) -> None:
        self._strike(fault, self.world.any(kind))

    def _strike(self, fault: Fault, host: Host | None) -> None:
        if self.calm or host is None or not host.live:
            return
        rng = self.world.rng
        self.num_faults += 1
        lasts_s = rng.choice((rng.uniform(0.2, 1.5), rng.uniform(2.5, 5.0)))
        self.world.journal.note("world", f"{fault.__name__}: {host.incarnation}, {lasts_s:.2f} s if it heals")
        self.last_copy_s = max(self.last_copy_s, self.loop.time() + lasts_s)  # of a zombie
        fault(Strike(self.world, host, lasts_s))

    async def _rest(self, work: list[asyncio.Task]) -> bool:
        """Wait for the end of all; False if it does not come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CALM_S):
                await asyncio.gather(*work)
                while not await self._rests():
                    await asyncio.sleep(LOOK_S)
                return True
        return False

    async def _rests(self) -> bool:
        """Whether nothing happens any more, late copies of records included."""
        for kept in work_kept(self.world):
            self.world.journal.error("world", kept)
        if not at_rest(self.world):
            return False
        await asyncio.sleep(max(LOOK_S, self.last_copy_s - self.loop.time() + LOOK_S))
        return at_rest(self.world)

    def _digest(self) -> int:
        """Tells schedules that went differently apart."""
        log = self.world.log
        places = [(topic, partition) for topic in topics.TOPICS for partition in range(topic.num_partitions)]
        ends = [tuple(r.timestamp_s for r in log.records(topic.name, partition)) for topic, partition in places]
        return hash(tuple(ends))
