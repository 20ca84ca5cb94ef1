"""A worker: one engine thread with its pages, one transfer endpoint, one slot with its lease; it runs a role.

    claim a slot, beat (draining) ─> link with peers ─> read the slot's partitions from their end ─> beat: open for work
      ─> records to the role, steps to the role, beats ─> SIGTERM: drain, cut what is left, release the slot

A worker that finds its lease lost raises LeaseLost: the process ends and comes back as a new incarnation.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shared.bus.port import Bus, Reader, Start
from shared.engine.port import Engine
from shared.errors import LeaseLost, StepHangs
from shared.observe.log import Logger
from shared.observe.metrics import NO_SLOT, WorkerMetrics
from shared.policy.profile_fit import MeasuredStep
from shared.request import Incarnation, WorkerRef, partition_of
from shared.state import keys
from shared.state.port import Role as RoleName
from shared.state.port import State, StateUnavailable, WorkerCard, WorkerLoad
from shared.text.tokeniser import Tokeniser
from shared.transfer.port import Transfer
from shared.wire.codec import Decoder, UndecodableMessage, encode
from shared.wire.to_stream_out import Cut
from shared.wire.to_worker import (
    TO_DECODE_DECODER,
    TO_PREFILL_DECODER,
    Stop,
    ToDecode,
    ToPrefill,
)
from shared.wire.topics import DECODE, NUM_SLOTS, PREFILL, STREAM_OUT
from shared.worker.announcing import BlockAnnouncer
from shared.worker.credits import Credits
from shared.worker.engine_figures import EngineFigures
from shared.worker.engine_thread import EngineThread
from shared.worker.frames import FrameWriter
from shared.worker.lending import EngineLender
from shared.worker.peers import LinkFloor, Peers
from shared.worker.role import Role, WorkerContext
from shared.worker.speeds import SpeedMeter, rounded_rate

READ_TIMEOUT_S = 1.0
DRAIN_POLL_S = 0.05

LEARN_INTERVAL_S = 2.0
"""The speeds of steps are told anew so often."""

HAND_OVER_TIMEOUT_S = 5.0
"""Cuts of what a leaving worker did not finish are waited for so long."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How long a worker waits for what.

    Attributes:
        drain_s: on SIGTERM, what runs may go on for this long; the rest is handed to other workers.
        step_s: an engine step that takes longer is taken for hung: the worker gives its slot up and ends.
    """

    drain_s: float = 30.0
    step_s: float = 60.0


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of.

    Attributes:
        clock_s: unix seconds.
        floor: None takes every link for good.
        run_engine: makes what runs the engine's steps, timed by `clock_s`.
        measured_steps: what the engine was measured by before it is open for work.
    """

    role_name: RoleName
    make_role: Callable[[WorkerContext], Role]
    name: str
    incarnation: Incarnation
    engine: Engine
    transfer: Transfer
    bus: Bus
    state: State
    tokeniser: Tokeniser
    metrics: WorkerMetrics
    log: Logger
    clock_s: Callable[[], float]
    random_bytes: Callable[[int], bytes]
    limits: WorkerLimits
    floor: LinkFloor | None = None
    run_engine: Callable[[Engine, Callable[[], float]], EngineThread] = EngineThread
    measured_steps: Sequence[MeasuredStep] = ()


class _Leave(Exception):
    """Ends the task group of a worker that has drained."""


class Worker:
    """One worker process's life.

    Attributes:
        peers: the workers that it may pull from.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self.peers = Peers(
            parts.transfer,
            parts.state,
            role=parts.role_name,
            incarnation=parts.incarnation,
            layout_fingerprint=parts.engine.model.layout.fingerprint,
            floor=parts.floor,
            log=parts.log,
            clock_s=parts.clock_s,
        )
        self._draining = True
        self._slot: int | None = None
        self._engine: EngineThread | None = None
        self._role: Role | None = None
        self._news = BlockAnnouncer(parts.state, parts.incarnation, parts.log)
        self._figures = EngineFigures(parts.metrics)
        self._speeds = SpeedMeter(parts.measured_steps)
        self._running_step_s: float | None = None
        self._seen_running_s = 0.0

    async def ready(self) -> dict[str, bool]:
        """What a worker needs, and whether it is there."""
        return {
            "log": await self._parts.bus.reachable(),
            "state": await self._parts.state.reachable(),
            "slot": self._slot is not None and not self._draining,
        }

    def health(self) -> dict[str, object]:
        """What `/health` says: who this is, and how its links are."""
        return {"name": self._parts.name, "slot": self._slot, **self.peers.health()}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then drain and leave. The transfer must be open already."""
        parts = self._parts
        engine = self._engine = parts.run_engine(parts.engine, parts.clock_s)
        try:
            async with (
                parts.bus.producer() as frames,
                parts.bus.producer() as handoff,
                parts.bus.reader(PREFILL.name, group="worker") as prefill_reader,
                parts.bus.reader(DECODE.name, group="worker") as decode_reader,
                self._held_slot(stop) as slot,
            ):
                with engine.running():
                    async with asyncio.TaskGroup() as tasks:
                        me = WorkerRef(slot, parts.incarnation)
                        tasks.create_task(self._watch_engine(engine))
                        tasks.create_task(self._beat_for_ever(slot, engine))
                        tasks.create_task(self._news.run(engine))
                        tasks.create_task(self._learn_for_ever())
                        context = WorkerContext(
                            me=me,
                            engine=engine,
                            transfer=parts.transfer,
                            page_bytes=parts.engine.model.layout.page_bytes,
                            frames=FrameWriter(frames, me),
                            handoff=handoff,
                            credits=Credits(parts.state),
                            tokeniser=parts.tokeniser,
                            metrics=parts.metrics,
                            log=parts.log,
                            clock_s=parts.clock_s,
                            random_bytes=parts.random_bytes,
                            is_gone=self.peers.is_gone,
                            tasks=tasks,
                            profile=lambda: self._speeds.profile,
                        )
                        parts.transfer.lend_from(EngineLender(engine, parts.metrics))
                        tasks.create_task(self._open(context, prefill_reader, decode_reader))
                        await stop.wait()
                        await self._drain(context)
                        raise _Leave
        except* _Leave:
            parts.log.info("drained")

    async def _open(self, context: WorkerContext, prefill_reader: Reader, decode_reader: Reader) -> None:
        """Connect to the peers that are there, stand where the slot's partitions end, then be open for work.

        The slot is held meanwhile by beats.
        """
        await self.peers.refresh()
        self.peers.check_floor()
        context.tasks.create_task(self.peers.run())
        await prefill_reader.assign({context.me.slot: Start.END})
        await decode_reader.assign({context.me.slot: Start.END})
        role = self._role = self._parts.make_role(context)
        context.tasks.create_task(context.credits.run())
        context.tasks.create_task(self._read_for_ever(prefill_reader, TO_PREFILL_DECODER, role))
        context.tasks.create_task(self._read_for_ever(decode_reader, TO_DECODE_DECODER, role))
        context.tasks.create_task(self._handle_steps(context.engine, role))
        context.tasks.create_task(self._stop_late(context.me, role))
        self._draining = False
        await self._beat(context.me.slot)

    @asynccontextmanager
    async def _held_slot(self, stop: asyncio.Event) -> AsyncGenerator[int]:
        parts = self._parts
        slot = await self._claim_slot(stop)
        self._slot = slot
        parts.metrics.slot.set(slot)
        parts.log.info("slot claimed", slot=slot, incarnation=parts.incarnation)
        try:
            yield slot
        finally:
            self._slot = None
            parts.metrics.slot.set(NO_SLOT)
            try:
                await parts.state.release_slot(slot, parts.incarnation)
            except StateUnavailable as error:
                parts.log.warning("slot left to run out", error=str(error))

    async def _claim_slot(self, stop: asyncio.Event) -> int:
        """The lowest free slot; waits while there is none (a predecessor's lease may have to run out) or no store."""
        while not stop.is_set():
            try:
                slot = await self._parts.state.claim_slot(
                    self._card(), self._load(), num_slots=NUM_SLOTS, lease_ms=keys.LEASE_MS
                )
            except StateUnavailable as error:
                self._parts.log.warning("no slot claimed", error=str(error))
            else:
                if slot is not None:
                    return slot
                self._parts.log.warning("no free slot", num_slots=NUM_SLOTS)
            await asyncio.sleep(keys.BEAT_INTERVAL_S)
        raise _Leave

    def _card(self) -> WorkerCard:
        engine = self._parts.engine
        return WorkerCard(
            incarnation=self._parts.incarnation,
            role=self._parts.role_name,
            name=self._parts.name,
            model=engine.model.name,
            model_fingerprint=engine.model.fingerprint,
            max_context=engine.limits.max_context,
            num_pages=engine.limits.num_pages,
            max_running=engine.limits.max_running,
            max_batch_tokens=engine.limits.max_batch_tokens,
            page_bytes=engine.model.layout.page_bytes,
            num_host_pages=engine.limits.num_host_pages,
            transfer_address=self._parts.transfer.address,
            layout_fingerprint=engine.model.layout.fingerprint,
        )

    def _load(self) -> WorkerLoad:
        stats = self._engine.stats if self._engine else self._parts.engine.stats()
        return WorkerLoad(
            num_free_pages=stats.num_free_pages,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            draining=self._draining,
            log_away=self._parts.bus.silent_s() > keys.LEASE_S,
            profile=self._speeds.profile,
            links={peer: rounded_rate(rate) for peer, rate in self.peers.rates().items()},
        )

    async def _beat_for_ever(self, slot: int, engine: EngineThread) -> None:
        while True:
            if self._step_hangs(engine):
                engine.is_given_up = True
                raise StepHangs(f"slot {slot} is given up: an engine step takes over {self._parts.limits.step_s} s")
            await self._beat(slot)
            self._figures.show(engine.stats, self._speeds)
            await asyncio.sleep(keys.BEAT_INTERVAL_S)

    def _step_hangs(self, engine: EngineThread) -> bool:
        """Whether the step that runs now was seen running long enough ago, by the loop's clock: nobody sets that."""
        now_s = asyncio.get_running_loop().time()
        if engine.step_started_s is None or engine.step_started_s != self._running_step_s:
            self._running_step_s, self._seen_running_s = engine.step_started_s, now_s
        return engine.step_started_s is not None and now_s - self._seen_running_s > self._parts.limits.step_s

    async def _beat(self, slot: int) -> None:
        try:
            renewed = await self._parts.state.beat(slot, self._card(), self._load(), lease_ms=keys.LEASE_MS)
        except StateUnavailable as error:
            self._parts.log.warning("beat failed", error=str(error))
            return
        if renewed is None:
            raise LeaseLost(f"slot {slot} is no longer ours: its lease of {keys.LEASE_MS} ms ran out")
        if renewed.blocks_wanted:
            self._news.tell_all()

    async def _learn_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LEARN_INTERVAL_S)
            self._speeds.refresh()

    async def _watch_engine(self, engine: EngineThread) -> None:
        await engine.failed

    async def _read_for_ever(self, reader: Reader, decoder: Decoder[ToPrefill] | Decoder[ToDecode], role: Role) -> None:
        while True:
            for record in await reader.read(READ_TIMEOUT_S):
                try:
                    message = decoder.decode(record.value)
                except UndecodableMessage as error:
                    self._ignore("undecodable", error=str(error), topic=record.topic, offset=record.offset)
                    continue
                if message.target.incarnation != self._parts.incarnation:
                    self._ignore("other incarnation")
                    continue
                role.take(message)

    def _ignore(self, reason: str, **details: object) -> None:
        self._parts.metrics.ignore(reason)
        self._parts.log.info("record ignored", reason=reason, **details)

    async def _stop_late(self, me: WorkerRef, role: Role) -> None:
        """What is past its deadline its owner stops, if there is one: who lost his owner must not go on either."""
        while True:
            now_s = self._parts.clock_s()
            for assignment in role.unfinished():
                if assignment.deadline_s <= now_s:
                    role.take(Stop(assignment.placement, me))
            await asyncio.sleep(keys.BEAT_INTERVAL_S)

    async def _handle_steps(self, engine: EngineThread, role: Role) -> None:
        metrics = self._parts.metrics
        while True:
            step = await engine.steps.get()
            await role.handle(step)
            engine.handled()
            self._speeds.add(step)
            metrics.step_seconds.observe(step.ended_s - step.started_s)
            metrics.step_tokens.observe(step.output.num_batch_tokens)

    async def _drain(self, context: WorkerContext) -> None:
        """Let what runs finish within the limit, and hand the rest over by a cut that their owners act on."""
        role, slot, self._draining = self._role, context.me.slot, True
        if role is None:
            return
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._parts.limits.drain_s
        # Told at once: a request cut below would otherwise be placed here again until the next beat, and be lost.
        await self._beat(slot)
        while loop.time() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
            if not (role.unfinished() or context.engine.stats.num_held or await self._is_promised(slot)):
                break
        cuts = [Cut(left.request_id, left.choice, left.epoch + 1, reason="drain") for left in role.unfinished()]
        sends = [context.handoff.send(STREAM_OUT.name, partition_of(cut.request_id), encode(cut)) for cut in cuts]
        try:
            async with asyncio.timeout(HAND_OVER_TIMEOUT_S):
                await asyncio.gather(*sends)
        except TimeoutError:
            self._parts.log.warning("not all handed over: the log is away", num_requests=len(cuts))

    async def _is_promised(self, slot: int) -> bool:
        """Whether placements count on this worker, those included whose work or ticket has not come yet."""
        try:
            workers = await self._parts.state.workers(num_slots=NUM_SLOTS)
        except StateUnavailable:
            return True
        return any(worker.slot == slot and worker.num_credits > 0 for worker in workers)
