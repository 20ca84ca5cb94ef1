"""Requests as this edge reads them from the log; a client's stream is a cursor into one of them.

    record ──> PartitionLog ──> fold ──changes──> Story of the request ──events──> Hold of a client
                                   └──changes──> the partition's owner, if this edge is it

A slow client holds nothing up: it keeps its place in the story and nothing else.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from services.stream_out.events import EventMaker, StreamEvent
from services.stream_out.sse import Cursor
from shared.errors import Overloaded
from shared.policy.fold import Change, PartitionFold, RequestState, Voided
from shared.request import RequestId
from shared.text.tokeniser import Tokeniser
from shared.wire.to_stream_out import Frame, StreamOutMessage

REQUEST_ID_HEADER = "x-request-id"


class Story:
    """One request: its state, and its events once a client asks for them.

    Attributes:
        state: None until its first record was read.
        last_offset: of the last record about it, -1 before the first.
        holds: the clients that follow it.
    """

    def __init__(self, request_id: RequestId, tokeniser: Tokeniser) -> None:
        self.request_id = request_id
        self.state: RequestState | None = None
        self.last_offset = -1
        self.holds: set[Hold] = set()
        self._untold: list[tuple[int, list[Change]]] = []
        self._events: list[StreamEvent] = []
        self._maker = EventMaker(tokeniser)
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def opened(self) -> bool:
        """Whether a placement was made: the request runs or ran."""
        return self.state is not None and any(choice.placement or choice.ids for choice in self.state.choices.values())

    @property
    def decided(self) -> bool:
        """Whether the log says that the request was taken on, or how it ended."""
        return self.state is not None and (self.state.view is not None or self.state.finished)

    @property
    def finished(self) -> bool:
        return self.state is not None and self.state.finished

    def tell(self, offset: int, state: RequestState, changes: list[Change]) -> None:
        """Take what the record at `offset` changed."""
        self.state = state
        self.last_offset = offset
        if changes:
            self._untold.append((offset, changes))
        self.wake()

    def wake(self) -> None:
        """Let everybody who waits for news look again."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def news(self) -> None:
        """Wait for the next `wake`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiting:  # given up: a silent stream is waited for again at each keep-alive
                self._waiting.remove(waiter)

    def events_behind(self, cursor: Cursor) -> Sequence[StreamEvent]:
        """The events so far that come behind `cursor`."""
        for offset, changes in self._untold:
            self._events.extend(self._maker.make(offset, changes))
        self._untold.clear()
        if not self._events or self._events[-1].cursor <= cursor:
            return ()
        return self._events[bisect_right(self._events, cursor, key=lambda event: event.cursor) :]


class Hold:
    """A client's grip on a request; the log that it is read from may change under it.

    Attributes:
        caught_up: all that stood in the log when the client came was read.
        headers: that the client gets with its answer.
    """

    def __init__(self, log: "PartitionLog", story: Story) -> None:
        self.log = log
        self.story = story
        self.caught_up = asyncio.Event()
        self.headers: dict[str, str] = {REQUEST_ID_HEADER: story.request_id}
        self._is_broken = False

    def break_off(self) -> None:
        """Nobody reads the story on: who waits for news of it hears so."""
        self._is_broken = True
        self.caught_up.set()
        self.story.wake()

    def check(self) -> None:
        """Raises Overloaded where no news can come any more."""
        if self._is_broken:
            raise Overloaded("the request could not be read on here; it goes on", retry_after_s=1.0)

    async def wait(self, is_so: Callable[[Story], bool]) -> Story:
        """Wait until `is_so` holds of the story. Raises Overloaded."""
        while not is_so(self.story):
            self.check()
            await self.story.news()
        return self.story


class PartitionLog:
    """One partition of `stream-out` from `start` on, or of it the records about one request.

    Attributes:
        position: offset that is read next.
    """

    def __init__(self, partition: int, start: int, tokeniser: Tokeniser, *, only: RequestId | None = None) -> None:
        self.partition = partition
        self.start = start
        self.position = start
        self.fold = PartitionFold()
        self.stories: dict[RequestId, Story] = {}
        self._tokeniser = tokeniser
        self._only = only

    def apply(self, offset: int, timestamp_s: float, message: StreamOutMessage) -> list[Change]:
        """Take the next record; what it changed."""
        if self._only is not None:
            about = _about(message, self._only)
            if about is None:
                return []
            message = about
        changes = self.fold.apply(offset, timestamp_s, message)
        for request_id in dict.fromkeys(_request_ids(message)):
            state = self.fold.requests.get(request_id)
            if state is not None:
                self._story(request_id).tell(offset, state, list(_changes_of(request_id, changes)))
        return changes

    @property
    def held(self) -> list[Story]:
        """Stories that clients follow."""
        return [story for story in self.stories.values() if story.holds]

    def knows(self, request_id: RequestId) -> bool:
        """Whether the request can be followed here from its beginning."""
        story = self.stories.get(request_id)
        return story is not None and story.decided

    def first_possible(self, story: Story) -> int:
        """Where the first record about the request stands, or behind what was read if there was none."""
        return self.position if story.state is None else story.state.first_offset

    @contextmanager
    def hold(self, request_id: RequestId) -> Iterator[Hold]:
        """Follow the request from here on, and keep it for as long."""
        hold = Hold(self, self._story(request_id))
        hold.story.holds.add(hold)
        try:
            yield hold
        finally:
            hold.log.release(hold)

    def release(self, hold: Hold) -> None:
        """Let go of a story; one without any record goes with its last client."""
        story = hold.story
        story.holds.discard(hold)
        if not story.holds and story.request_id not in self.fold.requests:
            self.stories.pop(story.request_id, None)

    def adopt(self, stories: Iterable[Story]) -> None:
        """Let the clients of `stories` follow them here. What ended stays where it is: nothing comes behind it."""
        for old in stories:
            if old.finished:
                continue
            mine = self._story(old.request_id)
            for hold in old.holds:
                hold.log, hold.story = self, mine
            mine.holds |= old.holds
            old.wake()

    def forget(self, request_id: RequestId, now_s: float) -> None:
        """Drop a finished request that nobody follows."""
        self.fold.forget(request_id, now_s)
        self.stories.pop(request_id, None)

    def forget_ended(self, now_s: float) -> None:
        """Drop all finished requests that nobody follows: there is no owner who does when their results stand."""
        ended = [state.request_id for state in self.fold.requests.values() if state.finished]
        for request_id in ended:
            story = self.stories.get(request_id)
            if story is None or not story.holds:
                self.forget(request_id, now_s)

    def expire(self, before_s: float) -> None:
        """Drop what only stray records told of, and ids forgotten, before `before_s` by the log's clock."""
        self.fold.expire(before_s)
        gone = [key for key, story in self.stories.items() if not story.holds and key not in self.fold.requests]
        for request_id in gone:
            del self.stories[request_id]

    def _story(self, request_id: RequestId) -> Story:
        story = self.stories.get(request_id)
        if story is None:
            story = self.stories[request_id] = Story(request_id, self._tokeniser)
        return story


def _request_ids(message: StreamOutMessage) -> Iterable[RequestId]:
    if isinstance(message, Frame):
        return (entry.request_id for entry in message.entries)
    return (message.request_id,)


def _about(message: StreamOutMessage, request_id: RequestId) -> StreamOutMessage | None:
    """What of the message is about the request."""
    if isinstance(message, Frame):
        entries = tuple(entry for entry in message.entries if entry.request_id == request_id)
        return replace(message, entries=entries) if entries else None
    return message if message.request_id == request_id else None


def _changes_of(request_id: RequestId, changes: Iterable[Change]) -> Iterator[Change]:
    for change in changes:
        if not isinstance(change, Voided) and change.state.request_id == request_id:
            yield change
