"""The ingest loop: take a job → admit → place → work record → `open` → commit.

    ingest ────────┐
                   ├─ admit (thread) ─> backlog ─> place (one at a time, in order) ─> dispatch ─> low water ─> commit
    ingest-resume ─┘         └─ refused: a cut with an outcome, in the request's own partition

Until its `open` stands in the log a request is ingest's; a successor reads it again from the committed offset, and asks
for the same placement. Each partition is leased; two ingests on one partition at once do no harm.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.ingest.admission import Admission, Admitted
from services.ingest.cluster import Cluster
from services.ingest.jobs import Job, read_job, request_id_of, unreadable_job
from services.ingest.low_water import LowWater
from shared.blocks import TokenIds, hash_chain, root_hash
from shared.bus.port import Bus, BusUnavailable, Committed, Producer, Reader, Record, Start
from shared.errors import ContextTooLong, RequestError
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics
from shared.policy.placement import Chosen, NeverFits, NoRoomNow, capacity_tokens, place
from shared.policy.views import RequestView
from shared.request import (
    NUM_REQUEST_PARTITIONS,
    Event,
    FinishReason,
    Incarnation,
    PlacementId,
    partition_of,
)
from shared.state import keys
from shared.state.port import Placement, PlacementKey, RequestHint, State, StateUnavailable
from shared.wire.codec import UndecodableMessage, encode
from shared.wire.results import HEADER_ERROR, HEADER_SOURCE_OFFSET, HEADER_SOURCE_PARTITION, HEADER_SOURCE_TOPIC
from shared.wire.to_ingest import RESUME_DECODER, LogPosition, Resume, body_hash
from shared.wire.to_stream_out import Cut, ErrorBody, Open, View
from shared.wire.to_worker import Assignment, PrefillWork
from shared.wire.topics import DEAD_LETTER, INGEST, INGEST_RESUME, PREFILL, STREAM_OUT

GROUP = "ingest"
READ_TIMEOUT_S = 1.0
COMMIT_INTERVAL_S = 1.0
FEED_INTERVAL_S = 0.2
ROOM_POLL_S = 0.02
STATE_RETRY_S = 0.1
HINT_KEEP_S = 3600
MAX_JOBS_IN_HAND = 1024
"""Jobs read and not dispatched; beyond it the log is the buffer."""


@dataclass(slots=True)
class InHand:
    """A record that is being dealt with, until all its choices are dispatched."""

    topic: str
    position: LogPosition
    num_open_choices: int = 1


@dataclass(frozen=True, slots=True)
class Waiting:
    """One admitted choice in the backlog.

    Attributes:
        accepted_ids: the answer so far; empty at epoch 1.
        admitted_s: unix seconds.
    """

    record: InHand
    admitted: Admitted
    choice: int
    epoch: int
    accepted_ids: TokenIds
    admitted_s: float

    @property
    def ids(self) -> TokenIds:
        return self.admitted.prompt_ids + self.accepted_ids


class IngestService:
    """One ingest process.

    Args:
        default_deadline_s: for jobs that name none.
        clock_s: unix seconds.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        state: State,
        admission: Admission,
        incarnation: Incarnation,
        default_deadline_s: float,
        metrics: IngestMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        new_placement_id: Callable[[], PlacementId],
    ) -> None:
        self._bus = bus
        self._state = state
        self._admission = admission
        self._incarnation = incarnation
        self._default_deadline_s = default_deadline_s
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._new_placement_id = new_placement_id
        self._cluster = Cluster(state, metrics)
        self._backlog: deque[Waiting] = deque()
        self._backlog_grew = asyncio.Event()
        self._in_hand = asyncio.Semaphore(MAX_JOBS_IN_HAND)
        self._low_water: dict[tuple[str, int], LowWater] = {}
        self._owned: frozenset[int] = frozenset()
        self._num_placed = 0

    async def ready(self) -> dict[str, bool]:
        """What ingest needs, and whether it is there."""
        return {
            "log": await self._bus.reachable(),
            "state": await self._state.reachable(),
            "partitions": bool(self._owned),
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; what is in hand then is left to whoever takes the partitions."""
        async with AsyncExitStack() as stack:
            self._producer: Producer = await stack.enter_async_context(self._bus.producer())
            jobs = await stack.enter_async_context(self._bus.reader(INGEST.name, group=GROUP))
            resumes = await stack.enter_async_context(self._bus.reader(INGEST_RESUME.name, group=GROUP))
            self._lookups = await stack.enter_async_context(self._bus.reader(INGEST.name, group=GROUP))
            self._lookup_lock = asyncio.Lock()
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            loops = [
                self._lease_for_ever(jobs, resumes),
                self._read_for_ever(jobs, self._take_job),
                self._read_for_ever(resumes, self._take_resume),
                self._commit_for_ever(jobs, resumes),
                self._follow_feeds_for_ever(),
                self._place_for_ever(),
            ]
            running = [self._tasks.create_task(loop) for loop in loops]
            await stop.wait()
            for task in running:
                task.cancel()
            await self._leave(jobs, resumes)

    # Partitions

    async def _lease_for_ever(self, jobs: Reader, resumes: Reader) -> None:
        while True:
            try:
                owned = await self._state.lease_partitions(
                    GROUP, self._incarnation, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=keys.LEASE_MS
                )
            except StateUnavailable as error:
                self._log.warning("partition leases not renewed", error=str(error))
            else:
                await self._own(owned, jobs, resumes)
            await asyncio.sleep(keys.BEAT_INTERVAL_S)

    async def _own(self, owned: frozenset[int], jobs: Reader, resumes: Reader) -> None:
        if owned == self._owned:
            return
        gained = owned - self._owned
        self._owned &= owned
        try:
            for topic, reader in ((INGEST.name, jobs), (INGEST_RESUME.name, resumes)):
                starts: dict[int, int | Start] = dict.fromkeys(self._owned, Start.BEGINNING)
                for partition in gained:
                    committed = await reader.committed(partition)
                    starts[partition] = committed.offset if committed else Start.BEGINNING
                    self._low_water[topic, partition] = LowWater(committed.offset if committed else 0)
                await reader.assign(starts)
        except BusUnavailable as error:
            self._log.warning("partitions not taken", error=str(error))
            return
        self._owned = owned
        self._log.info("partitions", owned=sorted(owned))

    async def _commit_for_ever(self, jobs: Reader, resumes: Reader) -> None:
        committed: dict[tuple[str, int], int] = {}
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            await self._commit(jobs, resumes, committed)

    async def _commit(self, jobs: Reader, resumes: Reader, committed: dict[tuple[str, int], int]) -> None:
        for topic, reader in ((INGEST.name, jobs), (INGEST_RESUME.name, resumes)):
            due = {
                partition: Committed(self._low_water[topic, partition].offset)
                for partition in self._owned
                if committed.get((topic, partition)) != self._low_water[topic, partition].offset
            }
            if not due:
                continue
            try:
                await reader.commit(due)
            except BusUnavailable as error:
                self._log.warning("not committed; a successor would read more again", error=str(error))
            else:
                committed.update({(topic, partition): statement.offset for partition, statement in due.items()})

    async def _leave(self, jobs: Reader, resumes: Reader) -> None:
        await self._commit(jobs, resumes, {})
        try:
            await self._state.leave_group(GROUP, self._incarnation)
        except StateUnavailable as error:
            self._log.warning("leases left to run out", error=str(error))

    # Taking and admitting

    async def _read_for_ever(self, reader: Reader, take: Callable[[Record, InHand], "asyncio.Future[None]"]) -> None:
        while True:
            for record in await reader.read(READ_TIMEOUT_S):
                low_water = self._low_water.get((record.topic, record.partition))
                if low_water is None:
                    continue
                await self._in_hand.acquire()
                low_water.begin(record.offset)
                take(record, InHand(record.topic, LogPosition(record.partition, record.offset)))

    def _take_job(self, record: Record, in_hand: InHand) -> "asyncio.Future[None]":
        self._metrics.jobs.inc()
        return self._tasks.create_task(self._admit_job(record, in_hand))

    def _take_resume(self, record: Record, in_hand: InHand) -> "asyncio.Future[None]":
        return self._tasks.create_task(self._admit_resume(record, in_hand))

    async def _admit_job(self, record: Record, in_hand: InHand) -> None:
        try:
            job = read_job(record, default_deadline_s=self._default_deadline_s)
        except RequestError as error:
            job = unreadable_job(record, default_deadline_s=self._default_deadline_s)
            await self._refuse(in_hand, job, None, error)
            return
        admitted = await self._admit(in_hand, job)
        if admitted is None:
            return
        self._metrics.unknown_fields.inc(len(admitted.unknown_fields))
        in_hand.num_open_choices = admitted.spec.n
        for choice in range(admitted.spec.n):
            self._wait(Waiting(in_hand, admitted, choice, 1, admitted.prompt_ids[:0], self._clock_s()))

    async def _admit_resume(self, record: Record, in_hand: InHand) -> None:
        try:
            resume = RESUME_DECODER.decode(record.value)
        except UndecodableMessage as error:
            self._log.error("resume record ignored", error=str(error), offset=record.offset)
            self._done(in_hand)
            return
        job_record = await self._look_up(resume)
        job = read_job(job_record, default_deadline_s=self._default_deadline_s)
        admitted = await self._admit(in_hand, job)
        if admitted is not None:
            self._wait(Waiting(in_hand, admitted, resume.choice, resume.epoch, resume.accepted_ids, self._clock_s()))

    async def _look_up(self, resume: Resume) -> Record:
        """The record of the job, from its place in the log."""
        async with self._lookup_lock:
            await self._lookups.assign({})
            await self._lookups.assign({resume.job.partition: resume.job.offset})
            while True:
                for record in await self._lookups.read(READ_TIMEOUT_S):
                    if request_id_of(record) == resume.request_id:
                        return record

    async def _admit(self, in_hand: InHand, job: Job) -> Admitted | None:
        capacity = capacity_tokens(self._admission.model_name, self._cluster.view)
        try:
            return await asyncio.to_thread(self._admission.admit, job, capacity)
        except RequestError as error:
            await self._refuse(in_hand, job, None, error)
            return None

    def _wait(self, waiting: Waiting) -> None:
        self._backlog.append(waiting)
        self._metrics.backlog.set(len(self._backlog))
        self._backlog_grew.set()

    # Placing

    async def _follow_feeds_for_ever(self) -> None:
        while True:
            try:
                await self._cluster.refresh()
                await self._cluster.follow_feeds()
            except StateUnavailable as error:
                self._log.warning("workers not seen", error=str(error))
            await asyncio.sleep(FEED_INTERVAL_S)

    async def _place_for_ever(self) -> None:
        """Place the head of the backlog, then the next: nobody overtakes."""
        while True:
            await self._backlog_grew.wait()
            while self._backlog:
                waiting = self._backlog[0]
                if await self._settle(waiting):
                    self._backlog.popleft()
                    self._metrics.backlog.set(len(self._backlog))
                else:
                    await asyncio.sleep(ROOM_POLL_S)
            self._backlog_grew.clear()

    async def _settle(self, waiting: Waiting) -> bool:
        """Place, refuse or expire the choice; False: there is no room for it now."""
        job = waiting.admitted.job
        if self._clock_s() >= job.deadline_s:
            self._spawn_cut(waiting, FinishReason.EXPIRED, "deadline", deadline_error(job))
            return True
        try:
            view = await self._cluster.refresh()
            request = self._request_view(waiting)
            decision = place(request, view, self._cluster.holders, tie_break=self._num_placed)
            match decision:
                case NoRoomNow():
                    return False
                case NeverFits():
                    error = ContextTooLong(
                        f"prompt and answer have up to {request.num_tokens + request.max_new_tokens} tokens, "
                        f"the workers' pages hold {decision.limit_tokens}",
                        param="max_tokens",
                    )
                    self._spawn_cut(waiting, FinishReason.REJECTED, "never fits", error_body(error))
                    return True
                case Chosen():
                    placement = await self._take_credits(waiting, decision)
        except StateUnavailable as error:
            self._log.warning("placement waits for the state", error=str(error))
            await asyncio.sleep(STATE_RETRY_S)
            return False
        if placement is None:
            return False
        self._num_placed += 1
        self._metrics.placed.inc()
        self._tasks.create_task(self._dispatch(waiting, placement))
        return True

    def _request_view(self, waiting: Waiting) -> RequestView:
        admitted, ids = waiting.admitted, waiting.ids
        fingerprint = self._cluster.fingerprints.get(admitted.spec.model, "")
        return RequestView(
            request_id=admitted.job.request_id,
            choice=waiting.choice,
            model=admitted.spec.model,
            num_tokens=len(ids),
            max_new_tokens=admitted.sampling.max_tokens - len(waiting.accepted_ids),
            blocks=tuple(hash_chain(root_hash(fingerprint, admitted.job.tenant), ids)),
        )

    async def _take_credits(self, waiting: Waiting, chosen: Chosen) -> Placement | None:
        job = waiting.admitted.job
        return await self._state.place(
            PlacementKey(job.request_id, waiting.choice, waiting.epoch),
            Placement(self._new_placement_id(), chosen.prefill, chosen.decode),
            num_prefill_pages=chosen.num_prefill_pages,
            num_decode_pages=chosen.num_decode_pages,
            keep_ms=max(int((job.deadline_s - self._clock_s()) * 1000), keys.LEASE_MS),
        )

    async def _dispatch(self, waiting: Waiting, placement: Placement) -> None:
        """Work record, then `open`, each acknowledged: an `open` always stands for work that is on its way."""
        admitted, job = waiting.admitted, waiting.admitted.job
        placed_s = self._clock_s()
        assignment = Assignment(
            request_id=job.request_id,
            choice=waiting.choice,
            epoch=waiting.epoch,
            placement=placement.id,
            prompt_len=len(admitted.prompt_ids),
            sampling=admitted.sampling,
            deadline_s=job.deadline_s,
            stop_strings=admitted.spec.stop,
            cache_salt=job.tenant,
        )
        work = PrefillWork(assignment, waiting.ids, placement.prefill, placement.decode)
        await self._producer.send(PREFILL.name, placement.prefill.slot, encode(work))
        opening = Open(
            request_id=job.request_id,
            choice=waiting.choice,
            epoch=waiting.epoch,
            placement=placement.id,
            prefill=placement.prefill,
            decode=placement.decode,
            view=request_view_of(waiting) if waiting.epoch == 1 else None,
            stamps={Event.PLACED: placed_s},
        )
        await self._tell_story(opening, job)
        self._metrics.place_seconds.observe(self._clock_s() - waiting.admitted_s)
        self._done(waiting.record)

    async def _tell_story(self, message: Open | Cut, job: Job) -> None:
        """Write to the request's partition; where a story begins is noted for edges that do not read it."""
        partition = partition_of(message.request_id)
        offset = await self._producer.send(STREAM_OUT.name, partition, encode(message))
        if message.view is None:
            return
        keep_s = max(job.deadline_s - self._clock_s(), 0) + HINT_KEEP_S
        try:
            await self._state.note_request(
                message.request_id, RequestHint(partition, offset), keep_ms=int(keep_s * 1000)
            )
        except StateUnavailable as error:
            self._log.warning("request not noted; other edges search the log for it", error=str(error))

    # Ending what was not placed

    async def _refuse(self, in_hand: InHand, job: Job, waiting: Waiting | None, error: RequestError) -> None:
        self._metrics.rejected.labels(error.code or error.type).inc()
        if error.dead_letter and job.edge is None:
            await self._bury(in_hand, job, error)
        await self._cut(job, waiting, FinishReason.REJECTED, "refused", error_body(error))
        self._log.info("refused", request_id=job.request_id, tenant=job.tenant, param=error.param, code=error.code)
        self._done(in_hand)

    def _spawn_cut(self, waiting: Waiting, outcome: FinishReason, reason: str, error: ErrorBody) -> None:
        async def cut_and_finish() -> None:
            await self._cut(waiting.admitted.job, waiting, outcome, reason, error)
            self._done(waiting.record)

        self._tasks.create_task(cut_and_finish())

    async def _cut(
        self, job: Job, waiting: Waiting | None, outcome: FinishReason, reason: str, error: ErrorBody
    ) -> None:
        choice, epoch = (waiting.choice, waiting.epoch) if waiting else (0, 1)
        view = refused_view(job) if waiting is None else request_view_of(waiting)
        cut = Cut(job.request_id, choice, epoch + 1, reason, outcome, error, view if epoch == 1 else None)
        await self._tell_story(cut, job)

    async def _bury(self, in_hand: InHand, job: Job, error: RequestError) -> None:
        """Keep the original bytes where an operator finds them."""
        headers = (
            (HEADER_ERROR, error.message.encode()),
            (HEADER_SOURCE_TOPIC, in_hand.topic.encode()),
            (HEADER_SOURCE_PARTITION, str(in_hand.position.partition).encode()),
            (HEADER_SOURCE_OFFSET, str(in_hand.position.offset).encode()),
        )
        await self._producer.send(
            DEAD_LETTER.name,
            in_hand.position.partition,
            job.body,
            key=job.request_id.encode(),
            headers=headers,
        )

    def _done(self, in_hand: InHand) -> None:
        in_hand.num_open_choices -= 1
        if in_hand.num_open_choices <= 0:
            self._low_water[in_hand.topic, in_hand.position.partition].end(in_hand.position.offset)
            self._in_hand.release()


def error_body(error: RequestError) -> ErrorBody:
    """A refusal as it travels."""
    return ErrorBody(
        message=error.message,
        type=error.type,
        http_status=error.http_status,
        param=error.param,
        code=error.code,
        retry_after_s=error.retry_after_s,
    )


def deadline_error(job: Job) -> ErrorBody:
    """The deadline passed before there was room."""
    return ErrorBody(
        message=f"not placed within {job.deadline_s - job.accepted_s:.0f} s, the deadline",
        type="server_error",
        http_status=504,
        code="deadline_exceeded",
    )


def request_view_of(waiting: Waiting) -> View:
    """What readers of the log must know of an admitted request."""
    admitted, job = waiting.admitted, waiting.admitted.job
    return View(
        tenant=job.tenant,
        model=admitted.spec.model,
        body_hash=body_hash(job.body),
        chat=admitted.spec.chat,
        num_choices=admitted.spec.n,
        num_prompt_tokens=len(admitted.prompt_ids),
        deadline_s=job.deadline_s,
        job=job.position,
        stop_strings=admitted.spec.stop,
        sampling=admitted.sampling,
        include_usage=admitted.spec.include_usage,
        edge=job.edge,
        traceparent=job.traceparent,
        stamps={Event.ACCEPTED: job.accepted_s, Event.ADMITTED: waiting.admitted_s},
    )


def refused_view(job: Job) -> View:
    """What is known of a job that was refused at the door."""
    return View(
        tenant=job.tenant,
        model="",
        body_hash=body_hash(job.body),
        chat=False,
        num_choices=1,
        num_prompt_tokens=0,
        deadline_s=job.deadline_s,
        job=job.position,
        edge=job.edge,
        traceparent=job.traceparent,
        stamps={Event.ACCEPTED: job.accepted_s},
    )
