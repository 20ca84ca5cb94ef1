"""The edge's loops: lease partitions, read them, do what their owner owes, commit what is true.

beat ──> leases ──> take over ──┐                        ┌─> results, ingest-resume, prefill, decode
                                v                        │
stream-out ──> read ──> PartitionLog ──changes──> PartitionOwner
                                └──news──> clients' holds (`following`, `requests`)
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.stream_out.admission import Admission
from services.stream_out.following import READ_TIMEOUT_S, Following, Partition
from services.stream_out.metrics import EdgeMetrics
from services.stream_out.owner import EXPIRE_AFTER_S, Duty, PartitionOwner, WriteResult
from services.stream_out.results import (
    WORKERS_LOST_ERROR,
    ended_by_losses,
    losses_of,
    result_of,
    timings_of,
    total_tokens,
    unmakeable_result,
    usage_of,
)
from services.stream_out.settings import Settings
from services.stream_out.sight import Alive, Sight
from services.stream_out.streams import PartitionLog
from services.stream_out.takeover import GROUP, TakeOver, prepare
from services.stream_out.tenants import Tenants
from shared.bus.dead_letter import dead_letter
from shared.bus.one_record import record_at
from shared.bus.port import Bus, BusUnavailable, Committed, Record
from shared.observe.log import Logger
from shared.policy.fold import Change, RequestState
from shared.request import NUM_REQUEST_PARTITIONS, Event, Incarnation, RequestId, WorkerRef, partition_of
from shared.state.keys import BEAT_INTERVAL_S, LEASE_MS
from shared.state.port import Role, State, StateUnavailable
from shared.text.tokeniser import Tokeniser
from shared.wire.codec import UndecodableMessage, encode
from shared.wire.results import HEADER_STORY_OFFSET
from shared.wire.to_ingest import Resume
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Attach, Cut, Detach, Frame, View
from shared.wire.to_worker import Stop
from shared.wire.topics import (
    DEAD_LETTER,
    DECODE,
    INGEST,
    INGEST_RESUME,
    NUM_SLOTS,
    PREFILL,
    RESULTS,
    STREAM_OUT,
)

COMMIT_INTERVAL_S = 1.0

LEAVE_TIMEOUT_S = 5.0
"""Duties begun before the end get this long."""


class StreamOut:
    """One edge.

    Args:
        incarnation: of this process start.
        clock_s: unix seconds.
        tenants: None: nobody needs a key.
    """

    def __init__(
        self,
        bus: Bus,
        state: State,
        tokeniser: Tokeniser,
        *,
        settings: Settings,
        incarnation: Incarnation,
        clock_s: Callable[[], float],
        logger: Logger,
        metrics: EdgeMetrics,
        tenants: Tenants | None = None,
    ) -> None:
        self.bus = bus
        self.state = state
        self.tokeniser = tokeniser
        self.settings = settings
        self.incarnation = incarnation
        self.clock_s = clock_s
        self.logger = logger
        self.metrics = metrics
        self.tenants = tenants
        self.admission = Admission(state, settings, clock_s=clock_s, logger=logger, metrics=metrics)
        self._partitions: dict[int, Partition] = {}
        self._leased: frozenset[int] = frozenset()
        self._assigned: frozenset[int] = frozenset()
        self._prepared: list[TakeOver] = []
        self._committed: dict[int, Committed] = {}
        self._duties: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._has_leased = False
        self._sight = Sight(clock_s())
        self.following = Following(
            bus,
            state,
            tokeniser,
            partitions=self._partitions,
            end_offset=self._end_offset,
            take=self._take,
            spawn=self.spawn,
            metrics=metrics,
        )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Serve while the context is open; at its end the partitions are free for others at once."""
        async with (
            self.bus.producer() as self._producer,
            self.bus.reader(STREAM_OUT.name, group=GROUP) as self._reader,
        ):
            async with asyncio.TaskGroup() as self._tasks:
                running = (self._beat_loop, self._read_loop, self._commit_loop, self._admission_loop)
                loops = [self._tasks.create_task(loop()) for loop in running]
                try:
                    yield
                finally:
                    await _cancel([*loops, *self._background])
            await self._leave()

    @property
    def owned_partitions(self) -> list[int]:
        """Partitions whose requests this edge accepts best: it reads them anyway."""
        return sorted(p for p, found in self._partitions.items() if found.owner is not None and p in self._leased)

    async def ready(self) -> dict[str, bool]:
        """What the edge needs, and whether it is there."""
        bus, state = await asyncio.gather(self.bus.reachable(), self.state.reachable())
        owners = [self._partitions[p].owner for p in self.owned_partitions]
        settled = len(owners) == len(self._leased) and all(owner is not None and owner.settled for owner in owners)
        partitions = self._has_leased and settled
        return {"bus": bus, "state": state, "partitions": partitions, "accepting": not self.admission.draining}

    def health(self) -> dict[str, str]:
        """What works less well than it should."""
        wrong: dict[str, str] = {}
        if self.admission.blind:
            wrong["admission"] = "Redis is away: no limit holds, and no wait is foreseen"
        if self.tenants is not None and self.tenants.is_outdated:
            wrong["tenants"] = "the file cannot be read: keys and limits are those of before"
        return {"status": "degraded", **wrong} if wrong else {}

    # What clients' requests need

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside the loops; it is cancelled when the edge ends."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.logger.error("background task failed", exc_info=error)

    async def send(
        self, topic: str, request_id: RequestId, value: bytes, headers: Iterable[tuple[str, bytes]] = ()
    ) -> int:
        """Append to the request's partition of a topic; its offset."""
        return await self._producer.send(
            topic, partition_of(request_id), value, key=request_id.encode(), headers=tuple(headers)
        )

    async def tell(self, message: Cut | Attach | Detach) -> int:
        """Append to the request's story."""
        return await self.send(STREAM_OUT.name, message.request_id, encode(message))

    async def _admission_loop(self) -> None:
        while True:
            await self.admission.look()
            if self.tenants is not None:
                self.tenants.refresh(self.logger)
                self.metrics.tenants_outdated.set(self.tenants.is_outdated)
            self.metrics.admission_blind.set(self.admission.blind)
            await asyncio.sleep(BEAT_INTERVAL_S)

    async def _end_offset(self, partition: int) -> int:
        return await self._reader.end_offset(partition)

    # Leases

    async def _beat_loop(self) -> None:
        while True:
            await self._beat()
            await asyncio.sleep(BEAT_INTERVAL_S)

    async def _beat(self) -> None:
        try:
            leased = await self.state.lease_partitions(
                GROUP, self.incarnation, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=LEASE_MS
            )
            alive = await self._look_who_lives()
        except StateUnavailable as error:
            self.logger.warning("coordination is away: no verdicts", error=str(error))
            self._sight.fail(self.clock_s())
            self._judge(None)
            return
        gained, self._leased, self._has_leased = leased - self._leased, leased, True
        self.metrics.partitions.set(len(leased))
        if gained:
            self.logger.info("partitions leased", partitions=sorted(gained))
            # In the group: an edge that cannot take over what it leased must not stand in the way of one that can.
            task = self._tasks.create_task(self._prepare(gained))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        self._judge(alive)

    async def _look_who_lives(self) -> Alive | None:
        """None: this edge cannot tell. Raises StateUnavailable."""
        owners = [found.owner for found in self._partitions.values() if found.owner is not None]
        needed = frozenset(worker for owner in owners for worker in owner.needed())
        edges = await self.state.group_members(GROUP)
        registry = await self.state.registry(num_slots=NUM_SLOTS)
        up_ms = await self.state.up_ms(lease_ms=LEASE_MS)
        now_s = self.clock_s()
        self._sight.look(now_s, up_ms=up_ms, silent_s=self.bus.silent_s())
        unheard = frozenset(worker.card.incarnation for worker in registry.workers if worker.load.log_away)
        return Alive(edges, needed - (registry.holders - unheard)) if self._sight.is_clear(now_s) else None

    async def _prepare(self, partitions: frozenset[int]) -> None:
        while partitions:
            try:
                prepared = await prepare(self.bus, self._reader, sorted(partitions))
            except BusUnavailable as error:
                self.logger.warning("the log is away: take-over waits", error=str(error))
                await asyncio.sleep(BEAT_INTERVAL_S)
                partitions &= self._leased
            else:
                self._prepared += prepared  # apart from the wait, in which others put theirs in a list of their own
                return

    def _judge(self, alive: Alive | None) -> None:
        """Verdicts on requests and on the workers that they need."""
        now_s = self.clock_s()
        num_lost: Counter[WorkerRef] = Counter()
        owners = [(p, found.owner) for p, found in self._partitions.items() if found.owner and p in self._leased]
        for partition, owner in owners:
            cuts = owner.judge(now_s, alive)
            for cut in cuts:
                if cut.lost is not None:
                    num_lost[cut.lost] += 1
                    self.metrics.placements_lost.labels(_role_of_lost(owner, cut)).inc()
            self._do_all(partition, owner, cuts)
            owner.tidy(now_s)
        for found in self._partitions.values():
            if found.owner is None:
                found.log.forget_ended(now_s)
                found.log.expire(now_s - EXPIRE_AFTER_S)
        for worker, num_placements in num_lost.items():
            self.logger.warning(
                "worker lost", slot=worker.slot, incarnation=worker.incarnation, num_placements=num_placements
            )

    async def _leave(self) -> None:
        if self._duties:
            await asyncio.wait(self._duties, timeout=LEAVE_TIMEOUT_S)
            await _cancel(self._duties)
        await self._commit()
        try:
            await self.state.leave_group(GROUP, self.incarnation)
        except StateUnavailable as error:
            self.logger.warning("leases run out by themselves", error=str(error))

    # Reading

    async def _read_loop(self) -> None:
        while True:
            await self._settle_assignment()
            for record in await self._reader.read(READ_TIMEOUT_S):
                found = self._partitions.get(record.partition)
                if found is not None:
                    self._read(found, record)

    def _read(self, found: Partition, record: Record) -> None:
        changes = self._take(found.log, record)
        if found.owner is not None:
            now_s = self.clock_s()
            self._do_all(record.partition, found.owner, found.owner.answer(changes, now_s))
            self._do_all(record.partition, found.owner, found.owner.settle(now_s))

    def _take(self, log: PartitionLog, record: Record) -> list[Change]:
        log.position = record.offset + 1
        try:
            message = STREAM_OUT_DECODER.decode(record.value)
        except UndecodableMessage as error:
            self.metrics.undecodable.inc()
            self.logger.warning(
                "record skipped", topic=record.topic, partition=record.partition, offset=record.offset, error=str(error)
            )
            return []
        if isinstance(message, Frame):
            self.metrics.frame_age.observe(max(0.0, self.clock_s() - message.made_s))
        return log.apply(record.offset, record.timestamp_s, message)

    async def _settle_assignment(self) -> None:
        """Begin with the partitions taken over, leave those that nobody here needs any more."""
        for partition, found in list(self._partitions.items()):
            if partition not in self._leased:
                found.owner = None
                if not found.log.held:
                    del self._partitions[partition]
        prepared, self._prepared = self._prepared, []
        taken = [take_over for take_over in prepared if take_over.partition in self._leased]
        before = {t.partition: self._partitions.pop(t.partition).log for t in taken if t.partition in self._partitions}
        if before:
            # A partition that is read already has to be left for a moment to begin at another offset.
            await self._assign()
        for take_over in taken:
            self._take_over(take_over, before.get(take_over.partition))
        await self._assign()

    def _take_over(self, take_over: TakeOver, before: PartitionLog | None) -> None:
        held = before.held if before is not None else []
        firsts = [before.first_possible(story) for story in held if not story.finished] if before is not None else []
        log = PartitionLog(take_over.partition, min([take_over.start, *firsts]), self.tokeniser)
        log.adopt(held)
        owner = PartitionOwner(
            log,
            start=take_over.start,
            end_offset=take_over.end_offset,
            done=take_over.done,
            results_end=take_over.results_end,
            now_s=self.clock_s(),
            grace_s=self.settings.grace_s,
        )
        self._partitions[take_over.partition] = Partition(log, owner)
        self.metrics.take_overs.inc()
        self._do_all(take_over.partition, owner, owner.settle(self.clock_s()))

    async def _assign(self) -> None:
        starts = {partition: found.log.start for partition, found in self._partitions.items()}
        self._assigned &= starts.keys()
        await self._reader.assign(starts)
        self._assigned = frozenset(starts)

    # Duties

    def _do_all(self, partition: int, owner: PartitionOwner, duties: Iterable[Duty]) -> None:
        """A result is written behind the stops before it: where it stands, they do too."""
        stops: list[asyncio.Task[None]] = []
        for duty in duties:
            before = tuple(stops) if isinstance(duty, WriteResult) else ()
            task = asyncio.create_task(self._do_behind(before, partition, owner, duty))
            if isinstance(duty, Stop):
                stops.append(task)
            self._duties.add(task)
            task.add_done_callback(self._duty_done)

    async def _do_behind(
        self, before: Sequence[asyncio.Task[None]], partition: int, owner: PartitionOwner, duty: Duty
    ) -> None:
        if before:
            await asyncio.wait(before)
        await self._do(partition, owner, duty)

    def _duty_done(self, task: asyncio.Task[None]) -> None:
        self._duties.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.logger.error("duty failed", exc_info=error)

    async def _do(self, partition: int, owner: PartitionOwner, duty: Duty) -> None:
        match duty:
            case WriteResult(state):
                await self._write_result(partition, owner, state)
            case Cut():
                self.metrics.cuts.labels(duty.reason).inc()
                await self.tell(duty)
            case Resume():
                self.metrics.resumes.inc()
                await self.send(INGEST_RESUME.name, duty.request_id, encode(duty))
            case Stop():
                self.metrics.stops.inc()
                for topic in (PREFILL.name, DECODE.name):
                    await self._producer.send(topic, duty.target.slot, encode(duty))

    async def _write_result(self, partition: int, owner: PartitionOwner, state: RequestState) -> None:
        if ended_by_losses(state):
            await self._bury(state)
        try:
            result = result_of(state, self.tokeniser)
        except Exception:
            # Of a story that nobody of ours would write, or a defect: the request must end, or it holds up the commit.
            self.logger.exception("result cannot be made", request_id=state.request_id)
            result = unmakeable_result(state)
        # Before the result: where that stands, no other owner would give the place back.
        await self.admission.leave_place(state.request_id, total_tokens(state))
        header = (HEADER_STORY_OFFSET, str(state.first_offset).encode())
        offset = await self.send(RESULTS.name, state.request_id, encode(result), [header])
        now_s = self.clock_s()
        owner.result_acked(state, offset, now_s)
        self.metrics.observe_end(state, result.status, now_s)
        self._log_end(partition, state, result.status, now_s)

    async def _bury(self, state: RequestState) -> None:
        """Keep the job where an operator finds it, with what was lost on it."""
        assert state.view is not None, "a placement was lost, so it was opened"
        letter = dead_letter(
            state.request_id,
            await self._job_of(state.view),
            topic=INGEST.name,
            position=state.view.job,
            tenant=state.view.tenant,
            error=WORKERS_LOST_ERROR.message,
            history=losses_of(state),
        )
        await self._producer.send(
            DEAD_LETTER.name, letter.partition, letter.value, key=letter.key, headers=letter.headers
        )
        self.metrics.dead_letters.inc()

    async def _job_of(self, view: View) -> bytes:
        """The job as it came; nothing if the log has it no more."""
        while True:
            try:
                record = await record_at(self.bus, INGEST.name, view.job.partition, view.job.offset, group=GROUP)
            except BusUnavailable as error:
                self.logger.warning("a dead letter waits for the log", error=str(error))
                await asyncio.sleep(BEAT_INTERVAL_S)
            else:
                return b"" if record is None else record.value

    def _log_end(self, partition: int, state: RequestState, status: str, now_s: float) -> None:
        """The one line of a request."""
        tokens: dict[str, object] = {}
        if state.view is not None:
            usage = usage_of(state)
            self.metrics.observe_usage(usage)
            tokens = {
                "tenant": state.view.tenant,
                "traceparent": state.view.traceparent,
                "model": state.view.model,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "kv_wire_format": usage.wire_format,
                "answer_tokens": usage.completion_tokens,
            }
        finishes = [choice.end.finish for _, choice in sorted(state.choices.items()) if choice.end is not None]
        timings = {**timings_of(state), Event.DELIVERED: now_s}
        self.logger.info(
            "request ended",
            request_id=state.request_id,
            status=status,
            finish=finishes,
            reason=state.cut_reason,
            partition=partition,
            **tokens,
            timings=timings,
        )

    # Commits

    async def _commit_loop(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            await self._commit()

    async def _commit(self) -> None:
        now_s = self.clock_s()
        commits = {
            p: found.owner.commit(now_s)
            for p, found in self._partitions.items()
            if p in self._leased & self._assigned and found.owner is not None and found.owner.settled
        }
        changed = {p: commit for p, commit in commits.items() if self._committed.get(p) != commit}
        try:
            await self._reader.commit(changed)
        except BusUnavailable as error:
            self.logger.warning("commit waits", error=str(error))
        else:
            self._committed |= changed


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _role_of_lost(owner: PartitionOwner, cut: Cut) -> Role:
    placement = owner.log.fold.requests[cut.request_id].choice(cut.choice).placement
    return Role.DECODE if placement is not None and placement.decode == cut.lost else Role.PREFILL
