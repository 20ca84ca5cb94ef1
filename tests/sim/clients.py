"""Clients of edges: they submit, follow, lose their edge, go on at another by their cursor, cancel or leave."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson

from services.stream_out.requests import Submission
from services.stream_out.sse import BEFORE_ALL, Cursor
from services.stream_out.tenants import Caller
from shared.errors import RequestError, RequestNotFound
from shared.policy.limits import TenantLimits
from shared.request import RequestId
from tests.sim.world import EDGE, Host, World

RETRY_S = 0.4

CALLER = Caller("sim", limits=TenantLimits(max_concurrent=100))


@dataclass
class Capture:
    """What a client was sent of one request.

    Attributes:
        ended: its stream came to its end.
        was_alone: for a while no connection of it was sure to be there.
        status: of the request, as `DELETE` told it.
    """

    request_id: RequestId
    events: list[tuple[Cursor, dict[str, Any]]] = field(default_factory=list)
    ended: bool = False
    was_alone: bool = False
    asked_to_cancel: bool = False
    status: str | None = None

    @property
    def cursor(self) -> Cursor:
        return self.events[-1][0] if self.events else BEFORE_ALL

    def text(self, choice: int) -> str:
        return "".join(
            part["text"] for _, body in self.events for part in body.get("choices", ()) if part["index"] == choice
        )


@dataclass(frozen=True)
class Manners:
    """How a client behaves.

    Attributes:
        key: its idempotency key, if it sends one.
        patience_s: after so long without news it tries another edge.
        leaves_after_s, cancels_after_s: None: it does not.
    """

    key: str | None = None
    patience_s: float = 3.0
    leaves_after_s: float | None = None
    cancels_after_s: float | None = None


class _Over(Exception):
    """The client has what it wanted, or wants nothing any more."""


class Client:
    """One client with one request; what it captured is by request id, for it may have to ask anew."""

    def __init__(self, world: World, body: dict[str, Any], manners: Manners, rng: Random) -> None:
        self.captures: dict[RequestId, Capture] = {}
        self._world = world
        self.body = orjson.dumps(body)
        self._num_choices = body["n"]
        self._manners = manners
        self._rng = rng
        self._current: Capture | None = None
        self._deadline_s = world.clock_s() + 60

    async def run(self) -> None:
        """Until the stream has ended or the client has left."""
        with suppress(_Over, TimeoutError):
            async with asyncio.timeout(self._manners.leaves_after_s), asyncio.TaskGroup() as tasks:
                if self._manners.cancels_after_s is not None:
                    tasks.create_task(self._cancel(self._manners.cancels_after_s))
                while not (self._current and self._current.ended):
                    await self._connect()
                for task in tasks._tasks:
                    task.cancel()
        if self._current is not None and not self._current.ended:
            self._current.was_alone = True

    async def _edge(self) -> Host:
        while not (edges := [host for host in self._world.running(EDGE) if host.requests is not None]):
            await asyncio.sleep(RETRY_S)
        return self._rng.choice(edges)

    async def _connect(self) -> None:
        edge = await self._edge()
        items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        known = self._current if self._current and self._current.events else None
        task = edge.process.run(self._serve(edge, known, items.put_nowait))
        edge.process.ended.add_done_callback(lambda _: items.put_nowait(("broken", None)), context=Context())
        try:
            while True:
                async with asyncio.timeout(self._manners.patience_s):
                    kind, value = await items.get()
                match kind:
                    case "began":
                        self._current = self.captures.setdefault(value, Capture(value))
                    case "event":
                        assert self._current is not None
                        self._current.events.append(value)
                    case "end":
                        assert self._current is not None
                        self._current.ended = True
                        return
                    case _:
                        break
        except TimeoutError:
            pass
        finally:
            task.cancel()
        if self._current is not None:
            self._current.was_alone = True
            if not self._current.events and self._manners.key is None:
                self._current = None
        await asyncio.sleep(RETRY_S)

    async def _serve(self, edge: Host, known: Capture | None, put: Callable[[tuple[str, Any]], None]) -> None:
        """The edge's side of a connection."""
        assert edge.requests is not None
        cursor = BEFORE_ALL if known is None else known.cursor
        if known is None:
            submission = Submission(
                self.body,
                CALLER,
                num_choices=self._num_choices,
                num_tokens=100,
                deadline_s=self._deadline_s,
                idempotency_key=self._manners.key,
            )
            holding = edge.requests.submit(submission)
        else:
            holding = edge.requests.resume(known.request_id, CALLER)
        try:
            async with holding as hold:
                put(("began", hold.story.request_id))
                while True:
                    story = hold.story
                    finished = story.finished
                    events = story.events_behind(cursor)
                    for event in events:
                        cursor = event.cursor
                        put(("event", (cursor, orjson.loads(event.body))))
                    if finished:
                        break
                    if hold.story is story and not story.finished and not story.events_behind(cursor):
                        await story.news()
            put(("end", None))
        except RequestError as error:
            self._world.journal.note(edge.incarnation, f"client refused: {error!r}")
            put(("refused", error))
        except Exception as error:
            self._world.journal.error(edge.incarnation, f"a client's call failed: {error!r}")
            raise

    async def _cancel(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while (capture := self._current) is None:
            await asyncio.sleep(RETRY_S)
        capture.asked_to_cancel = True
        while capture.status is None:
            edge = await self._edge()
            assert edge.requests is not None
            task = edge.process.run(edge.requests.cancel(capture.request_id, CALLER))
            await asyncio.wait(
                {task, asyncio.ensure_future(asyncio.shield(edge.process.ended))},
                timeout=12,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if task.done() and not task.cancelled():
                if task.exception() is None:
                    capture.status = task.result()
                elif isinstance(task.exception(), RequestNotFound):
                    return
            else:
                task.cancel()
            await asyncio.sleep(RETRY_S)
