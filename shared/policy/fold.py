"""The only reader of `stream-out`: what a request's records, in log order, add up to.

The edge, its successor, the result, the history checker and the simulator all ask this one function, so they agree.
Each choice of a request begins at epoch 1 without a placement. Then, in log order:

1. an `open` counts if its epoch is current and no placement is open;
2. a `cut` counts if its epoch is current + 1: it closes the placement, and with an outcome ends the choice;
3. a `frame` counts if its placement is the open one: what is known already is trimmed, what leaves a gap is held until
   the gap is filled; frames before any `open` of the epoch are held until one decides;
4. the first end wins; all after it is void.

The first `open` says how many choices there are; what is about any other is void. Before it a cut without outcome, by a
worker that drains, is void too: nobody could place again what nobody knows.
A cut with an outcome that comes before the request was seen (no `open`, so the number of choices is unknown) ends the
request as a whole. Whatever turns out void is reported, so that the owner can tell its worker to stop.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.blocks import TokenIds, token_ids
from shared.request import Event, FinishReason, Incarnation, PlacementId, RequestId, Stamps, TokenLogprob, WorkerRef
from shared.wire.to_stream_out import Attach, Cut, Detach, ErrorBody, Frame, FrameEntry, Open, StreamOutMessage, View
from shared.wire.topics import MAX_DEADLINE_S
from shared.wire.wire_format import WireFormat


@dataclass(frozen=True, slots=True)
class End:
    """How a choice ended."""

    finish: FinishReason
    stop_reason: str | int | None = None
    error: ErrorBody | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The first placement of a choice counts: the request is running; `state` has its view."""

    state: "RequestState"
    choice: int


@dataclass(frozen=True, slots=True)
class Grew:
    """The answer of a choice grew by `ids`, the first of which has place `index` in it."""

    state: "RequestState"
    choice: int
    index: int
    ids: TokenIds


@dataclass(frozen=True, slots=True)
class Vacated:
    """A cut closed the placement of a choice that goes on: it is to be placed again, for `epoch`."""

    state: "RequestState"
    choice: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice ended."""

    state: "RequestState"
    choice: int
    end: End


@dataclass(frozen=True, slots=True)
class Finished:
    """The last choice ended: the request has its one end."""

    state: "RequestState"


@dataclass(frozen=True, slots=True)
class Voided:
    """Nobody wants what this worker does for this placement."""

    request_id: RequestId
    placement: PlacementId
    worker: WorkerRef


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker was lost: with it went the placement of `epoch`."""

    worker: WorkerRef
    epoch: int


Change = Opened | Grew | Vacated | Ended | Finished | Voided


@dataclass(slots=True)
class ChoiceState:
    """One choice as the log tells it so far.

    Attributes:
        epoch: the epoch whose placement counts, or is awaited.
        placement: the open one.
        opens: the placements that counted so far, in order.
        decode_began: an entry of its decode worker counted: its prefill worker is not needed any more.
        losses: of workers, since the last token came.
        held: entries that wait for an `open` or for a gap to be filled, by placement.
        logprobs: one per id, if asked for.
        wire_format: the most lossy form in which KV came that any of `ids` was computed from.
    """

    epoch: int = 1
    placement: Open | None = None
    opens: list[Open] = field(default_factory=list[Open])
    decode_began: bool = False
    losses: list[Loss] = field(default_factory=list[Loss])
    ids: TokenIds = field(default_factory=lambda: token_ids(()))
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    num_cached_tokens: int | None = None
    wire_format: WireFormat = WireFormat.NATIVE
    stamps: Stamps = field(default_factory=dict[Event, float])
    end: End | None = None
    held: dict[PlacementId, list[tuple[FrameEntry, WorkerRef]]] = field(
        default_factory=dict[PlacementId, list[tuple[FrameEntry, WorkerRef]]]
    )

    @property
    def needed(self) -> tuple[WorkerRef, ...]:
        """The workers without which its open placement comes to nothing."""
        if self.placement is None:
            return ()
        if self.decode_began:
            return (self.placement.decode,)
        return _workers_of(self.placement)


@dataclass(slots=True)
class RequestState:
    """One request as the log tells it so far.

    Attributes:
        first_offset, first_timestamp_s: of the first record about it.
        view: from its first `open`, or from the cut that refused it.
        attached: (edge, stream) of the clients that follow it.
        cut_reason: why, if a cut ended it.
    """

    request_id: RequestId
    first_offset: int
    first_timestamp_s: float
    view: View | None = None
    choices: dict[int, ChoiceState] = field(default_factory=dict[int, ChoiceState])
    attached: set[tuple[Incarnation, str]] = field(default_factory=set[tuple[Incarnation, str]])
    cut_reason: str | None = None
    finished: bool = False

    def choice(self, index: int) -> ChoiceState:
        """The state of choice `index`, begun at epoch 1 if nothing was known of it."""
        choice = self.choices.get(index)
        if choice is None:
            choice = self.choices[index] = ChoiceState()
        return choice

    def wants(self, index: int) -> bool:
        """Whether the choice was asked for, as far as is known. Another job under the same id may ask for more."""
        return self.view is None or index < self.view.num_choices

    @property
    def stamps(self) -> Stamps:
        """All events, each when the last choice passed it."""
        merged: Stamps = dict(self.view.stamps) if self.view else {}
        for choice in self.choices.values():
            for event, stamp_s in choice.stamps.items():
                merged[event] = max(stamp_s, merged.get(event, stamp_s))
        return merged

    @property
    def open_choices(self) -> list[int]:
        """Choices that have not ended, whether placed or not."""
        num_choices = self.view.num_choices if self.view else 1
        return [index for index in range(num_choices) if self.choice(index).end is None]


@dataclass(frozen=True, slots=True)
class _Forgotten:
    until_s: float
    first_offset: int | None


class PartitionFold:
    """All requests of one `stream-out` partition, from some offset on.

    A request is kept until `forget`; after that only its id is remembered, so that what comes late for it is void, and
    where its story begins.
    """

    def __init__(self) -> None:
        self.requests: dict[RequestId, RequestState] = {}
        self._forgotten: dict[RequestId, _Forgotten] = {}

    def apply(self, offset: int, timestamp_s: float, message: StreamOutMessage) -> list[Change]:
        """Take the next record of the log; what it changed, in order."""
        if isinstance(message, Frame):
            return [
                change
                for entry in message.entries
                for change in self._apply_entry(offset, timestamp_s, entry, message.worker)
            ]
        if self._is_over(message.request_id):
            return list(_void_open(message)) if isinstance(message, Open) else []
        state = self._state(message.request_id, offset, timestamp_s)
        match message:
            case Open():
                return list(_apply_open(state, message))
            case Cut():
                return list(_apply_cut(state, message))
            case Attach():
                state.attached.add((message.edge, message.stream))
                return []
            case Detach():
                state.attached.discard((message.edge, message.stream))
                return []

    def forget(self, request_id: RequestId, timestamp_s: float, *, first_offset: int | None = None) -> None:
        """Drop a finished request; `timestamp_s` is when, by the log's clock.

        Args:
            first_offset: of a request that was not read here, if it is known.
        """
        state = self.requests.pop(request_id, None)
        if state is None:
            self._forgotten[request_id] = _Forgotten(timestamp_s, first_offset)
        else:
            self._forgotten[request_id] = _Forgotten(max(timestamp_s, _may_open_until_s(state)), state.first_offset)

    def first_offset_of(self, request_id: RequestId) -> int | None:
        """Where the story of a request that was forgotten begins, if that is known."""
        forgotten = self._forgotten.get(request_id)
        return None if forgotten is None else forgotten.first_offset

    def expire(self, before_s: float) -> None:
        """Drop the ids forgotten, and requests of which only stray records were seen, before `before_s`."""
        self._forgotten = {key: each for key, each in self._forgotten.items() if each.until_s >= before_s}
        strays = [
            key
            for key, state in self.requests.items()
            if state.view is None and not state.finished and state.first_timestamp_s < before_s
        ]
        for key in strays:
            del self.requests[key]

    def _is_over(self, request_id: RequestId) -> bool:
        """Whether the request ended and was forgotten: what still comes for it is void."""
        return request_id in self._forgotten

    def _state(self, request_id: RequestId, offset: int, timestamp_s: float) -> RequestState:
        state = self.requests.get(request_id)
        if state is None:
            state = self.requests[request_id] = RequestState(request_id, offset, timestamp_s)
        return state

    def _apply_entry(self, offset: int, timestamp_s: float, entry: FrameEntry, worker: WorkerRef) -> Iterator[Change]:
        void = Voided(entry.request_id, entry.placement, worker)
        if self._is_over(entry.request_id):
            yield void
            return
        state = self._state(entry.request_id, offset, timestamp_s)
        if not state.wants(entry.choice):
            yield void
            return
        choice = state.choice(entry.choice)
        if state.finished or choice.end is not None:
            yield void
        elif choice.placement is None:
            _hold(choice, entry, worker)
        elif not _is_of(choice.placement, entry):
            yield void
        else:
            yield from _take_entry(state, entry, worker)


def _may_open_until_s(state: RequestState) -> float:
    """When no choice of the finished request waits for its first placement any more, wherever it was cancelled."""
    if state.view is None:
        return state.first_timestamp_s + MAX_DEADLINE_S
    return state.view.deadline_s if state.view.num_choices > 1 else state.first_timestamp_s


def _is_of(placement: Open, entry: FrameEntry) -> bool:
    """Whether the entry was made for this placement, and not for another of the choice."""
    return placement.placement == entry.placement


def _may_open(state: RequestState, choice: ChoiceState, message: Open) -> bool:
    """Whether the choice waits for a placement of just this epoch: of several the first one counts."""
    is_awaited = message.epoch == choice.epoch and choice.placement is None
    return is_awaited and choice.end is None and not state.finished


def _hold(choice: ChoiceState, entry: FrameEntry, worker: WorkerRef) -> None:
    choice.held.setdefault(entry.placement, []).append((entry, worker))


def _workers_of(placement: Open) -> tuple[WorkerRef, ...]:
    """Whoever works for it; one alone where the decode worker computes the prompt too."""
    if placement.prefill == placement.decode:
        return (placement.decode,)
    return (placement.prefill, placement.decode)


def _void_open(message: Open) -> Iterator[Change]:
    for worker in _workers_of(message):
        yield Voided(message.request_id, message.placement, worker)


def _void_held(choice: ChoiceState) -> Iterator[Change]:
    for placement, held in choice.held.items():
        for entry, worker in {worker: (entry, worker) for entry, worker in held}.values():
            yield Voided(entry.request_id, placement, worker)
    choice.held.clear()


def _apply_open(state: RequestState, message: Open) -> Iterator[Change]:
    if not state.wants(message.choice):
        yield from _void_open(message)
        return
    choice = state.choice(message.choice)
    if choice.placement is not None and choice.placement.placement == message.placement:
        return
    if not _may_open(state, choice, message):
        yield from _void_open(message)
        return
    if state.view is None and message.view is not None:
        state.view = message.view
        if message.view.edge is not None:
            state.attached.add((message.view.edge, ""))
        for index in [index for index in state.choices if not state.wants(index)]:
            yield from _void_held(state.choices.pop(index))
    choice.placement = message
    choice.opens.append(message)
    choice.decode_began = False
    choice.stamps.update(message.stamps)
    mine = choice.held.pop(message.placement, [])
    yield from _void_held(choice)
    if message.epoch == 1:
        yield Opened(state, message.choice)
    for entry, worker in mine:
        if choice.end is None:
            yield from _take_entry(state, entry, worker)


def _apply_cut(state: RequestState, message: Cut) -> Iterator[Change]:
    if not state.wants(message.choice):
        return
    choice = state.choice(message.choice)
    if state.finished or choice.end or message.epoch != choice.epoch + 1:
        return
    if message.outcome is None and state.view is None:
        return
    closed = choice.placement
    if message.lost is not None:
        choice.losses.append(Loss(message.lost, choice.epoch))
    choice.epoch = message.epoch
    choice.placement = None
    if closed is not None:
        yield from _void_open(closed)
    yield from _void_held(choice)
    if message.outcome is None:
        yield Vacated(state, message.choice, message.epoch)
        return
    unseen = state.view is None
    if unseen:
        state.view = message.view
    state.cut_reason = message.reason
    yield from _end_choice(state, message.choice, End(message.outcome, error=message.error), whole_request=unseen)


def _take_entry(state: RequestState, entry: FrameEntry, worker: WorkerRef) -> Iterator[Change]:
    """Apply an entry of the open placement."""
    choice = state.choice(entry.choice)
    num_known = len(choice.ids)
    if entry.index > num_known:
        _hold(choice, entry, worker)
        return
    if choice.placement is not None and worker == choice.placement.decode:
        choice.decode_began = True
    _note_facts(choice, entry)
    new_ids = entry.ids[num_known - entry.index :]
    if new_ids:
        choice.losses.clear()
        choice.ids.extend(new_ids)
        choice.logprobs.extend(entry.logprobs[num_known - entry.index :])
        yield Grew(state, entry.choice, num_known, new_ids)
    if entry.finish is not None and entry.index + len(entry.ids) == len(choice.ids):
        end = End(entry.finish, entry.stop_reason, entry.error)
        if choice.placement is not None and not choice.decode_began:
            # Prefill ended it, and may not live to tell decode, which holds room for it.
            yield Voided(state.request_id, entry.placement, choice.placement.decode)
        yield from _end_choice(state, entry.choice, end, whole_request=False)
        return
    if new_ids:
        for held, held_worker in choice.held.pop(entry.placement, []):
            if choice.end is None:
                yield from _take_entry(state, held, held_worker)


def _note_facts(choice: ChoiceState, entry: FrameEntry) -> None:
    """What an entry tells beside its tokens."""
    for event, stamp_s in entry.stamps.items():
        choice.stamps.setdefault(event, stamp_s)
    if choice.num_cached_tokens is None:
        choice.num_cached_tokens = entry.num_cached_tokens
    if entry.wire_format.loss > choice.wire_format.loss:
        choice.wire_format = entry.wire_format


def _end_choice(state: RequestState, index: int, end: End, *, whole_request: bool) -> Iterator[Change]:
    choice = state.choice(index)
    choice.end = end
    choice.held.clear()
    yield Ended(state, index, end)
    if whole_request or not state.open_choices:
        state.finished = True
        yield Finished(state)
