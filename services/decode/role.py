"""The decode role: take a ticket, then a token → intake → publish each step's tokens → free the pages at the end.

Where ingest chose so it computes a prompt itself, in chunks beside the running rows, and tells all of its answer.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.decode.intake import Arrival, Ends, Intake, engine_request
from shared.engine.port import TokenOutput
from shared.observe.metrics import LocalPrefill
from shared.request import Event, FinishReason, PlacementId, Stamps, partition_of
from shared.text.stream import TextStream
from shared.wire.codec import encode
from shared.wire.to_stream_out import Cut, FrameEntry
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
from shared.wire.topics import STREAM_OUT
from shared.wire.wire_format import WireFormat
from shared.worker.answers import end_of, text_of
from shared.worker.engine_thread import Step
from shared.worker.entries import end_entry, failed_entry, finished_stamps, token_entry
from shared.worker.prefixes import Prefixes
from shared.worker.role import Remembered, WorkerContext

NO_FIRST_TOKEN = "no first token"
"""Why a placement is cut whose prefill worker is gone."""


@dataclass(slots=True)
class Decoding:
    """One placement in the running batch.

    Attributes:
        text: looks for stop strings, one step behind the engine; None if there are none to look for.
        stamps: passed and not published yet.
        wire_format: in which the KV of its prompt came; NATIVE once that is published.
        awaits_first: this worker computes its prompt, and has made no token behind it yet.
    """

    assignment: Assignment
    text: TextStream | None
    stamps: Stamps
    wire_format: WireFormat = WireFormat.NATIVE
    awaits_first: bool = False


class DecodeRole:
    """Decides what this worker does with tickets and with the tokens of its steps."""

    def __init__(self, context: WorkerContext, *, pull_timeout_s: float) -> None:
        self._context = context
        self._decodings: dict[PlacementId, Decoding] = {}
        self._seen = Remembered()
        self._prefixes = Prefixes(context)
        ends = Ends(arrived=self._arrived, refused=self._refused, given_up=self._given_up)
        self._intake = Intake(context, ends, pull_timeout_s=pull_timeout_s)

    def take(self, message: ToPrefill | ToDecode) -> None:
        match message:
            case DecodeWork():
                self._start(message)
            case LocalWork():
                self._start_local(message)
            case FirstToken():
                if not self._intake.take_token(message):
                    self._context.metrics.ignore("no such placement")
            case Stop():
                self._stop(message.placement)
            case PrefillWork():
                self._context.log.error("prefill work on a decode worker", placement=message.assignment.placement)

    def unfinished(self) -> Sequence[Assignment]:
        waiting = [work.assignment for work in self._intake.arrivals()]
        return [*waiting, *(decoding.assignment for decoding in self._decodings.values())]

    async def handle(self, step: Step) -> None:
        for key in step.output.started:
            decoding = self._decodings.get(PlacementId(key))
            if decoding is not None and decoding.awaits_first:
                decoding.stamps[Event.PREFILLING] = step.started_s
        made = (self._entry(token, step.ended_s) for token in step.output.tokens)
        entries = [entry for entry in made if entry is not None]
        await self._context.frames.post(entries, step.ended_s)
        for entry in entries:
            # A stop may have ended it already, while the log was full.
            if entry.finish is not None and entry.placement in self._decodings:
                self._end(entry.placement)

    def _start(self, work: DecodeWork) -> None:
        if self._is_new(work):
            self._intake.take(work)

    def _is_new(self, work: DecodeWork | LocalWork) -> bool:
        """Whether to begin with it: not a second time, and not behind its deadline."""
        placement = work.assignment.placement
        if not self._seen.add(placement):
            return False
        if work.assignment.deadline_s <= self._context.clock_s():
            self._context.credits.give_back(placement, work.target)
            return False
        return True

    # Prompts that are computed here

    def _start_local(self, work: LocalWork) -> None:
        if not self._is_new(work):
            return
        context, assignment = self._context, work.assignment
        text = text_of(context.tokeniser, assignment, work.ids) if assignment.stop_strings else None
        self._decodings[assignment.placement] = Decoding(assignment, text, stamps={}, awaits_first=True)
        if (end := end_of(context.tokeniser, assignment, work.ids)) is not None:
            context.tasks.create_task(self._publish_end(work, *end))
            return
        context.metrics.count_local_prefill(LocalPrefill.CHOSEN)
        added = self._prefixes.add(engine_request(work), work.fetch)
        context.tasks.create_task(self._fail_if_refused(work, added))

    async def _publish_end(self, work: LocalWork, finish: FinishReason, stop_reason: str | int | None) -> None:
        index = len(work.ids) - work.assignment.prompt_len
        await self._end_with(end_entry(work.assignment, index, finish, stop_reason))

    async def _fail_if_refused(self, work: LocalWork, added: asyncio.Future[Any]) -> None:
        try:
            await added
        except ValueError as error:
            index = len(work.ids) - work.assignment.prompt_len
            await self._end_with(failed_entry(work.assignment, index, str(error)))

    async def _end_with(self, entry: FrameEntry) -> None:
        """Publish the one entry of a placement that the engine never runs."""
        now_s = self._context.clock_s()
        await self._context.frames.send(replace(entry, stamps=finished_stamps(entry.stamps, now_s)), now_s)
        if entry.placement in self._decodings:
            self._end(entry.placement)

    # Whatever runs

    def _stop(self, placement: PlacementId) -> None:
        self._seen.add(placement)
        self._context.credits.give_back(placement, self._context.me)
        if not self._intake.stop(placement) and placement in self._decodings:
            self._end(placement)

    def _arrived(self, arrival: Arrival) -> None:
        work, assignment = arrival.work, arrival.work.assignment
        text = None
        if assignment.stop_strings:
            text = text_of(self._context.tokeniser, assignment, work.ids)
            text.push((arrival.first_token.result(),))
        self._decodings[arrival.key] = Decoding(assignment, text, arrival.stamps, arrival.wire_format)

    def _refused(self, arrival: Arrival, reason: str) -> None:
        """The failure stands behind the first token, whose frame may still be on its way: the fold waits for it."""
        assignment = arrival.work.assignment
        self._decodings.pop(assignment.placement, None)
        index = len(arrival.work.ids) - assignment.prompt_len + 1
        entry = failed_entry(assignment, index, reason)
        self._context.tasks.create_task(self._context.frames.send(entry, self._context.clock_s()))
        self._context.credits.give_back(assignment.placement, self._context.me)

    def _given_up(self, arrival: Arrival) -> None:
        context, assignment = self._context, arrival.work.assignment
        context.log.warning("no first token will come", placement=arrival.key)
        context.credits.give_back(arrival.key, context.me)
        if assignment.deadline_s > context.clock_s():
            # Its owner may see the prefill worker that is gone for this one, and would wait for both.
            cut = Cut(assignment.request_id, assignment.choice, assignment.epoch + 1, NO_FIRST_TOKEN)
            partition = partition_of(cut.request_id)
            context.tasks.create_task(context.handoff.send(STREAM_OUT.name, partition, encode(cut)))

    def _entry(self, token: TokenOutput, made_s: float) -> FrameEntry | None:
        """What to publish of a token; None if its request has ended (the engine was one step ahead)."""
        decoding = self._decodings.get(PlacementId(token.key))
        if decoding is None:
            return None
        stop = decoding.text.push((token.token_id,)).stopped if decoding.text and token.token_id >= 0 else None
        if decoding.awaits_first:
            self._prompt_is_computed(decoding, made_s, goes_on=token.finish is None and stop is None)
        elif Event.TRANSFERRING in decoding.stamps:
            decoding.stamps[Event.DECODING] = made_s
        entry = token_entry(
            decoding.assignment, token, stop=stop, stamps=decoding.stamps, wire_format=decoding.wire_format
        )
        decoding.stamps, decoding.wire_format = {}, WireFormat.NATIVE
        return entry if entry.finish is None else replace(entry, stamps=finished_stamps(entry.stamps, made_s))

    def _prompt_is_computed(self, decoding: Decoding, made_s: float, *, goes_on: bool) -> None:
        decoding.awaits_first = False
        decoding.stamps[Event.FIRST_TOKEN] = made_s
        if goes_on:
            decoding.stamps[Event.DECODING] = made_s
        self._context.credits.computed(decoding.assignment.placement, self._context.me)

    def _end(self, placement: PlacementId) -> None:
        """Free all that this worker has of the placement."""
        del self._decodings[placement]
        freed = self._context.engine.call(lambda engine: engine.abort(placement))
        freed.add_done_callback(lambda _: self._intake.room_changed())
        self._context.credits.give_back(placement, self._context.me)
