"""How a request enters a decode worker: wait for pages, pull the KV into them, join the running batch."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shared.engine.port import EngineRequest, Reservation
from shared.errors import KvTransferFailed
from shared.request import Event, PlacementId, Stamps
from shared.wire.to_worker import DecodeWork
from shared.worker.role import WorkerContext


@dataclass(slots=True)
class Arrival:
    """One placement that has a ticket and does not run yet."""

    work: DecodeWork
    stamps: Stamps
    stopped: bool = False
    pulling: bool = False

    @property
    def key(self) -> PlacementId:
        return self.work.assignment.placement


class Intake:
    """Takes tickets in order: the first one waits for pages, those that have them pull at the same time.

    Args:
        pull_timeout_s: a pull that takes longer has failed.
        arrived: called when the engine runs the request, or will once it has prefilled it.
        refused: called with the reason if the engine can never run it.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        pull_timeout_s: float,
        arrived: Callable[[Arrival], None],
        refused: Callable[[Arrival, str], None],
    ) -> None:
        self._context = context
        self._pull_timeout_s = pull_timeout_s
        self._arrived = arrived
        self._refused = refused
        self._waiting: asyncio.Queue[Arrival] = asyncio.Queue()
        self._room_changed = asyncio.Event()
        self._arrivals: dict[PlacementId, Arrival] = {}
        context.tasks.create_task(self._reserve_for_ever())

    def take(self, work: DecodeWork) -> None:
        arrival = Arrival(work, stamps={})
        self._arrivals[arrival.key] = arrival
        self._waiting.put_nowait(arrival)

    def stop(self, placement: PlacementId) -> bool:
        """Forget an arrival; False if there is none. Pages that a pull writes to are freed when it has ended."""
        arrival = self._arrivals.get(placement)
        if arrival is None:
            return False
        arrival.stopped = True
        self._room_changed.set()
        return True

    def room_changed(self) -> None:
        """Pages or seats may have become free."""
        self._room_changed.set()

    def arrivals(self) -> list[DecodeWork]:
        return [arrival.work for arrival in self._arrivals.values() if not arrival.stopped]

    async def _reserve_for_ever(self) -> None:
        while True:
            arrival = await self._waiting.get()
            try:
                reservation = await self._reserve_when_room(arrival)
            except ValueError as error:
                self._arrivals.pop(arrival.key)
                self._refused(arrival, str(error))
                continue
            if reservation is None:
                self._arrivals.pop(arrival.key)
            else:
                self._context.tasks.create_task(self._pull(arrival, reservation))

    async def _reserve_when_room(self, arrival: Arrival) -> Reservation | None:
        """Pages for the arrival, or None if it is stopped before there are any."""
        request = engine_request(arrival.work)
        while not arrival.stopped:
            self._room_changed.clear()
            reservation = await self._context.engine.call(lambda engine: engine.reserve(request))
            if reservation is not None:
                return reservation
            await self._room_changed.wait()
        return None

    async def _pull(self, arrival: Arrival, reservation: Reservation) -> None:
        """Fill the reserved pages; where that fails, let the engine compute them here."""
        context, key = self._context, arrival.key
        started_s = context.clock_s()
        arrival.stamps[Event.TRANSFERRING] = started_s
        first, last = reservation.num_cached_pages, len(reservation.pages)
        try:
            if not arrival.stopped:
                await context.transfer.pull(
                    arrival.work.ticket,
                    want=range(first, last),
                    into=reservation.pages[first:last],
                    timeout_s=self._pull_timeout_s,
                )
        except KvTransferFailed as error:
            context.log.warning("KV not pulled, prefilling here", placement=key, reason=str(error))
            self._prefill_here(arrival)
            return
        finally:
            self._arrivals.pop(key)
        if arrival.stopped:
            self._give_up(key)
            return
        context.metrics.transfer_seconds.observe(context.clock_s() - started_s)
        context.metrics.transfer_bytes.inc((last - first) * context.page_bytes)
        context.engine.call(lambda engine: engine.imported(key))
        self._arrived(arrival)

    def _prefill_here(self, arrival: Arrival) -> None:
        self._give_up(arrival.key)
        if arrival.stopped:
            return
        self._context.metrics.local_prefills.inc()
        self._context.engine.call(lambda engine: engine.add(engine_request(arrival.work)))
        self._arrived(arrival)

    def _give_up(self, key: PlacementId) -> None:
        """Free what was reserved: room for whoever waits."""
        freed = self._context.engine.call(lambda engine: engine.abort(key))
        freed.add_done_callback(lambda _: self._room_changed.set())


def engine_request(work: DecodeWork) -> EngineRequest:
    """The choice as the engine knows it."""
    assignment = work.assignment
    return EngineRequest(
        key=assignment.placement,
        ids=work.ids,
        prompt_len=assignment.prompt_len,
        sampling=assignment.sampling,
        choice=assignment.choice,
        cache_salt=assignment.cache_salt,
    )
