"""The prefill role: take work → tell decode at the first chunk → publish the first token → hand it on."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from services.prefill.rate import PrefillRate
from shared.engine.port import EngineRequest, TokenOutput
from shared.kv.progress import Chunk, KvProgress
from shared.request import Event, FinishReason, PlacementId, Stamps
from shared.transfer.port import Outcome
from shared.wire.codec import encode
from shared.wire.to_stream_out import FrameEntry
from shared.wire.to_worker import (
    Assignment,
    DecodeWork,
    FirstToken,
    LocalWork,
    PrefillWork,
    Stop,
    ToDecode,
    ToPrefill,
)
from shared.wire.topics import DECODE
from shared.worker.answers import end_of, text_of
from shared.worker.engine_thread import Step
from shared.worker.entries import end_entry, failed_entry, finished_stamps, token_entry
from shared.worker.prefixes import Prefixes
from shared.worker.role import Remembered, WorkerContext

SECRET_BYTES = 16


class Stage(Enum):
    """Where a prefill stands.

    COMPUTING ── first token ──> PUBLISHING ── frame and `FirstToken` in the log ──> HANDED_ON
        │                             │
        └──── refused, stopped ───────┴──── the choice ends with the token, stopped ───> ENDED

    Beside that its KV is on offer, from the first chunk on. It is gone, and its pages are freed, when it is HANDED_ON
    or ENDED and the offer has ended too, whichever comes first.
    """

    COMPUTING = auto()
    PUBLISHING = auto()
    HANDED_ON = auto()
    ENDED = auto()


TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.COMPUTING: frozenset({Stage.PUBLISHING, Stage.ENDED}),
    Stage.PUBLISHING: frozenset({Stage.HANDED_ON, Stage.ENDED}),
    Stage.HANDED_ON: frozenset(),
    Stage.ENDED: frozenset(),
}


@dataclass(slots=True)
class Prefill:
    """One placement on this worker.

    Attributes:
        stamps: passed and not published yet.
        is_offered: decode may be reading its pages.
        progress: what of its KV is computed; None before the first chunk, and where decode has no part in it.
        ticket_sent: done when the ticket stands in decode's partition; None as `progress`.
    """

    work: PrefillWork
    stamps: Stamps
    stage: Stage = Stage.COMPUTING
    is_offered: bool = False
    progress: KvProgress | None = None
    ticket_sent: asyncio.Task[int] | None = None

    @property
    def placement(self) -> PlacementId:
        return self.work.assignment.placement

    def move(self, stage: Stage) -> None:
        assert stage in TRANSITIONS[self.stage], f"a prefill does not go from {self.stage.name} to {stage.name}"
        self.stage = stage


class PrefillRole:
    """Decides what this worker does with prefill work, with the chunks it computes and with the tokens of its steps.

    Args:
        hold_s: seconds for which KV that is complete waits for its decode worker.
    """

    def __init__(self, context: WorkerContext, *, hold_s: float) -> None:
        self._context = context
        self._hold_s = hold_s
        self._prefills: dict[PlacementId, Prefill] = {}
        self._seen = Remembered()
        self._prefixes = Prefixes(context)
        self._rate = PrefillRate()
        self._loop = asyncio.get_running_loop()
        self._launches: deque[tuple[Prefill, Chunk, tuple[int, ...]]] = deque()  # filled on the engine's thread
        self._engine_launched = asyncio.Event()
        context.tasks.create_task(self._follow_launches())

    def take(self, message: ToPrefill | ToDecode) -> None:
        match message:
            case PrefillWork():
                self._start(message)
            case Stop():
                self._stop(message.placement)
            case DecodeWork() | LocalWork() | FirstToken():
                kind = type(message).__name__  # what stands in it is none of the log's business
                self._context.log.error("a message to decode came to a prefill worker", kind=kind)

    def unfinished(self) -> Sequence[Assignment]:
        left = (Stage.COMPUTING, Stage.PUBLISHING)
        return [prefill.work.assignment for prefill in self._prefills.values() if prefill.stage in left]

    async def handle(self, step: Step) -> None:
        self._take_launches()  # what was launched before the step's tokens were made
        self._rate.add(step.output.num_batch_tokens, step.ended_s - step.started_s)
        for key in step.output.started:
            prefill = self._prefills.get(PlacementId(key))
            if prefill is not None:
                prefill.stamps.setdefault(Event.PREFILLING, step.started_s)
        for token in step.output.tokens:
            prefill = self._prefills.get(PlacementId(token.key))
            if prefill is not None and prefill.stage is Stage.COMPUTING:
                self._take_token(prefill, token, step.ended_s)

    def _start(self, work: PrefillWork) -> None:
        assignment = work.assignment
        if not self._seen.add(assignment.placement):
            return
        if assignment.deadline_s <= self._context.clock_s():
            self._context.credits.give_back(assignment.placement, work.target, work.decode)
            return
        prefill = self._prefills[assignment.placement] = Prefill(work, stamps={})
        if (end := end_of(self._context.tokeniser, assignment, work.ids)) is not None:
            self._context.tasks.create_task(self._publish_end(prefill, *end))
            return
        num_made = len(work.ids) - assignment.prompt_len
        ends_here = num_made + 1 >= assignment.sampling.max_tokens
        request = EngineRequest(
            key=assignment.placement,
            ids=work.ids,
            prompt_len=assignment.prompt_len,
            sampling=assignment.sampling,
            choice=assignment.choice,
            cache_salt=assignment.cache_salt,
            hold_kv=True,
            on_chunk=None if ends_here else lambda chunk, pages: self._on_chunk(prefill, chunk, pages),
        )
        added = self._prefixes.add(request, work.fetch)
        self._context.tasks.create_task(self._fail_if_refused(prefill, added))

    async def _fail_if_refused(self, prefill: Prefill, added: asyncio.Future[Any]) -> None:
        try:
            await added
        except ValueError as error:
            work, now_s = prefill.work, self._context.clock_s()
            index = len(work.ids) - work.assignment.prompt_len
            await self._write(prefill, failed_entry(work.assignment, index, str(error)), now_s)
            self._end(prefill)

    def _stop(self, placement: PlacementId) -> None:
        self._seen.add(placement)
        self._context.credits.give_back(placement, self._context.me)
        prefill = self._prefills.get(placement)
        if prefill is None:
            return
        if prefill.stage is Stage.HANDED_ON:
            self._context.transfer.withdraw(placement)
        else:
            self._end(prefill)

    # Its KV, chunk by chunk

    def _on_chunk(self, prefill: Prefill, chunk: Chunk, pages: tuple[int, ...]) -> None:
        """Runs on the engine's thread."""
        self._launches.append((prefill, chunk, pages))
        self._loop.call_soon_threadsafe(self._engine_launched.set)

    async def _follow_launches(self) -> None:
        while True:
            await self._engine_launched.wait()
            self._engine_launched.clear()
            self._take_launches()

    def _take_launches(self) -> None:
        while self._launches:
            self._launched(*self._launches.popleft())

    def _launched(self, prefill: Prefill, chunk: Chunk, pages: tuple[int, ...]) -> None:
        """The engine computes `chunk` now; with the first one decode can begin to pull."""
        if prefill.stage is not Stage.COMPUTING:
            return
        is_first = prefill.progress is None
        if prefill.progress is None:
            prefill.progress = KvProgress(len(prefill.work.ids), tokens_per_s=self._rate.tokens_per_s)
        prefill.progress.launched(chunk)
        if is_first:
            self._offer(prefill, prefill.progress, pages)

    def _offer(self, prefill: Prefill, progress: KvProgress, pages: tuple[int, ...]) -> None:
        work = prefill.work
        ticket = self._context.transfer.offer(
            prefill.placement,
            pages,
            num_tokens=len(work.ids),
            secret=self._context.random_bytes(SECRET_BYTES),
            puller=work.decode.incarnation,
            hold_s=self._hold_s,
            on_end=lambda outcome: self._offer_ended(prefill, outcome),
            progress=progress,
            max_loss=work.assignment.max_wire_loss,
        )
        prefill.is_offered = True
        prefill.ticket_sent = self._context.tasks.create_task(
            self._tell_decode(prefill, DecodeWork(work.assignment, work.ids, work.decode, ticket))
        )

    def _offer_ended(self, prefill: Prefill, outcome: Outcome) -> None:
        self._context.metrics.holds_ended.labels(self._context.metrics.model_name, outcome.value).inc()
        prefill.is_offered = False
        self._drop_if_over(prefill)

    # Its first token

    def _take_token(self, prefill: Prefill, token: TokenOutput, made_s: float) -> None:
        prefill.move(Stage.PUBLISHING)
        self._context.credits.computed(prefill.placement, self._context.me)
        prefill.stamps[Event.FIRST_TOKEN] = made_s
        self._context.tasks.create_task(self._publish(prefill, token, made_s))
        if prefill.progress is not None and token.finish is not FinishReason.FAILED:
            self._loop.call_soon(prefill.progress.complete)  # behind the frame: a client waits for that

    async def _publish(self, prefill: Prefill, token: TokenOutput, made_s: float) -> None:
        """Write the first token; once that stands in the log, hand it on, unless it was the last."""
        stop = self._matched_stop(prefill.work, token)
        entry = token_entry(prefill.work.assignment, token, stop=stop, stamps=prefill.stamps)
        await self._write(prefill, entry, made_s)
        if entry.finish is not None:
            self._end(prefill)
        elif prefill.stage is not Stage.ENDED:
            await self._hand_on(prefill, token.token_id)

    async def _write(self, prefill: Prefill, entry: FrameEntry, made_s: float) -> None:
        if entry.finish is not None:
            entry = replace(entry, stamps=finished_stamps(prefill.stamps, made_s))
        await self._context.frames.send(entry, made_s)

    def _matched_stop(self, work: PrefillWork, token: TokenOutput) -> str | None:
        if not work.assignment.stop_strings or token.token_id < 0:
            return None
        return text_of(self._context.tokeniser, work.assignment, work.ids).push((token.token_id,)).stopped

    async def _publish_end(self, prefill: Prefill, finish: FinishReason, stop_reason: str | int | None) -> None:
        work = prefill.work
        index = len(work.ids) - work.assignment.prompt_len
        await self._write(prefill, end_entry(work.assignment, index, finish, stop_reason), self._context.clock_s())
        self._end(prefill)

    async def _hand_on(self, prefill: Prefill, token_id: int) -> None:
        assert prefill.ticket_sent is not None, "a token was made that does not end the choice, and of no chunk"
        await prefill.ticket_sent
        await self._tell_decode(prefill, FirstToken(prefill.placement, prefill.work.decode, token_id))
        if prefill.stage is not Stage.ENDED:
            prefill.move(Stage.HANDED_ON)
            self._drop_if_over(prefill)

    # The end

    def _end(self, prefill: Prefill) -> None:
        """Neither worker is to go on with it."""
        if prefill.stage is Stage.ENDED:
            return
        prefill.move(Stage.ENDED)
        if prefill.ticket_sent is None:
            self._context.credits.give_back(prefill.placement, prefill.work.decode)
        else:
            self._context.transfer.withdraw(prefill.placement)
            self._context.tasks.create_task(self._stop_decode(prefill, prefill.ticket_sent))
        self._drop_if_over(prefill)

    async def _stop_decode(self, prefill: Prefill, ticket_sent: asyncio.Task[int]) -> None:
        await ticket_sent
        await self._tell_decode(prefill, Stop(prefill.placement, prefill.work.decode))

    async def _tell_decode(self, prefill: Prefill, message: ToDecode) -> int:
        return await self._context.handoff.send(DECODE.name, prefill.work.decode.slot, encode(message))

    def _drop_if_over(self, prefill: Prefill) -> None:
        """Free all that this worker has of a placement that it has nothing more to do for."""
        if prefill.is_offered or prefill.stage in (Stage.COMPUTING, Stage.PUBLISHING):
            return
        placement = prefill.placement
        self._prefills.pop(placement, None)
        self._context.engine.call(lambda engine: engine.abort(placement))
        self._context.credits.give_back(placement, self._context.me)
