"""What can be done to a cluster, and how it is drawn.

Which kinds, whom, for how long and when is settled by the seed alone, but for whom a fault cannot meet just then: a
seat or server that another fault still holds is passed over, and so is who is down.
"""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from redis.asyncio import Redis

from tests.faults.cluster.proxy import Path
from tests.faults.cluster.seats import RESTART_DELAY_S, describe_end
from tests.faults.cluster.worker import HANG

LEASE_S = 2.0

STEP_S = 4.0
"""BATON_STEP_S of the workers: a longer step is taken for hung."""

HUNG_SLACK_S = 4.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 6.0
SHORTEST_CUT_S, LONGEST_CUT_S = 0.5, 8.0
LONGEST_SERVER_PAUSE_S = 4.0
LONGEST_DOWN_S = 4.0
LONGEST_SERVER_DOWN_S = 1.0
"""How long who was killed stays away at most, beside his start."""


BACK_WITHIN_S = 60.0
"""A process that takes longer to end and to be started again never will."""

BEARABLE_S = 0.6
"""So short that nobody's lease runs out."""


class Kind(StrEnum):
    KILL = "SIGKILL"
    TERM = "SIGTERM"
    PAUSE = "SIGSTOP"
    HANG = "hung engine step"
    CUT_KAFKA = "cut from Kafka"
    CUT_REDIS = "cut from Redis"
    CUT_PEERS = "cut from peers"
    REDIS_KILL = "Redis SIGKILL"
    REDIS_FLUSH = "Redis FLUSHALL"
    REDIS_PAUSE = "Redis SIGSTOP"
    BROKER_KILL = "broker SIGKILL"
    BROKER_PAUSE = "broker SIGSTOP"


ENDING_KINDS = {Kind.KILL, Kind.TERM, Kind.HANG}
REDIS_KINDS = {Kind.REDIS_KILL, Kind.REDIS_FLUSH, Kind.REDIS_PAUSE}
BROKER_KINDS = {Kind.BROKER_KILL, Kind.BROKER_PAUSE}
SERVER_KINDS = REDIS_KINDS | BROKER_KINDS

ROLE_WEIGHTS = {"decode": 4, "prefill": 2, "ingest": 2, "edge": 3}

WEIGHTS = {
    Kind.KILL: 34,
    Kind.TERM: 8,
    Kind.PAUSE: 20,
    Kind.HANG: 3,
    Kind.CUT_KAFKA: 12,
    Kind.CUT_REDIS: 10,
    Kind.CUT_PEERS: 5,
    Kind.REDIS_KILL: 3,
    Kind.REDIS_FLUSH: 3,
    Kind.REDIS_PAUSE: 2,
    Kind.BROKER_KILL: 2,
    Kind.BROKER_PAUSE: 2,
}

SEVERAL_SHARE = 0.08
"""So many faults come with one or two others at the same moment."""


@dataclass(slots=True)
class Fault:
    """One thing that was done.

    Attributes:
        target: name of the seat or server.
        at_s, until_s: unix seconds; over when the cause is: for a kill, when the successor was started.
        detail: for people.
        incarnation: of the seat's process that was hit.
    """

    number: int
    kind: Kind
    target: str
    at_s: float
    until_s: float | None = None
    detail: str = ""
    life: object = None

    @property
    def incarnation(self):
        return None if self.life is None else self.life.incarnation

    def told(self):
        return {
            "number": self.number,
            "kind": self.kind,
            "target": self.target,
            "at_s": self.at_s,
            "until_s": self.until_s,
            "detail": self.detail,
            "incarnation": self.incarnation,
        }


@dataclass
class Plan:
    """What the seed says of one fault: all its dice are thrown, whatever of them is used."""

    wait_s: float
    kind: Kind
    role: str
    pick: float
    how_long: float
    hard: bool

    def between(self, least, most):
        return least + self.how_long * (most - least)


def draw_plans(seed, num_faults, minutes, weights=WEIGHTS):
    """So many faults, spread over so many minutes."""
    rng = random.Random(seed)
    gaps = []
    while len(gaps) < num_faults:
        gaps += [rng.expovariate(1.0)] + [0.0] * (rng.choice((1, 2)) if rng.random() < SEVERAL_SHARE else 0)
    gaps = gaps[:num_faults]
    scale_s = 60 * minutes / sum(gaps)
    kinds = rng.choices(list(weights), list(weights.values()), k=num_faults)
    roles = rng.choices(list(ROLE_WEIGHTS), list(ROLE_WEIGHTS.values()), k=num_faults)
    return [
        Plan(gap * scale_s, kind, role, rng.random(), rng.random(), rng.random() < 0.5)
        for gap, kind, role in zip(gaps, kinds, roles, strict=True)
    ]


@dataclass
class Injector:
    """Does it, and keeps what was done.

    Attributes:
        protected: names of seats that are never killed, nor blinded for a lease, which may end a worker.
    """

    cluster: object
    protected: frozenset = frozenset()
    faults: list = field(default_factory=list)
    _busy: set = field(default_factory=set)
    _tasks: set = field(default_factory=set)
    _failed: list = field(default_factory=list)

    async def run(self, plans):
        """Every plan in its turn; returns when the last fault is over. A plan that can meet nobody waits a moment."""
        for plan in plans:
            await asyncio.sleep(plan.wait_s)
            while not (aim := self._aim(plan)):
                self._raise_failed()
                await asyncio.sleep(0.1)
            self._begin(aim())
        await self.over()

    async def over(self):
        """Wait until the last fault is over. Raises what a fault failed with: somebody did not come back."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._raise_failed()

    def _raise_failed(self):
        for task in self._failed:
            task.result()

    def strike(self, work):
        """One fault by hand: `injector.strike(injector.kill(seat))`."""
        return self._begin(work)

    def _begin(self, work):
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task):
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._failed.append(task)

    def _aim(self, plan):
        """The strike that the plan means, None if nobody can be met now."""
        if plan.kind in SERVER_KINDS:
            servers = self.cluster.brokers if plan.kind in BROKER_KINDS else [self.cluster.redis]
            server = self._pick(plan, [server for server in servers if self._free(server)])
            return server and self._aim_at_server(plan, server)
        role = plan.role
        if plan.kind is Kind.CUT_PEERS:
            role = "prefill"
        elif plan.kind is Kind.HANG:
            role = "prefill" if plan.hard else "decode"
        free = [seat for seat in self.cluster.of(role) if self._free(seat)]
        ends = plan.kind in ENDING_KINDS
        seat = self._pick(plan, [seat for seat in free if not (ends and seat.name in self.protected)])
        return seat and self._aim_at_seat(plan, seat)

    def _aim_at_server(self, plan, server):
        match plan.kind:
            case Kind.REDIS_FLUSH:
                return self.flush
            case Kind.REDIS_KILL | Kind.BROKER_KILL:
                return lambda: self.kill_server(plan.kind, server, plan.between(0.0, LONGEST_SERVER_DOWN_S))
            case _:
                for_s = plan.between(SHORTEST_PAUSE_S, LONGEST_SERVER_PAUSE_S)
                return lambda: self.pause_server(plan.kind, server, for_s)

    def _aim_at_seat(self, plan, seat):
        match plan.kind:
            case Kind.KILL | Kind.TERM:
                strike = self.kill if plan.kind is Kind.KILL else self.term
                down_s = RESTART_DELAY_S if plan.hard else plan.between(0.0, LONGEST_DOWN_S)
                return lambda: strike(seat, down_s)
            case Kind.HANG:
                return lambda: self.hang(seat)
            case Kind.PAUSE:
                for_s = self._bearable_s(seat, plan.between(SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
                return lambda: self.pause(seat, for_s)
            case _:
                for_s = plan.between(SHORTEST_CUT_S, LONGEST_CUT_S)
                if plan.kind is Kind.CUT_REDIS:
                    for_s = self._bearable_s(seat, for_s)
                return lambda: self.cut(plan.kind, seat, Path.RESET if plan.hard else Path.FROZEN, for_s)

    def _bearable_s(self, seat, for_s):
        return min(for_s, BEARABLE_S) if seat.name in self.protected else for_s

    def _free(self, target):
        return target.is_alive and target.name not in self._busy

    @staticmethod
    def _pick(plan, found):
        return found[int(plan.pick * len(found))] if found else None

    def _note(self, kind, target, detail, life=None):
        fault = Fault(len(self.faults), kind, target.name, time.time(), detail=detail, life=life)
        self.faults.append(fault)
        self._busy.add(target.name)
        return fault

    def _done(self, fault):
        fault.until_s = time.time()
        self._busy.discard(fault.target)

    # Strikes

    async def kill(self, seat, down_s=RESTART_DELAY_S):
        """SIGKILL; the successor comes after `down_s`."""
        fault = self._note(Kind.KILL, seat, f"away for {down_s:.1f} s", seat.life)
        await self._end(fault, seat, signal.SIGKILL, down_s)
        return fault

    async def term(self, seat, down_s=RESTART_DELAY_S):
        """SIGTERM, as a rolling restart does."""
        fault = self._note(Kind.TERM, seat, f"away for {down_s:.1f} s", seat.life)
        await self._end(fault, seat, signal.SIGTERM, down_s)
        return fault

    async def _end(self, fault, seat, signal_number, down_s):
        num_lives = len(seat.lives)
        seat.held_back_s = down_s
        seat.end(signal_number)
        async with asyncio.timeout(BACK_WITHIN_S):
            while len(seat.lives) == num_lives:
                await asyncio.sleep(0.02)
        self._done(fault)

    async def pause(self, seat, for_s):
        """SIGSTOP, then SIGCONT: under or over the lease."""
        fault = self._note(Kind.PAUSE, seat, f"for {for_s:.1f} s", seat.life)
        life = seat.life
        seat.stop()
        await asyncio.sleep(for_s)
        if seat.life is life and seat.is_alive:
            seat.wake()
        self._done(fault)
        return fault

    async def hang(self, seat):
        """Its engine's next step has no end: it gives its slot up and ends; idle it would not notice, and is killed."""
        fault = self._note(Kind.HANG, seat, "", seat.life)
        life, num_lives = seat.life, len(seat.lives)
        os.kill(life.pid, HANG)
        with suppress(TimeoutError):
            async with asyncio.timeout(STEP_S + HUNG_SLACK_S):
                while len(seat.lives) == num_lives:
                    await asyncio.sleep(0.05)
        if life.ended_s is None:
            fault.detail = "was idle: killed"
            seat.end(signal.SIGKILL)
        self._done(fault)
        return fault

    async def cut(self, kind, seat, how, for_s):
        """From one thing only that it depends on."""
        fault = self._note(kind, seat, f"{how} for {for_s:.1f} s", seat.life)
        paths = seat.paths[{Kind.CUT_KAFKA: "kafka", Kind.CUT_REDIS: "redis", Kind.CUT_PEERS: "peers"}[kind]]
        paths.cut(how)
        await asyncio.sleep(for_s)
        paths.restore()
        self._done(fault)
        return fault

    async def kill_server(self, kind, server, down_s):
        """SIGKILL of Redis or a broker; it starts again on its data."""
        fault = self._note(kind, server, f"away for {down_s:.1f} s and its start")
        await server.kill()
        await asyncio.sleep(down_s)
        await server.start()
        self._done(fault)
        return fault

    async def pause_server(self, kind, server, for_s):
        """SIGSTOP of Redis or a broker."""
        fault = self._note(kind, server, f"for {for_s:.1f} s")
        server.stop()
        await asyncio.sleep(for_s)
        server.wake()
        self._done(fault)
        return fault

    async def flush(self):
        """Redis loses everything at one moment."""
        fault = self._note(Kind.REDIS_FLUSH, self.cluster.redis, "")
        async with Redis.from_url(self.cluster.redis_url) as client:
            await client.flushall()
        self._done(fault)
        return fault


BLINDING_KINDS = {Kind.PAUSE, Kind.CUT_REDIS, Kind.HANG}

EXPLAINED_WITHIN_S = 20.0
"""A process that ends by itself because of a fault does so in this time after it: 10 s of them it may wait for Kafka to
take what it still holds."""


def unexplained_ends(cluster, faults):
    """Ends of processes that no fault accounts for, in words."""
    found = [f"{server}: {lost}" for server in (cluster.redis, *cluster.brokers) for lost in server.lost]
    for seat in cluster.seats.values():
        for life in seat.lives:
            if life.ended_s is not None and not _is_explained(seat, life, faults):
                found += [describe_end(life)]
    return found


def _is_explained(seat, life, faults):
    if life.wanted_end is signal.SIGKILL:
        return life.status == -signal.SIGKILL
    if life.wanted_end is signal.SIGTERM and life.status in {0, -signal.SIGTERM}:
        return True  # by the signal itself, where it came before anybody listened
    gave_up = any(words in life.last_error() for words in ("its lease of", "an engine step"))
    return gave_up and any(
        fault.kind in REDIS_KINDS or (fault.kind in BLINDING_KINDS and fault.target == seat.name)
        for fault in faults
        if fault.at_s <= life.ended_s <= (fault.until_s or time.time()) + EXPLAINED_WITHIN_S
    )
