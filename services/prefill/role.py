"""The prefill role: take work → compute → publish the first token → hand the KV over to the decode worker."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from shared.blocks import token_ids
from shared.engine.port import EngineRequest, TokenOutput
from shared.request import Event, PlacementId, Stamps
from shared.text.stream import TextStream
from shared.transfer.port import Outcome
from shared.wire.codec import encode
from shared.wire.to_stream_out import FrameEntry
from shared.wire.to_worker import Assignment, DecodeWork, PrefillWork, Stop
from shared.wire.topics import DECODE
from shared.worker.engine_thread import Step
from shared.worker.entries import failed_entry, finished_stamps, token_entry
from shared.worker.role import Remembered, WorkerContext

SECRET_BYTES = 16


class Stage(Enum):
    """Where a prefill stands.

    COMPUTING ──> HANDING_OVER ──> OFFERED ──> (gone)
    a stop leads from each straight to gone; one that meets HANDING_OVER is acted on at the next await's end
    """

    COMPUTING = auto()
    HANDING_OVER = auto()
    OFFERED = auto()


@dataclass(slots=True)
class Prefill:
    """One placement on this worker."""

    work: PrefillWork
    stamps: Stamps
    stage: Stage = Stage.COMPUTING
    stopped: bool = False


class PrefillRole:
    """Decides what this worker does with prefill work and with the tokens of its steps.

    Args:
        hold_s: seconds for which KV waits for its decode worker.
    """

    def __init__(self, context: WorkerContext, *, hold_s: float) -> None:
        self._context = context
        self._hold_s = hold_s
        self._prefills: dict[PlacementId, Prefill] = {}
        self._seen = Remembered()

    def take(self, message: PrefillWork | DecodeWork | Stop) -> None:
        match message:
            case PrefillWork():
                self._start(message)
            case Stop():
                self._stop(message.placement)
            case DecodeWork():
                self._context.log.error("decode work on a prefill worker", placement=message.assignment.placement)

    def unfinished(self) -> Sequence[Assignment]:
        return [prefill.work.assignment for prefill in self._prefills.values() if prefill.stage is not Stage.OFFERED]

    async def handle(self, step: Step) -> None:
        for key in step.output.started:
            prefill = self._prefills.get(PlacementId(key))
            if prefill is not None:
                prefill.stamps.setdefault(Event.PREFILLING, step.started_s)
        for token in step.output.tokens:
            prefill = self._prefills.get(PlacementId(token.key))
            if prefill is not None:
                prefill.stage = Stage.HANDING_OVER
                prefill.stamps[Event.FIRST_TOKEN] = step.ended_s
                self._context.tasks.create_task(self._publish(prefill, token, step.ended_s))

    def _start(self, work: PrefillWork) -> None:
        assignment = work.assignment
        if not self._seen.add(assignment.placement):
            return
        if assignment.deadline_s <= self._context.clock_s():
            self._context.credits.give_back(assignment.placement, work.target, work.decode)
            return
        prefill = self._prefills[assignment.placement] = Prefill(work, stamps={})
        request = EngineRequest(
            key=assignment.placement,
            ids=work.ids,
            prompt_len=assignment.prompt_len,
            sampling=assignment.sampling,
            choice=assignment.choice,
            cache_salt=assignment.cache_salt,
            hold_kv=True,
        )
        added = self._context.engine.call(lambda engine: engine.add(request))
        self._context.tasks.create_task(self._fail_if_refused(prefill, added))

    async def _fail_if_refused(self, prefill: Prefill, added: asyncio.Future[None]) -> None:
        try:
            await added
        except ValueError as error:
            work = prefill.work
            index = len(work.ids) - work.assignment.prompt_len
            await self._end(prefill, failed_entry(work.assignment, index, str(error)), self._context.clock_s())

    def _stop(self, placement: PlacementId) -> None:
        self._seen.add(placement)
        self._context.credits.give_back(placement, self._context.me)
        prefill = self._prefills.get(placement)
        if prefill is None:
            return
        prefill.stopped = True
        if prefill.stage is Stage.COMPUTING:
            self._drop(prefill)
        elif prefill.stage is Stage.OFFERED:
            self._context.transfer.withdraw(placement)

    async def _publish(self, prefill: Prefill, token: TokenOutput, made_s: float) -> None:
        """Write the first token; once that stands in the log, hand over, unless the token was the last."""
        stop = self._matched_stop(prefill.work, token)
        entry = token_entry(prefill.work.assignment, token, stop=stop, stamps=prefill.stamps)
        if entry.finish is not None:
            await self._end(prefill, entry, made_s)
            return
        await self._context.frames.send(entry, made_s)
        if prefill.stopped:
            self._drop(prefill)
        else:
            await self._hand_over(prefill, token)

    def _matched_stop(self, work: PrefillWork, token: TokenOutput) -> str | None:
        assignment = work.assignment
        if not assignment.stop_strings or token.token_id < 0:
            return None
        text = TextStream.of_choice(self._context.tokeniser, assignment.stop_strings, assignment.sampling)
        text.push(work.ids[assignment.prompt_len :])
        return text.push((token.token_id,)).stopped

    async def _end(self, prefill: Prefill, entry: FrameEntry, made_s: float) -> None:
        """The choice ended here: no ticket, and neither worker keeps anything of it."""
        stamps = finished_stamps(prefill.stamps, made_s)
        await self._context.frames.send(replace(entry, stamps=stamps), made_s)
        self._drop(prefill)
        self._context.credits.give_back(entry.placement, prefill.work.decode)

    async def _hand_over(self, prefill: Prefill, token: TokenOutput) -> None:
        work = prefill.work
        placement = work.assignment.placement
        prefill.stage = Stage.OFFERED
        ticket = self._context.transfer.offer(
            placement,
            token.held_pages,
            num_tokens=len(work.ids),
            secret=self._context.random_bytes(SECRET_BYTES),
            puller=work.decode.incarnation,
            hold_s=self._hold_s,
            on_end=lambda outcome: self._offer_ended(prefill, outcome),
        )
        ids = work.ids + token_ids((token.token_id,))
        await self._context.handoff.send(
            DECODE.name, work.decode.slot, encode(DecodeWork(work.assignment, ids, work.decode, ticket))
        )

    def _offer_ended(self, prefill: Prefill, outcome: Outcome) -> None:
        self._context.metrics.holds_ended.labels(self._context.metrics.model_name, outcome.value).inc()
        self._drop(prefill)

    def _drop(self, prefill: Prefill) -> None:
        """Free all that this worker has of the placement."""
        placement = prefill.work.assignment.placement
        self._prefills.pop(placement, None)
        self._context.engine.call(lambda engine: engine.abort(placement))
        self._context.credits.give_back(placement, self._context.me)
