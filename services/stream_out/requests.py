"""What clients may ask of an edge: take a request on, follow one, tell of one, cancel one."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from services.stream_out.following import LOOK_TIMEOUT_S
from services.stream_out.results import cancelled_error, status_of, timings_of, usage_of
from services.stream_out.service import StreamOut
from services.stream_out.streams import Hold, Story
from services.stream_out.tenants import Caller
from shared.bus.port import BusUnavailable
from shared.errors import IdempotencyConflict, Overloaded, RateLimited, RequestNotFound
from shared.policy.limits import TenantLimits
from shared.request import Event, FinishReason, Priority, RequestId, keyed_request_id, partition_of
from shared.state.keys import LEASE_S
from shared.state.port import StateUnavailable
from shared.wire.openai_answers import usage_body
from shared.wire.to_ingest import (
    HEADER_DEADLINE,
    HEADER_EDGE,
    HEADER_IDEMPOTENCY_KEY,
    HEADER_PRIORITY,
    HEADER_TENANT,
    HEADER_TRACEPARENT,
    body_hash,
)
from shared.wire.to_stream_out import Attach, Cut, Detach
from shared.wire.topics import INGEST

NUM_PARTITIONS_USED = 2
"""An edge's own requests live in so many of its partitions, far apart, so that several ingests share them."""

RETRY_AFTER_S = 2.0

NO_LIMITS = TenantLimits()

ACCEPTING_STREAM = ""
"""Name of the connection that the job itself attaches."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as a client handed it in.

    Attributes:
        body: becomes the record's value unchanged.
        num_tokens: of prompt and answer, as far as the body tells.
        max_new_tokens: of each answer, if the body names it.
        idempotency_key: jobs of one tenant under one key are one request.
        deadline_s: unix seconds.
    """

    body: bytes
    caller: Caller
    num_choices: int
    num_tokens: int
    deadline_s: float
    max_new_tokens: int | None = None
    priority: Priority = Priority.STANDARD
    idempotency_key: str | None = None
    traceparent: str | None = None


class Requests:
    """Args:
    draw_name: makes random names, for request ids and streams.
    """

    def __init__(self, edge: StreamOut, *, draw_name: Callable[[], str]) -> None:
        self._edge = edge
        self._draw_name = draw_name
        self._accepted: dict[RequestId, str] = {}
        """Tenants of jobs written here whose client stays, or left before the first record: whatever the log says, they
        exist."""

    @asynccontextmanager
    async def submit(self, submission: Submission) -> AsyncGenerator[Hold]:
        """Accept a job and follow it; under a known idempotency key, follow the request that runs or ran.

        Raises:
            Overloaded: the log does not take the job now, or it would wait too long.
            RateLimited: the tenant has reached a limit.
            IdempotencyConflict: the key was used with another body.
        """
        key = submission.idempotency_key
        if key is not None:
            async with self._join(keyed_request_id(submission.caller.tenant, key), submission) as hold:
                yield hold
            return
        request_id = self._draw_request_id()
        async with self._present(request_id, ACCEPTING_STREAM, is_new=True) as hold:
            await self._admit(hold, submission)
            try:
                await self._accept(hold, submission)
            except (Overloaded, asyncio.CancelledError):  # or its client left: nobody knows the id, to come back
                self._edge.spawn(self._take_back(request_id, submission.deadline_s))
                raise
            yield hold

    @asynccontextmanager
    async def resume(self, request_id: RequestId, caller: Caller) -> AsyncGenerator[Hold]:
        """Follow a request again, perhaps one that another edge accepted. Raises RequestNotFound, Overloaded."""
        stream = self._draw_name()
        async with self._present(request_id, stream) as hold:
            await self._known(hold, caller)
            arriving = self._edge.spawn(self._arrive(hold, stream))
            try:
                yield hold
            finally:
                arriving.cancel()  # of a request that is not open yet: nobody would tell it of one that left

    async def describe(self, request_id: RequestId, caller: Caller) -> dict[str, Any]:
        """Where the request is in its life. Raises RequestNotFound, Overloaded."""
        async with self._follow(request_id) as hold:
            await self._known(hold, caller)
            return describe(hold.story)

    async def placement(self, request_id: RequestId, caller: Caller) -> dict[str, Any]:
        """Where its choices were placed, and why. Raises RequestNotFound, Overloaded."""
        async with self._follow(request_id) as hold:
            await self._known(hold, caller)
            return describe_placement(hold.story)

    async def cancel(self, request_id: RequestId, caller: Caller) -> str:
        """End the request, wherever it is; its status then. Raises RequestNotFound, Overloaded."""
        async with self._follow(request_id) as hold:
            await self._known(hold, caller)
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    await self._end(hold)
            except TimeoutError as error:
                raise _try_again("the request could not be cancelled in time") from error
            assert hold.story.state is not None
            return status_of(hold.story.state)

    async def _end(self, hold: Hold) -> None:
        while not hold.story.finished:
            offsets = [await self._edge.tell(cut) for cut in _cancellations(hold.story)]
            # A cut that lost its race changed nothing: read it, then look again.
            await hold.wait(_reached(max(offsets)))

    async def _take_back(self, request_id: RequestId, deadline_s: float) -> None:
        """Cancel a job whose client does not wait for it, should it come to stand on the log all the same."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline_s - self._edge.clock_s())):
                while True:
                    try:
                        async with self._follow(request_id) as hold:
                            await hold.wait(lambda story: story.decided)
                            await self._end(hold)
                            return
                    except Overloaded:
                        await asyncio.sleep(RETRY_AFTER_S)

    async def _known(self, hold: Hold, caller: Caller) -> None:
        """Raises RequestNotFound, also where the request is another tenant's, and Overloaded."""
        await _look(hold)
        story = hold.story
        view = story.state.view if story.state is not None else None
        tenant = view.tenant if view is not None else await self._tenant_of(story.request_id)
        exists = story.decided or tenant is not None
        if not exists or (caller.is_proven and tenant != caller.tenant):
            raise RequestNotFound(f"no request {story.request_id}")

    async def _tenant_of(self, request_id: RequestId) -> str | None:
        """For whom a request was accepted that the log does not tell of yet, by whichever edge."""
        if request_id in self._accepted:
            return self._accepted[request_id]
        try:
            return await self._edge.state.tenant_of(request_id)
        except StateUnavailable as error:
            raise _try_again("it is not known now whether there is such a request") from error

    def _draw_request_id(self) -> RequestId:
        """An id in one of few partitions that are read here.

        Read here, so that its answer takes the shortest way; few, because each step of a worker costs it, the log and
        this edge one record for each partition that its requests live in.
        """
        owned = self._edge.owned_partitions
        used = owned[:: -(-len(owned) // NUM_PARTITIONS_USED)] if owned else ()
        while True:
            request_id = RequestId(f"req-{self._draw_name()}")
            if not owned or partition_of(request_id) in used:
                return request_id

    async def _admit(self, hold: Hold, submission: Submission) -> None:
        """Refuse what would wait too long or is over its tenant's limits. Raises Overloaded, RateLimited."""
        admission, caller = self._edge.admission, submission.caller
        if self._edge.bus.silent_s() > LEASE_S:
            raise _try_again("the log does not take requests now")
        admission.check_wait(submission.deadline_s, submission.priority, submission.max_new_tokens)
        request_id = hold.story.request_id
        taking = admission.take_place(
            caller.tenant,
            caller.limits,
            request_id,
            num_tokens=submission.num_tokens,
            deadline_s=submission.deadline_s,
        )
        if caller.limits == NO_LIMITS:
            self._edge.spawn(_only_done(taking))  # for other edges that are asked about the request before it is open
        else:
            task = asyncio.ensure_future(taking)
            try:
                hold.headers |= await asyncio.shield(task)
            except asyncio.CancelledError:
                if submission.idempotency_key is None:  # the place of a keyed one may be that of who joins it
                    self._edge.spawn(self._give_back(task, request_id))
                raise
        admission.count(submission.num_choices, submission.priority)

    async def _give_back(self, taking: asyncio.Future[dict[str, str]], request_id: RequestId) -> None:
        """Leave a place whose client left while it was taken: no job was written."""
        with suppress(RateLimited):
            await taking
            await self._edge.admission.leave_place(request_id, 0)

    async def _accept(self, hold: Hold, submission: Submission) -> None:
        headers = tuple(self._headers(submission))
        try:
            async with asyncio.timeout(self._edge.settings.accept_timeout_s):
                await self._edge.send(INGEST.name, hold.story.request_id, submission.body, headers)
        except (TimeoutError, BusUnavailable) as error:
            raise _try_again("the log does not take requests now") from error
        self._accepted[hold.story.request_id] = submission.caller.tenant

    def _headers(self, submission: Submission) -> Iterator[tuple[str, bytes]]:
        yield HEADER_TENANT, submission.caller.tenant.encode()
        yield HEADER_DEADLINE, str(int(submission.deadline_s * 1000)).encode()
        if submission.priority is not Priority.STANDARD:
            yield HEADER_PRIORITY, submission.priority.encode()
        if submission.idempotency_key is None:
            yield HEADER_EDGE, self._edge.incarnation.encode()
        else:
            yield HEADER_IDEMPOTENCY_KEY, submission.idempotency_key.encode()
        if submission.traceparent is not None:
            yield HEADER_TRACEPARENT, submission.traceparent.encode()

    @asynccontextmanager
    async def _join(self, request_id: RequestId, submission: Submission) -> AsyncGenerator[Hold]:
        async with AsyncExitStack() as stack:
            hold = await stack.enter_async_context(self._follow(request_id))
            stack.callback(self._accepted.pop, request_id, None)
            await _look(hold)
            if not hold.story.decided:
                await self._admit(hold, submission)
                await self._accept(hold, submission)
                timeout_s = max(0.0, submission.deadline_s - self._edge.clock_s())
                try:
                    async with asyncio.timeout(timeout_s):
                        await hold.wait(lambda story: story.decided)
                except TimeoutError as error:
                    raise _try_again("the request was not taken on before its deadline") from error
            _check_same_body(hold.story, submission.body)
            yield hold

    @asynccontextmanager
    async def _follow(self, request_id: RequestId, *, is_new: bool = False) -> AsyncGenerator[Hold]:
        async with AsyncExitStack() as stack:
            try:
                hold = await stack.enter_async_context(self._edge.following.follow(request_id, is_new=is_new))
            except BusUnavailable as error:
                raise _try_again("the log is away") from error
            yield hold

    @asynccontextmanager
    async def _present(self, request_id: RequestId, stream: str, *, is_new: bool = False) -> AsyncGenerator[Hold]:
        """Follow a request as a client whose absence counts; its departure is told once the request is open."""
        async with AsyncExitStack() as stack:
            hold = await stack.enter_async_context(self._follow(request_id, is_new=is_new))
            try:
                yield hold
            finally:
                if is_new:
                    stack.callback(self._accepted.pop, request_id, None)
                was_attached = hold.story.decided or (is_new and request_id in self._accepted)
                if was_attached and not hold.story.finished:
                    self._edge.spawn(self._depart(stack.pop_all(), hold, stream))

    async def _arrive(self, hold: Hold, stream: str) -> None:
        while not hold.story.decided:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    await hold.wait(lambda story: story.decided)
            except TimeoutError:
                if await self._comes_to_nothing(hold.story.request_id):
                    hold.break_off()
                    return
        story = hold.story
        if _needs_company(story):
            await self._edge.tell(Attach(story.request_id, self._edge.incarnation, stream))

    async def _comes_to_nothing(self, request_id: RequestId) -> bool:
        """Whether a request that was accepted, and that the log does not tell of here, is not waited for in the right
        place: it began before what is read here, or it is none any more."""
        try:
            return await self._tenant_of(request_id) is None or await self._edge.following.has_begun(request_id)
        except (Overloaded, BusUnavailable):
            return False

    async def _depart(self, stack: AsyncExitStack, hold: Hold, stream: str) -> None:
        # Before its `open` the request attaches nobody, and the `open` would come behind our Detach and undo it.
        async with stack:
            story = await hold.wait(lambda story: story.decided)
            if _needs_company(story):
                await self._edge.tell(Detach(story.request_id, self._edge.incarnation, stream))


def describe(story: Story) -> dict[str, Any]:
    """The answer of `GET /v1/requests/{id}`."""
    state = story.state
    body: dict[str, Any] = {"id": story.request_id, "object": "baton.request", "status": "queued"}
    if state is None or state.view is None:
        return body | ({"status": status_of(state)} if state is not None and state.finished else {})
    timings = timings_of(state)
    choices = [
        {
            "index": index,
            "completion_tokens": len(choice.ids),
            "finish_reason": choice.end.finish if choice.end else None,
        }
        for index, choice in sorted(state.choices.items())
    ]
    return body | {
        "status": status_of(state) if state.finished else ("running" if story.opened else "queued"),
        "model": state.view.model,
        "last_event": next(reversed(timings), None),
        "timings": timings,
        "usage": usage_body(usage_of(state)),
        "choices": choices,
        "reason": state.cut_reason,
    }


def describe_placement(story: Story) -> dict[str, Any]:
    """The answer of `GET /v1/requests/{id}/placement`: each placement that counted, of all choices and epochs so far.

    Workers are told by slot: who they are is the operator's business.
    """
    choices = story.state.choices if story.state is not None else {}
    placements = [
        {
            "index": index,
            "epoch": placed.epoch,
            "prefill": placed.prefill.slot,
            "decode": placed.decode.slot,
            "placed": placed.stamps.get(Event.PLACED),
            "explanation": placed.explanation.members() if placed.explanation is not None else None,
        }
        for index, choice in sorted(choices.items())
        for placed in choice.opens
    ]
    return {"id": story.request_id, "object": "baton.placement", "placements": placements}


async def _only_done(work: Awaitable[object]) -> None:
    await work


async def _look(hold: Hold) -> None:
    """Wait until all that the log held when the client came was read, or enough of it."""
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            await hold.caught_up.wait()
            hold.check()
    except TimeoutError as error:
        raise _try_again("the request could not be looked up in time") from error


def _needs_company(story: Story) -> bool:
    """Whether the request is cancelled when nobody is attached."""
    state = story.state
    return state is not None and not state.finished and state.view is not None and state.view.edge is not None


def _cancellations(story: Story) -> list[Cut]:
    reason = "client asked"
    error = cancelled_error(reason)
    state = story.state
    if state is None or state.view is None:
        epoch = 1 if state is None else state.choice(0).epoch
        return [Cut(story.request_id, 0, epoch + 1, reason, FinishReason.CANCELLED, error)]
    return [
        Cut(story.request_id, index, state.choice(index).epoch + 1, reason, FinishReason.CANCELLED, error)
        for index in state.open_choices
    ]


def _reached(offset: int) -> Callable[[Story], bool]:
    return lambda story: story.finished or story.last_offset >= offset


def _check_same_body(story: Story, body: bytes) -> None:
    view = story.state.view if story.state is not None else None
    if view is not None and view.body_hash != body_hash(body):
        raise IdempotencyConflict("the idempotency key was used before with another body", param="Idempotency-Key")


def _try_again(message: str) -> Overloaded:
    return Overloaded(message, retry_after_s=RETRY_AFTER_S)
