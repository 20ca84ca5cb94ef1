"""What the owner of a `stream-out` partition owes its requests. It decides; the service does.

    Finished ──> WriteResult      Vacated ──> Resume, or Cut(failed) after too many losses      Voided ──> Stop
    deadline passed ──> Cut(expired)      nobody attached for the grace ──> Cut(cancelled)      worker lost ──> Cut

Every duty is harmless when done twice or by two owners, so a lease only says when to begin. The commit is a statement
about the log: all below its offset belongs to requests whose result is acknowledged; its note is an offset of
`results` from which on the results of all later requests stand.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from services.stream_out.results import (
    EXPIRED_ERROR,
    WORKER_LOST,
    WORKERS_LOST,
    WORKERS_LOST_ERROR,
    cancelled_error,
    is_given_up,
)
from services.stream_out.sight import Alive
from services.stream_out.streams import PartitionLog
from services.stream_out.takeover import Done
from shared.bus.port import Committed
from shared.policy.fold import Change, Finished, RequestState, Vacated, Voided
from shared.request import FinishReason, Incarnation, PlacementId, RequestId, WorkerRef
from shared.wire.to_ingest import Resume
from shared.wire.to_stream_out import Cut, CutOutcome, ErrorBody
from shared.wire.to_worker import Stop

FORGET_AFTER_S = 60.0
"""A request is kept this long after its result."""

EXPIRE_AFTER_S = 300.0
"""Ids of forgotten requests, and requests of which only stray records came, are dropped after this. Results are found
by a new owner for as long at least: late copies of a request's records, from whoever was slow, are known to be void."""

STOP_AGAIN_AFTER_S = 5.0
"""A worker that goes on with void work is told again after this."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The request has its one end: tell it on `results`."""

    state: RequestState


Duty = WriteResult | Cut | Resume | Stop


@dataclass(frozen=True, slots=True)
class _Acked:
    """A result that stands on `results`, and until when its request's records may still be met."""

    results_offset: int
    last_offset: int
    at_s: float


class PartitionOwner:
    """The duties towards one partition, from its take-over on.

    Args:
        log: read from `start` on, or from before it, where a client here needs that.
        start: whoever has a record below it has its result, whatever part of its story is read here.
        end_offset: of the partition at the take-over; what stands below was perhaps answered by the owner before, so
            only its sum counts.
        done: requests whose result stood on `results` already.
        results_end: offset behind the results read.
        grace_s: a request whose client must wait for it is cancelled when nobody was attached for so long.
    """

    def __init__(
        self,
        log: PartitionLog,
        *,
        start: int,
        end_offset: int,
        done: Mapping[RequestId, Done],
        results_end: int,
        now_s: float,
        grace_s: float,
    ) -> None:
        self.log = log
        self._start = start
        self._end_offset = end_offset
        self._results_end = results_end
        self._grace_s = grace_s
        self._settled = False
        self._acked = {key: _Acked(each.results_offset, end_offset, now_s) for key, each in done.items()}
        self._writing: set[RequestId] = set()
        self._cuts: dict[RequestId, set[tuple[int, int]]] = {}
        self._unattached_since_s: dict[RequestId, float] = {}
        self._stopped_at_s: dict[tuple[PlacementId, Incarnation], float] = {}
        self._voided_before: dict[tuple[PlacementId, Incarnation], Voided] = {}
        held = {story.request_id for story in log.held}
        for request_id in done.keys() - held:
            log.fold.forget(request_id, now_s, first_offset=done[request_id].story_offset)

    @property
    def settled(self) -> bool:
        """Whether all that stood in the partition at the take-over was read and answered."""
        return self._settled

    def answer(self, changes: Iterable[Change], now_s: float) -> list[Duty]:
        """What follows from a record's changes."""
        if not self._settled:
            self._note_voided(changes)
            return []
        return [duty for change in changes for duty in self._answer(change, now_s)]

    def _note_voided(self, changes: Iterable[Change]) -> None:
        """What the owner before perhaps did not live to stop. A result stands only behind the stops before it."""
        for change in changes:
            if isinstance(change, Voided) and change.request_id not in self._acked:
                self._voided_before[change.placement, change.worker.incarnation] = change

    def settle(self, now_s: float) -> list[Duty]:
        """What the owner before perhaps left undone; once, when the log has been read up to where it stood then."""
        if self._settled or self.log.position < self._end_offset:
            return []
        self._settled = True
        duties: list[Duty] = [
            stop
            for voided in self._voided_before.values()
            for stop in self._stop(voided.placement, voided.worker, now_s)
        ]
        self._voided_before.clear()
        for state in self._owed():
            if state.finished:
                duties.extend(self._finish(state))
            else:
                duties.extend(self._place_again(state))
        return duties

    def needed(self) -> Iterator[Incarnation]:
        """The workers without which open placements come to nothing."""
        for state in self._owed():
            for choice in state.choices.values():
                if choice.end is None:
                    yield from (worker.incarnation for worker in choice.needed)

    def judge(self, now_s: float, alive: Alive | None) -> list[Cut]:
        """Cuts for requests that nobody wants any more, and for placements whose worker is lost.

        Args:
            alive: None where this edge could not see that for a while: then every grace begins again.
        """
        if alive is None:
            self._unattached_since_s.clear()
        if not self._settled:
            return []
        running = [state for state in self._owed() if state.view is not None and not state.finished]
        return [cut for state in running for cut in self._judge(state, now_s, alive)]

    def result_acked(self, state: RequestState, results_offset: int, now_s: float) -> None:
        """The request's result stands at this offset of `results`."""
        story = self.log.stories.get(state.request_id)
        last_offset = story.last_offset if story else self.log.position
        self._writing.discard(state.request_id)
        self._acked[state.request_id] = _Acked(results_offset, last_offset, now_s)
        self._results_end = max(self._results_end, results_offset + 1)

    def commit(self, now_s: float) -> Committed:
        """What is true of the partition now."""
        low_water = min((state.first_offset for state in self._owed()), default=self.log.position)
        self._acked = {
            key: acked
            for key, acked in self._acked.items()
            if acked.last_offset >= low_water or acked.at_s >= now_s - EXPIRE_AFTER_S or key in self.log.fold.requests
        }
        note = min((acked.results_offset for acked in self._acked.values()), default=self._results_end)
        return Committed(low_water, str(note))

    def tidy(self, now_s: float) -> None:
        """Forget requests whose story is over."""
        over = [state.request_id for state in self.log.fold.requests.values() if self._is_over(state, now_s)]
        for request_id in over:
            self.log.forget(request_id, now_s)
            self._cuts.pop(request_id, None)
        self.log.expire(now_s - EXPIRE_AFTER_S)
        recent_s = now_s - STOP_AGAIN_AFTER_S
        self._stopped_at_s = {key: at_s for key, at_s in self._stopped_at_s.items() if at_s > recent_s}

    def _owed(self) -> Iterator[RequestState]:
        """Requests whose result does not stand yet, as far as is known."""
        for request_id, state in self.log.fold.requests.items():
            if request_id not in self._acked and not self._is_below_start(state):
                yield state

    def _is_below_start(self, state: RequestState) -> bool:
        return state.first_offset < self._start

    def _is_over(self, state: RequestState, now_s: float) -> bool:
        story = self.log.stories.get(state.request_id)
        if story is not None and story.holds:
            return False
        if self._is_below_start(state):
            return self._settled
        acked = self._acked.get(state.request_id)
        return state.finished and acked is not None and acked.at_s < now_s - FORGET_AFTER_S

    def _answer(self, change: Change, now_s: float) -> Iterator[Duty]:
        match change:
            case Finished(state):
                yield from self._finish(state)
            case Vacated(state, choice):
                yield from self._go_on(state, choice)
            case Voided(_, placement, worker):
                yield from self._stop(placement, worker, now_s)
            case _:
                return

    def _stop(self, placement: PlacementId, worker: WorkerRef, now_s: float) -> Iterator[Stop]:
        key = (placement, worker.incarnation)
        if self._stopped_at_s.get(key, -math.inf) <= now_s - STOP_AGAIN_AFTER_S:
            self._stopped_at_s[key] = now_s
            yield Stop(placement, worker)

    def _finish(self, state: RequestState) -> Iterator[Duty]:
        self._unattached_since_s.pop(state.request_id, None)
        if state.request_id in self._acked or state.request_id in self._writing or self._is_below_start(state):
            return
        self._writing.add(state.request_id)
        yield WriteResult(state)

    def _place_again(self, state: RequestState) -> Iterator[Duty]:
        for index in state.open_choices:
            choice = state.choice(index)
            if choice.placement is None and choice.epoch > 1:
                yield from self._go_on(state, index)

    def _go_on(self, state: RequestState, index: int) -> Iterator[Duty]:
        """A choice lost its placement: another, or the end of the request."""
        if self._is_below_start(state):
            return
        if is_given_up(state):
            yield from self._give_up(state)
        else:
            yield from self._resume(state, index)

    def _resume(self, state: RequestState, index: int) -> Iterator[Duty]:
        choice = state.choice(index)
        view = state.view
        if view is not None and choice.end is None and choice.placement is None:
            max_tokens = view.sampling.max_tokens
            yield Resume(state.request_id, index, choice.epoch, view.job, max_tokens, choice.ids[:])

    def _judge(self, state: RequestState, now_s: float, alive: Alive | None) -> Iterator[Cut]:
        assert state.view is not None
        if now_s >= state.view.deadline_s:
            yield from self._end_all(state, FinishReason.EXPIRED, "deadline", EXPIRED_ERROR)
        elif is_given_up(state):
            yield from self._give_up(state)
        elif alive is None:
            return
        elif state.view.edge is not None and self._is_abandoned(state, now_s, alive.edges):
            yield from self._end_all(state, FinishReason.CANCELLED, "client gone", cancelled_error("client gone"))
        else:
            yield from self._cut_lost(state, alive)

    def _cut_lost(self, state: RequestState, alive: Alive) -> Iterator[Cut]:
        """Close the placements of which a worker is gone that they still need."""
        for index in state.open_choices:
            choice = state.choice(index)
            lost = next((worker for worker in choice.needed if worker.incarnation in alive.lost), None)
            if lost is not None:
                yield from self._cut_once(Cut(state.request_id, index, choice.epoch + 1, WORKER_LOST, lost=lost))

    def _give_up(self, state: RequestState) -> Iterator[Cut]:
        yield from self._end_all(state, FinishReason.FAILED, WORKERS_LOST, WORKERS_LOST_ERROR)

    def _is_abandoned(self, state: RequestState, now_s: float, edges: frozenset[Incarnation]) -> bool:
        if any(edge in edges for edge, _ in state.attached):
            self._unattached_since_s.pop(state.request_id, None)
            return False
        return now_s >= self._unattached_since_s.setdefault(state.request_id, now_s) + self._grace_s

    def _end_all(self, state: RequestState, outcome: CutOutcome, reason: str, error: ErrorBody) -> Iterator[Cut]:
        for index in state.open_choices:
            epoch = state.choice(index).epoch + 1
            yield from self._cut_once(Cut(state.request_id, index, epoch, reason, outcome, error))

    def _cut_once(self, cut: Cut) -> Iterator[Cut]:
        """One for each epoch: a cut that lost its race is followed by one for the later epoch."""
        written = self._cuts.setdefault(cut.request_id, set())
        if (cut.choice, cut.epoch) not in written:
            written.add((cut.choice, cut.epoch))
            yield cut
