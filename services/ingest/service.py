"""The ingest loop: take a job → admit → place → work record → `open` → commit.

    ingest ────────┐
                   ├─ admit (thread) ─> backlog ─> placed ─> work, `open` ─> dealt with ─> low water ─> commit
    ingest-resume ─┘ │       └─ refused: a cut with an outcome, in the request's own partition
           ^         └─ batch beyond what waits in line: put down
           └── its record is read again ┘

Until its `open` stands in the log a request is ingest's; a successor reads it again from the committed offset, and asks
for the same placement. Each partition is leased; two ingests on one partition at once do no harm.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace

from services.ingest.admission import Admission, Admitted
from services.ingest.again import RecordsAgain
from services.ingest.backlog import Backlog, EndedBefore, Expired, Settled
from services.ingest.cluster import Cluster
from services.ingest.ended import OLD_AFTER_S, EndedJobs
from services.ingest.hands import Hands
from services.ingest.jobs import Job, read_job, request_id_of, unreadable_job
from services.ingest.lengths import Lengths
from services.ingest.parked import Parked
from services.ingest.partitions import GROUP, Partitions
from services.ingest.placer import Placer
from services.ingest.results import follow_results
from services.ingest.story import StoryWriter, deadline_error, error_body
from services.ingest.wire_loss import WireLoss
from services.ingest.work import InHand, Placed, Waiting
from shared.bus.port import Bus, BusUnavailable, Reader, Record
from shared.errors import ContextTooLong, RequestError, RequestFailed
from shared.observe.log import Logger
from shared.observe.metrics import IngestMetrics
from shared.policy.placement import NeverFits, Rules, capacity_tokens
from shared.request import FinishReason, Incarnation, PlacementId, Priority
from shared.state import keys
from shared.state.port import State, StateUnavailable
from shared.wire.codec import UndecodableMessage
from shared.wire.to_ingest import RESUME_DECODER, Resume
from shared.wire.topics import INGEST, INGEST_RESUME

READ_TIMEOUT_S = 1.0
COMMIT_INTERVAL_S = 1.0
FEED_INTERVAL_S = 0.25

THRESHOLD_INTERVAL_S = 5.0

VIEW_INTERVAL_S = 0.1
"""The workers are looked at so often, so that a placement need not wait for it."""

LEAVE_TIMEOUT_S = 5.0
"""Records and placements begun before the end get this long."""

MAX_ADMITTED_HERE_BYTES = 8192
"""A larger body is tokenised in a thread; for a smaller one going there and back takes longer than the work."""

MAX_IN_HAND = 16_384
MAX_IN_HAND_BYTES = 256 * 2**20
"""Records of a topic that are dealt with at a time; beyond it the log is the buffer. Choices that lost their workers
have hands of their own: they must not wait behind jobs that wait for room."""

MAX_BATCH_IN_HAND = 1024
MAX_BATCH_IN_HAND_BYTES = 32 * 2**20
"""Batch jobs, which may wait for hours, have hands of their own too. What is beyond these is put down."""

TAKE_UP_INTERVAL_S = 0.05

NUM_LOOKED_UP = 16
"""Records that were put down are looked up so many at a time."""

BATCH = "batch"
"""Names the hands for it."""

Take = Callable[[Record, InHand], Awaitable[None]]
"""Deals with one record."""


class IngestService:
    """One ingest process.

    Args:
        default_deadline_s: for jobs that name none.
        rules: what placements aim at.
        wire_loss: how lossy whose KV may travel.
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
        rules: Rules,
        wire_loss: WireLoss,
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
        self._wire_loss = wire_loss
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._cluster = Cluster(state, metrics, clock_s)
        self._lengths = Lengths(metrics)
        self._ended = EndedJobs(bus, clock_s=clock_s, log=log)
        self._placer = Placer(
            state,
            self._cluster,
            self._lengths,
            rules,
            clock_s=clock_s,
            new_placement_id=new_placement_id,
            metrics=metrics,
        )
        self._backlog = Backlog(
            self._placer,
            self._lengths,
            has_ended=self._ended.has_seen,
            clock_s=clock_s,
            metrics=metrics,
            log=log,
        )
        self._sees_workers = True
        self._num_unread = 0
        self._hands = {topic.name: Hands(MAX_IN_HAND, MAX_IN_HAND_BYTES) for topic in (INGEST, INGEST_RESUME)}
        self._hands[BATCH] = Hands(MAX_BATCH_IN_HAND, MAX_BATCH_IN_HAND_BYTES)
        self._parked = Parked()
        self._again = RecordsAgain(bus, log)
        self._num_looked_up = 0
        self._partitions: Partitions | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    async def ready(self) -> dict[str, bool]:
        """What ingest needs, and whether it is there."""
        return {
            "log": await self._bus.reachable(),
            "state": await self._state.reachable(),
            "partitions": self._partitions is not None and bool(self._partitions.owned),
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; what is in hand then is left to whoever takes the partitions."""
        async with AsyncExitStack() as stack:
            producer = await stack.enter_async_context(self._bus.producer())
            jobs = await stack.enter_async_context(self._bus.reader(INGEST.name, group=GROUP))
            resumes = await stack.enter_async_context(self._bus.reader(INGEST_RESUME.name, group=GROUP))
            self._story = StoryWriter(producer, self._state, self._wire_loss, self._clock_s, self._log)
            readers = {INGEST.name: jobs, INGEST_RESUME.name: resumes}
            partitions = self._partitions = Partitions(
                self._state, self._incarnation, readers, self._forget_parked, self._log, self._clock_s
            )
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            loops = [
                _every(keys.BEAT_INTERVAL_S, partitions.renew),
                _every(COMMIT_INTERVAL_S, partitions.commit),
                _every(keys.BEAT_INTERVAL_S, self._report_backlog),
                _every(VIEW_INTERVAL_S, self._look_at_workers),
                _every(FEED_INTERVAL_S, self._follow_feeds),
                _every(THRESHOLD_INTERVAL_S, self._tell_threshold),
                follow_results(self._bus, self._see_result, self._ended.follows, self._log),
                _every(OLD_AFTER_S, self._ended.look_back),
                self._read_for_ever(jobs, partitions, self._take_job),
                self._read_for_ever(resumes, partitions, self._take_resume),
                _every(TAKE_UP_INTERVAL_S, self._take_up_parked),
                self._place_for_ever(),
            ]
            running = [self._tasks.create_task(loop) for loop in loops]
            await stop.wait()
            for task in running:
                task.cancel()
            await self._end_under_way()
            await partitions.leave()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        """Do something beside the loops."""
        task = self._tasks.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _end_under_way(self) -> None:
        """Let what is under way come to its end, in bounds: the log may be away."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=LEAVE_TIMEOUT_S)
        for task in self._under_way:
            task.cancel()

    # Records

    async def _read_for_ever(self, reader: Reader, partitions: Partitions, take: Take) -> None:
        while True:
            records = await reader.read(READ_TIMEOUT_S)
            # All at once, before anybody waits: what was read under one lease says nothing about the next one.
            begun = [(record, in_hand) for record in records if (in_hand := partitions.begin(record)) is not None]
            self._backlog.pace.join(len(begun))
            for record, in_hand in begun:
                if record.topic == INGEST.name:
                    self._metrics.jobs.inc()
                await self._hands[record.topic].take(in_hand)
                self._begin(self._take_counted(take, record, in_hand))

    async def _take_counted(self, take: Take, record: Record, in_hand: InHand) -> None:
        """Who is not in the backlog yet waits too."""
        try:
            await take(record, in_hand)
        finally:
            self._backlog.pace.leave()

    async def _take_job(self, record: Record, in_hand: InHand) -> None:
        assert self._partitions is not None
        try:
            job = read_job(record, default_deadline_s=self._default_deadline_s)
        except RequestError as error:
            await self._refuse(unreadable_job(record, default_deadline_s=self._default_deadline_s), in_hand, error)
            return
        self._hold(in_hand, job, self._partitions.others_had_since_s(record))
        if job.priority is Priority.BATCH and not self._has_batch_hand(in_hand, job):
            self._parked.add(in_hand, job.tenant, job.deadline_s)
            return
        if await self._ended.has(job):
            self._metrics.jobs_ended_before.inc()
            self._done(in_hand)
            return
        try:
            admitted = await self._admit(job, self._capacity())
            if admitted.spec.max_tokens is None and await self._learn_capacity(job):
                admitted = await self._admit(job, self._capacity())
        except RequestError as error:
            await self._refuse(job, in_hand, error)
            return
        self._metrics.unknown_fields.inc(len(admitted.unknown_fields))
        in_hand.num_open_choices = admitted.spec.n
        no_ids = admitted.prompt_ids[:0]
        for choice in range(admitted.spec.n):
            self._backlog.add(Waiting(in_hand, admitted, choice, 1, no_ids, self._clock_s()))

    async def _take_resume(self, record: Record, in_hand: InHand) -> None:
        try:
            resume = RESUME_DECODER.decode(record.value)
        except UndecodableMessage as error:
            self._metrics.undecodable.inc()
            self._log.error("resume record ignored", error=str(error), offset=record.offset)
            self._done(in_hand)
            return
        try:
            job = read_job(await self._look_up(resume), default_deadline_s=self._default_deadline_s)
            self._hold(in_hand, job)
            admitted = await self._admit(job, None)
        except RequestError as error:
            self._log.error("not placed again", request_id=resume.request_id, epoch=resume.epoch, error=error.message)
            await self._story.give_up(resume, error)
            self._done(in_hand)
            return
        # What it was admitted with: the workers that are there now may hold more or less.
        admitted = replace(admitted, sampling=replace(admitted.sampling, max_tokens=resume.max_tokens))
        self._backlog.add(Waiting(in_hand, admitted, resume.choice, resume.epoch, resume.accepted_ids, self._clock_s()))

    async def _look_up(self, resume: Resume) -> Record:
        """The record of the job, from its place in the log. Raises RequestFailed if it is not there."""
        wanted = resume.job
        record = await self._again.at(INGEST.name, wanted)
        if record is None or request_id_of(record) != resume.request_id:
            raise RequestFailed(
                f"the job is gone from {INGEST.name}, partition {wanted.partition} offset {wanted.offset}"
            )
        return record

    def _hold(self, in_hand: InHand, job: Job, others_had_since_s: float | None = None) -> None:
        """The record's job is in hand from now on, until `_done`."""
        if in_hand.request_id is None:
            in_hand.request_id = job.request_id
            self._ended.hold(job, others_had_since_s)

    def _hands_for(self, in_hand: InHand) -> Hands:
        return self._hands[BATCH if in_hand.is_batch else in_hand.topic]

    def _done(self, in_hand: InHand) -> None:
        """One of the record's choices is dispatched or refused; after the last the record is dealt with."""
        assert self._partitions is not None
        in_hand.num_open_choices -= 1
        if in_hand.num_open_choices <= 0:
            self._partitions.end(in_hand)
            self._hands_for(in_hand).give_back(in_hand)
            self._let_go(in_hand)

    def _let_go(self, in_hand: InHand) -> None:
        if in_hand.request_id is not None:
            self._ended.let_go(in_hand.request_id)

    # Batch jobs beyond those that wait in line

    def _has_batch_hand(self, in_hand: InHand, job: Job) -> bool:
        """Whether a batch job has one of the hands for such, or gets one now; in any case it needs no other."""
        if in_hand.is_batch:
            return True
        self._hands[in_hand.topic].give_back(in_hand)
        in_hand.is_batch = True
        if self._hands[BATCH].full and self._clock_s() < job.deadline_s:
            return False
        self._hands[BATCH].add(in_hand)
        return True

    async def _take_up_parked(self) -> None:
        """Take up whose turn it is of the records that were put down, here or by whoever had the partitions."""
        assert self._partitions is not None
        for in_hand in self._partitions.take_left():
            self._parked.add(in_hand, "", 0.0)
        self._metrics.parked.set(len(self._parked))
        while self._num_looked_up < NUM_LOOKED_UP:
            in_hand = self._parked.take(self._clock_s(), room=not self._hands[BATCH].full)
            if in_hand is None:
                break
            if in_hand.position.partition not in self._partitions.owned:
                self._let_go(in_hand)  # its new owner's
                continue
            self._hands_for(in_hand).add(in_hand)
            self._num_looked_up += 1
            self._begin(self._take_up(in_hand))

    def _forget_parked(self, lost: frozenset[int]) -> None:
        for in_hand in self._parked.drop(lost):
            self._let_go(in_hand)

    async def _take_up(self, in_hand: InHand) -> None:
        try:
            record = await self._again.at(in_hand.topic, in_hand.position)
        finally:
            self._num_looked_up -= 1
        if record is None:
            self._log.error("record gone from the log", topic=in_hand.topic, position=in_hand.position)
            self._done(in_hand)
            return
        take = self._take_job if in_hand.topic == INGEST.name else self._take_resume
        await take(record, in_hand)

    # Admission

    async def _admit(self, job: Job, capacity: int | None) -> Admitted:
        """Raises RequestError, for a defect of ours too: it ends one job, or the service would fail on it for ever."""
        try:
            if len(job.body) <= MAX_ADMITTED_HERE_BYTES:
                return self._admission.admit(job, capacity)
            return await asyncio.to_thread(self._admission.admit, job, capacity)
        except RequestError:
            raise
        except Exception as error:
            self._log.exception("admission failed", request_id=job.request_id)
            raise RequestFailed("the request failed here; nothing was wrong with it") from error

    def _capacity(self) -> int | None:
        return capacity_tokens(self._admission.model_name, self._cluster.view)

    async def _learn_capacity(self, job: Job) -> bool:
        """Wait for workers, where none were known: only they tell how long an answer may get that names no length."""
        if self._capacity() is not None:
            return False
        while self._capacity() is None and self._clock_s() < job.deadline_s:  # noqa: ASYNC110 - a view that is polled
            await asyncio.sleep(FEED_INTERVAL_S)
        return True

    async def _refuse(self, job: Job, in_hand: InHand, error: RequestError) -> None:
        self._metrics.rejected.labels(error.code or error.type).inc()
        self._log.info("refused", request_id=job.request_id, tenant=job.tenant, param=error.param, code=error.code)
        await self._story.refuse(job, in_hand, error)
        self._done(in_hand)

    # Placements

    async def _place_for_ever(self) -> None:
        while True:
            waiting, settled = await self._backlog.next()
            self._begin(self._tell(waiting, settled))

    async def _tell(self, waiting: Waiting, settled: Settled) -> None:
        match settled:
            case Placed():
                await self._story.dispatch(waiting, settled)
                self._metrics.place_seconds.observe(self._clock_s() - waiting.admitted_s)
            case NeverFits():
                error = error_body(_too_long(waiting, settled))
                await self._story.end(waiting, FinishReason.REJECTED, "never fits", error)
            case Expired():
                error = deadline_error(waiting.admitted.job)
                await self._story.end(waiting, FinishReason.EXPIRED, "deadline", error)
            case EndedBefore():
                self._metrics.jobs_ended_before.inc()
        self._done(waiting.record)

    # What is told and seen

    async def _report_backlog(self) -> None:
        """Tell edges how long the line is, and read of the others' lines; all that stands in the log is in hand, unless
        the hands are full."""
        assert self._partitions is not None
        try:
            if self._hands[INGEST.name].full:
                self._num_unread = await self._partitions.num_unread(INGEST.name)
            else:
                self._num_unread = 0
        except BusUnavailable as error:
            self._log.warning("unread jobs not counted", error=str(error))
        try:
            report = self._backlog.report(self._num_unread)
            await self._state.report_backlog(self._incarnation, report, lease_ms=keys.LEASE_MS)
            published = await self._state.backlogs(lease_ms=keys.LEASE_MS)
            self._backlog.note_others([each.report for each in published if each.member != self._incarnation])
        except StateUnavailable as error:
            self._log.warning("backlog not reported", error=str(error))

    async def _tell_threshold(self) -> None:
        threshold = self._placer.local_threshold()
        if threshold is not None:
            self._metrics.local_threshold.set(threshold)

    async def _look_at_workers(self) -> None:
        try:
            await self._cluster.refresh()
        except StateUnavailable as error:
            if self._sees_workers:  # said once, not ten times a second
                self._log.warning("workers not seen", error=str(error))
            self._sees_workers = False
        else:
            self._sees_workers = True

    async def _follow_feeds(self) -> None:
        try:
            await self._cluster.follow_feeds()
        except StateUnavailable as error:
            self._log.warning("block announcements not read", error=str(error))

    def _see_result(self, result: Record) -> None:
        self._ended.see(result)
        self._lengths.learn(result)


async def _every(interval_s: float, do: Callable[[], Awaitable[None]]) -> None:
    while True:
        await do()
        await asyncio.sleep(interval_s)


def _too_long(waiting: Waiting, never: NeverFits) -> ContextTooLong:
    num_tokens = len(waiting.admitted.prompt_ids) + waiting.admitted.sampling.max_tokens
    return ContextTooLong(
        f"prompt and answer have up to {num_tokens} tokens, the workers' pages hold {never.limit_tokens}",
        param="max_tokens",
    )
