"""What ingest writes about a request: its work record and `open`, or the cut that ends it before there was any."""

from collections.abc import Callable

from services.ingest.jobs import Job
from services.ingest.wire_loss import WireLoss
from services.ingest.work import InHand, Placed, Waiting
from shared.bus.dead_letter import dead_letter
from shared.bus.port import Producer
from shared.errors import RequestError
from shared.observe.log import Logger
from shared.request import Event, FinishReason, partition_of
from shared.state.port import Placement, RequestHint, State, StateUnavailable
from shared.wire.codec import encode
from shared.wire.explanation import Explanation
from shared.wire.to_ingest import Resume, body_hash
from shared.wire.to_stream_out import Cut, CutOutcome, ErrorBody, Open, View
from shared.wire.to_worker import Assignment, LocalWork, PrefillWork
from shared.wire.topics import DEAD_LETTER, DECODE, PREFILL, STREAM_OUT, Topic
from shared.wire.wire_format import WireFormat

HINT_KEEP_S = 3600
"""A request can be found by its id for this long after its deadline."""


UNKNOWN = Explanation("this placement stood already; whoever made it did not live to say why", 0)


class StoryWriter:
    """Writes to workers' slots, to requests' partitions and to `dead-letter`."""

    def __init__(
        self, producer: Producer, state: State, wire_loss: WireLoss, clock_s: Callable[[], float], log: Logger
    ) -> None:
        self._producer = producer
        self._state = state
        self._wire_loss = wire_loss
        self._clock_s = clock_s
        self._log = log

    async def dispatch(self, waiting: Waiting, placed: Placed) -> None:
        """Work record, then `open`, each acknowledged: an `open` always stands for work that is on its way."""
        job, placement = waiting.admitted.job, placed.placement
        placed_s = self._clock_s()
        explanation = UNKNOWN if placed.chosen is None else placed.chosen.explain().brief()
        topic, work = work_of(waiting, placed, self._wire_loss.allowed(job.tenant))
        await self._producer.send(topic.name, work.target.slot, encode(work))
        await self._tell(
            job,
            Open(
                request_id=job.request_id,
                choice=waiting.choice,
                epoch=waiting.epoch,
                placement=placement.id,
                prefill=placement.prefill,
                decode=placement.decode,
                view=view_of(waiting) if waiting.epoch == 1 else None,
                stamps={Event.PLACED: placed_s},
                explanation=explanation,
            ),
        )
        self._log.info(
            "placed",
            request_id=job.request_id,
            choice=waiting.choice,
            epoch=waiting.epoch,
            prefill=placement.prefill.slot,
            decode=placement.decode.slot,
            **explanation.members(),
        )

    async def refuse(self, job: Job, in_hand: InHand, error: RequestError) -> None:
        """End a job that was not admitted; what no edge waits for is kept on `dead-letter` too."""
        if error.dead_letter and job.edge is None:
            await self._bury(job, in_hand, error)
        cut = Cut(job.request_id, 0, 2, "refused", FinishReason.REJECTED, error_body(error), refused_view(job))
        await self._tell(job, cut)

    async def end(self, waiting: Waiting, outcome: CutOutcome, reason: str, error: ErrorBody) -> None:
        """End an admitted choice that is not placed."""
        job = waiting.admitted.job
        view = view_of(waiting) if waiting.epoch == 1 else None
        await self._tell(job, Cut(job.request_id, waiting.choice, waiting.epoch + 1, reason, outcome, error, view))

    async def give_up(self, resume: Resume, error: RequestError) -> None:
        """End a choice that cannot be placed again."""
        cut = Cut(
            resume.request_id,
            resume.choice,
            resume.epoch + 1,
            "not placed again",
            FinishReason.FAILED,
            error_body(error),
        )
        await self._producer.send(STREAM_OUT.name, partition_of(cut.request_id), encode(cut))

    async def _tell(self, job: Job, message: Open | Cut) -> None:
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

    async def _bury(self, job: Job, in_hand: InHand, error: RequestError) -> None:
        """Keep the original bytes where an operator finds them."""
        letter = dead_letter(
            job.request_id,
            job.body,
            topic=in_hand.topic,
            position=in_hand.position,
            tenant=job.tenant,
            error=error.message,
        )
        await self._producer.send(
            DEAD_LETTER.name, letter.partition, letter.value, key=letter.key, headers=letter.headers
        )


def work_of(waiting: Waiting, placed: Placed, max_wire_loss: WireFormat) -> tuple[Topic, PrefillWork | LocalWork]:
    """The first worker's part, and where that worker reads it. One worker alone has nobody to hand it to."""
    placement = placed.placement
    given = assignment(waiting, placement, max_wire_loss)
    if placement.prefill == placement.decode:
        return DECODE, LocalWork(given, waiting.ids, placement.decode, placed.fetch)
    return PREFILL, PrefillWork(given, waiting.ids, placement.prefill, placement.decode, placed.fetch)


def assignment(waiting: Waiting, placement: Placement, max_wire_loss: WireFormat) -> Assignment:
    """What both workers must know."""
    admitted, job = waiting.admitted, waiting.admitted.job
    return Assignment(
        request_id=job.request_id,
        choice=waiting.choice,
        epoch=waiting.epoch,
        placement=placement.id,
        prompt_len=len(admitted.prompt_ids),
        sampling=admitted.sampling,
        deadline_s=job.deadline_s,
        stop_strings=admitted.spec.stop,
        cache_salt=admitted.cache_salt,
        max_wire_loss=max_wire_loss,
    )


def view_of(waiting: Waiting) -> View:
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
