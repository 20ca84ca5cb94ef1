"""How a request enters a decode worker: wait for pages, pull the KV into them, wait for the first token, run.

    ticket ──> room ──> reserved ──> pulled ───────┐
                            └──> pull failed: freed ├── first token ──> runs, or is prefilled here
                                                    ┘
The pull goes on while prefill still computes, so the first token may come in any of these states.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from shared.blocks import token_ids
from shared.engine.port import EngineRequest, Reservation
from shared.errors import KvTransferFailed
from shared.observe.metrics import LocalPrefill
from shared.request import Event, PlacementId, Stamps
from shared.state.keys import BEAT_INTERVAL_S
from shared.transfer.port import Pulled
from shared.wire.to_worker import DecodeWork, FirstToken, LocalWork
from shared.wire.wire_format import WireFormat
from shared.worker.role import WorkerContext

LOOK_AGAIN_S = 0.1
"""For room; pages that a batch in flight kept are free behind it, which nobody tells."""


class Arrival:
    """One placement that has a ticket and does not run yet.

    Attributes:
        came_s: when its ticket came, unix seconds: its prefill worker was there.
        stamps: passed and not published yet.
        first_token: the token that prefill made.
        wire_format: in which its KV came; NATIVE as long as none came.
    """

    def __init__(self, work: DecodeWork, came_s: float) -> None:
        self.work = work
        self.came_s = came_s
        self.stamps: Stamps = {}
        self.first_token: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.wire_format = WireFormat.NATIVE
        self.pull_limit: asyncio.Timeout | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def key(self) -> PlacementId:
        return self.work.assignment.placement


@dataclass(frozen=True, slots=True)
class Ends:
    """Whom an arrival is handed to. One of them is called, once; `refused` may follow `arrived`.

    Attributes:
        arrived: KV, or the news that it will not come, and token are there: the engine is asked to run the request.
        refused: the engine can never run it, for this reason.
        given_up: its first token will not come: its deadline passed, or prefill is gone.
    """

    arrived: Callable[[Arrival], None]
    refused: Callable[[Arrival, str], None]
    given_up: Callable[[Arrival], None]


class Intake:
    """Takes tickets in order: the first one waits for pages, those that have them pull at the same time.

    Args:
        pull_timeout_s: a pull that is not done so long after the first token has come has failed.
    """

    def __init__(self, context: WorkerContext, ends: Ends, *, pull_timeout_s: float) -> None:
        self._context = context
        self._ends = ends
        self._pull_timeout_s = pull_timeout_s
        self._turn = asyncio.Lock()
        self._room_changed = asyncio.Event()
        self._arrivals: dict[PlacementId, Arrival] = {}
        self._loop = asyncio.get_running_loop()

    def take(self, work: DecodeWork) -> None:
        arrival = self._arrivals[work.assignment.placement] = Arrival(work, self._context.clock_s())
        arrival.task = self._context.tasks.create_task(self._bring_in(arrival))

    def take_token(self, message: FirstToken) -> bool:
        """The token behind an arrival's ids; False if none waits for it."""
        arrival = self._arrivals.get(message.placement)
        if arrival is None or arrival.first_token.done():
            return False
        arrival.stamps[Event.TRANSFERRING] = self._context.clock_s()
        arrival.first_token.set_result(message.token_id)
        if arrival.pull_limit is not None:
            arrival.pull_limit.reschedule(self._loop.time() + self._pull_timeout_s)
        return True

    def stop(self, placement: PlacementId) -> bool:
        """Forget an arrival; False if there is none. Pages that a pull writes to are freed when it has ended."""
        arrival = self._arrivals.pop(placement, None)
        if arrival is None:
            return False
        assert arrival.task is not None
        arrival.task.cancel()
        return True

    def room_changed(self) -> None:
        """Pages or seats may have become free."""
        self._room_changed.set()

    def arrivals(self) -> list[DecodeWork]:
        return [arrival.work for arrival in self._arrivals.values()]

    async def _bring_in(self, arrival: Arrival) -> None:
        """The whole way of one arrival; `stop` cancels it wherever it is."""
        runs = False
        try:
            reservation = await self._reserve(arrival)
            pulled = await self._pull(arrival, reservation)
            if pulled is None:
                self._free(arrival.key)
            token_id = await self._first_token(arrival)
            del self._arrivals[arrival.key]
            if token_id is None:
                self._ends.given_up(arrival)
                return
            self._ends.arrived(arrival)
            await self._run(arrival, token_id, pulled)
            runs = True
        except _Refused as refusal:
            self._arrivals.pop(arrival.key, None)
            self._ends.refused(arrival, str(refusal))
        finally:
            if not runs:
                self._free(arrival.key)

    async def _reserve(self, arrival: Arrival) -> Reservation:
        """Pages for the ids, when it is the arrival's turn and there are enough. Raises _Refused."""
        request = engine_request(arrival.work)
        async with self._turn:
            while True:
                self._room_changed.clear()
                try:
                    reservation = await self._context.engine.call(lambda engine: engine.reserve(request))
                except ValueError as error:
                    raise _Refused(str(error)) from error
                if reservation is not None:
                    return reservation
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await self._room_changed.wait()

    async def _pull(self, arrival: Arrival, reservation: Reservation) -> Pulled | None:
        """Fill the reserved pages; None if that failed.

        While prefill computes there is no limit but the request's deadline; the first token begins another.
        """
        context, work = self._context, arrival.work
        started_s = context.clock_s()
        first, last = reservation.num_cached_pages, len(reservation.pages)
        arrival.pull_limit = asyncio.timeout(self._pull_timeout_s if arrival.first_token.done() else None)
        try:
            if work.ticket.num_tokens != len(work.ids):
                raise KvTransferFailed(f"the ticket is for {work.ticket.num_tokens} ids, there are {len(work.ids)}")
            async with arrival.pull_limit:
                pulled = await context.transfer.pull(
                    work.ticket,
                    want=range(first, last),
                    into=reservation.pages[first:last],
                    timeout_s=max(0.0, work.assignment.deadline_s - started_s),
                )
        except (KvTransferFailed, TimeoutError) as error:
            reason = str(error) or f"not done {self._pull_timeout_s} s after the first token"
            context.log.warning("KV not pulled, to be computed here", placement=arrival.key, reason=reason)
            return None
        finally:
            arrival.pull_limit = None
        arrival.wire_format = pulled.format
        context.metrics.observe_pull(
            pulled.format,
            seconds=context.clock_s() - started_s,
            kv_bytes=(last - first) * context.page_bytes,
            wire_bytes=pulled.wire_bytes,
        )
        return pulled

    async def _first_token(self, arrival: Arrival) -> int | None:
        """None: the request's deadline passed first, or prefill is gone.

        A stop should have come then, but its owner may be gone too, or may never have heard of the placement, or see
        the prefill worker.
        """
        work, context = arrival.work, self._context
        while not arrival.first_token.done() and not context.is_gone(work.ticket.source, arrival.came_s):
            left_s = work.assignment.deadline_s - context.clock_s()
            if left_s <= 0:
                break
            await asyncio.wait({arrival.first_token}, timeout=min(left_s, BEAT_INTERVAL_S))
        return arrival.first_token.result() if arrival.first_token.done() else None

    async def _run(self, arrival: Arrival, token_id: int, pulled: Pulled | None) -> None:
        """Raises _Refused for a token that is none of the model's."""
        key = arrival.key
        if pulled is None:
            self._context.metrics.count_local_prefill(LocalPrefill.PULL_FAILED)
            request = engine_request(arrival.work)
            whole = replace(request, ids=request.ids + token_ids((token_id,)))
            taken = self._context.engine.call(lambda engine: engine.add(whole))
        else:
            exact = pulled.format is WireFormat.NATIVE
            taken = self._context.engine.call(lambda engine: engine.imported(key, token_id, exact=exact))
        try:
            await taken
        except ValueError as error:
            raise _Refused(str(error)) from error

    def _free(self, key: PlacementId) -> None:
        """Give back what was reserved, if anything was: room for whoever waits."""
        freed = self._context.engine.call(lambda engine: engine.abort(key))
        freed.add_done_callback(lambda _: self._room_changed.set())


class _Refused(Exception):
    """The engine can never run it."""


def engine_request(work: DecodeWork | LocalWork) -> EngineRequest:
    """The choice as the engine knows it, up to the first token."""
    assignment = work.assignment
    return EngineRequest(
        key=assignment.placement,
        ids=work.ids,
        prompt_len=assignment.prompt_len,
        sampling=assignment.sampling,
        choice=assignment.choice,
        cache_salt=assignment.cache_salt,
    )
