"""Finds a request and reads it for a client, on whichever edge it began.

known here, or new in a partition read here ──> the partition's own log
unknown, and the partition is owned here    ──> its log, once that was read up to its end of now
else                                        ──> a reader of its own, from before the request's first record on
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.stream_out.metrics import EdgeMetrics
from services.stream_out.owner import FORGET_AFTER_S, PartitionOwner
from services.stream_out.streams import Hold, PartitionLog
from services.stream_out.takeover import GROUP, find_done
from shared.bus.port import Bus, BusUnavailable, Reader, Record
from shared.errors import Overloaded
from shared.policy.fold import Change
from shared.request import RequestId, partition_of
from shared.state.keys import LEASE_MS, LEASE_S
from shared.state.port import RequestHint, State, StateUnavailable
from shared.text.tokeniser import Tokeniser
from shared.wire.topics import MAX_DEADLINE_S, STREAM_OUT

READ_TIMEOUT_S = 0.2

LOOK_TIMEOUT_S = 10.0
"""Finding a request, or cancelling it, takes no longer, or the client is asked to try again."""

HINTS_COMPLETE_AFTER_MS = int((MAX_DEADLINE_S + FORGET_AFTER_S) * 1000)
"""A store that has kept its memory for so long knows every request that ended a moment ago."""

CATCH_UP_POLL_S = 0.005

HINT_SLACK_RECORDS = 1000
"""Frames, and other choices, may stand before the `open` that a hint names: readers begin so much before it."""

MAX_READERS = 256
"""Requests that are read by a reader of their own at a time: each has connections to the brokers. When an edge dies its
clients come back by the hundred, and two seconds later others own its partitions: who is asked to wait finds them."""

RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class Partition:
    """A partition that this edge reads; the owner is gone when the lease is, while clients still follow it."""

    log: PartitionLog
    owner: PartitionOwner | None

    @property
    def is_settled(self) -> bool:
        """Whether it is owned here, and was read up to where it stood when it was taken over."""
        return self.owner is not None and self.owner.settled


class Following:
    """Args:
    partitions: that this edge reads now, by number.
    end_offset: of a partition of `stream-out`, now. Raises BusUnavailable.
    take: puts a record into a log.
    spawn: does something beside the edge's loops.
    """

    def __init__(
        self,
        bus: Bus,
        state: State,
        tokeniser: Tokeniser,
        *,
        partitions: Mapping[int, Partition],
        end_offset: Callable[[int], Awaitable[int]],
        take: Callable[[PartitionLog, Record], list[Change]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        metrics: EdgeMetrics,
    ) -> None:
        self._bus = bus
        self._state = state
        self._tokeniser = tokeniser
        self._partitions = partitions
        self._end_offset = end_offset
        self._take = take
        self._spawn = spawn
        self._metrics = metrics
        self._num_readers = 0

    @asynccontextmanager
    async def follow(self, request_id: RequestId, *, is_new: bool = False) -> AsyncGenerator[Hold]:
        """Follow a request from its beginning, on whichever edge it began.

        Args:
            is_new: it has no record yet.

        Raises:
            BusUnavailable.
            Overloaded: too many are followed here that began elsewhere.
        """
        found = self._partitions.get(partition_of(request_id))
        if found is not None and (is_new or found.log.knows(request_id)):
            with found.log.hold(request_id) as hold:
                hold.caught_up.set()
                yield hold
            return
        if self._bus.silent_s() > LEASE_S:
            raise BusUnavailable("the log is away")  # each who asks would try to reach it, and wait
        hint = None if is_new else await self._find(request_id)
        found = self._partitions.get(partition_of(request_id))
        if found is not None and found.is_settled and hint is None:
            with found.log.hold(request_id) as hold:
                task = self._spawn(self._catch_up(hold))
                try:
                    yield hold
                finally:
                    task.cancel()
            return
        async with self._follower(request_id, hint, is_new=is_new) as hold:
            yield hold

    async def _catch_up(self, hold: Hold) -> None:
        """This edge may have stood still: what it has read tells nothing of a request that it does not know."""
        try:
            end_offset = await self._end_offset(partition_of(hold.story.request_id))
        except BusUnavailable:
            hold.break_off()
            return
        while hold.log.position < end_offset:  # noqa: ASYNC110 - the hold may move to another log, told of by nobody
            await asyncio.sleep(CATCH_UP_POLL_S)
        hold.caught_up.set()

    async def has_begun(self, request_id: RequestId) -> bool:
        """Whether the request has a first record somewhere. Raises BusUnavailable."""
        return await self._find(request_id) is not None

    async def _find(self, request_id: RequestId) -> RequestHint | None:
        try:
            hint = await self._state.find_request(request_id)
            up_ms = None if hint else await self._state.up_ms(lease_ms=LEASE_MS)
        except StateUnavailable:
            hint, up_ms = None, 0
        if up_ms is None or up_ms >= HINTS_COMPLETE_AFTER_MS:
            return hint
        return await self._find_ended(request_id)

    async def _find_ended(self, request_id: RequestId) -> RequestHint | None:
        """Where a request that ended begins, without what the store knew. Raises BusUnavailable."""
        partition = partition_of(request_id)
        found = self._partitions.get(partition)
        if found is not None and found.is_settled:
            offset = found.log.fold.first_offset_of(request_id)
        else:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    done = await find_done(self._bus, request_id)
            except TimeoutError as error:
                raise BusUnavailable("results could not be read in time") from error
            offset = None if done is None else done.story_offset
        return None if offset is None else RequestHint(partition, offset)

    @asynccontextmanager
    async def _follower(self, request_id: RequestId, hint: RequestHint | None, *, is_new: bool) -> AsyncGenerator[Hold]:
        """Read one request from a partition that is not read here, or no longer from where it began."""
        if self._num_readers >= MAX_READERS:
            raise Overloaded("too many requests of other edges are followed here", retry_after_s=RETRY_AFTER_S)
        self._num_readers += 1
        self._metrics.followers.inc()
        try:
            async with (
                self._bus.reader(STREAM_OUT.name, group=GROUP) as reader,
                self._read_by(reader, request_id, hint, is_new=is_new) as hold,
            ):
                yield hold
        finally:
            self._num_readers -= 1

    @asynccontextmanager
    async def _read_by(
        self, reader: Reader, request_id: RequestId, hint: RequestHint | None, *, is_new: bool
    ) -> AsyncGenerator[Hold]:
        partition = partition_of(request_id)
        end_offset = await reader.end_offset(partition)
        start = end_offset if is_new else await self._first_possible(reader, partition, hint)
        log = PartitionLog(partition, start, self._tokeniser, only=request_id)
        with log.hold(request_id) as hold:
            await reader.assign({partition: start})
            task = self._spawn(self._read_follower(reader, hold, end_offset))
            try:
                yield hold
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _first_possible(self, reader: Reader, partition: int, hint: RequestHint | None) -> int:
        """Not behind the request's first record: a request that runs begins behind the commit, an ended one is
        found by its hint."""
        committed = await reader.committed(partition)
        starts = [committed.offset] if committed else [0]
        if hint is not None:
            starts.append(hint.offset - HINT_SLACK_RECORDS)
        return max(min(starts), await reader.beginning_offset(partition))

    async def _read_follower(self, reader: Reader, hold: Hold, end_offset: int) -> None:
        try:
            await self._read_to_its_end(reader, hold, end_offset)
        except BaseException:  # a CancelledError may be a library's own: nobody reads on all the same
            hold.break_off()
            raise

    async def _read_to_its_end(self, reader: Reader, hold: Hold, end_offset: int) -> None:
        while not hold.story.finished:
            if hold.log.position >= end_offset:
                hold.caught_up.set()
            for record in await reader.read(READ_TIMEOUT_S):
                self._take(hold.log, record)
        hold.caught_up.set()
