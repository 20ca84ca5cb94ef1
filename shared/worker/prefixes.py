"""How a prompt enters the engine of whoever computes it: at once, or with its first pages fetched from a peer.

    add ──> pages set aside, in line ──> peer asked ──> filled: what came is found, the rest is computed
                                              └──> nothing came: all is computed

That the peer holds what the ticket says is a hint. Whatever becomes of it, the prompt is computed right; what became of
it is counted. A fetch that has begun goes on when its request is stopped: others may wait for the same pages.
"""

import asyncio
from typing import Any

from shared.blocks import PAGE_TOKENS
from shared.engine.port import Engine, EngineRequest, Fill
from shared.errors import KvTransferFailed
from shared.observe.metrics import PrefixFetch
from shared.transfer.port import MAX_FETCH_BLOCKS, Fetched
from shared.wire.to_worker import FetchTicket
from shared.worker.role import WorkerContext

SHORTEST_LIMIT_S = 0.5
"""The peer may be in a step, which is not the fault of the link."""

LIMIT_SHARE = 2.0
"""A fetch is given up when it took so many times as long as computing what it brings would have."""

UNMEASURED_LIMIT_S = 2.0
"""The limit while this worker does not know how fast it computes."""


class Prefixes:
    """Adds requests to the engine, and brings their first pages where a ticket says from where."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def add(self, request: EngineRequest, ticket: FetchTicket | None) -> asyncio.Future[Any]:
        """`Engine.add`, whose ValueError the future raises."""
        context = self._context
        if ticket is None or not ticket.num_pages:
            return context.engine.call(lambda engine: engine.add(request))
        if ticket.source.incarnation == context.me.incarnation:
            context.metrics.observe_fetch(PrefixFetch.GONE)
            return context.engine.call(lambda engine: engine.add(request))
        num_pages = min(ticket.num_pages, MAX_FETCH_BLOCKS)
        begun = context.engine.call(lambda engine: _begin(engine, request, num_pages))
        context.tasks.create_task(self._fetch(begun, ticket))
        return begun

    async def _fetch(self, begun: asyncio.Future[Fill | None], ticket: FetchTicket) -> None:
        metrics = self._context.metrics
        try:
            fill = await begun
        except ValueError:
            return  # the engine never runs it; who added it tells
        if fill is None:
            metrics.observe_fetch(PrefixFetch.NO_ROOM)
        elif not fill.keys:
            metrics.observe_fetch(PrefixFetch.NEEDLESS)
        else:
            num_arrived = 0
            try:
                num_arrived = await self._bring(fill, ticket)
            finally:
                self._context.engine.call(lambda engine: engine.filled(fill, num_arrived))

    async def _bring(self, fill: Fill, ticket: FetchTicket) -> int:
        """How many of the pages came."""
        context = self._context
        started_s = context.clock_s()
        try:
            fetched = await context.transfer.fetch(
                ticket.address, ticket.source.incarnation, fill.keys, fill.pages, timeout_s=self._limit_s(fill)
            )
        except KvTransferFailed as error:
            context.log.warning("prefix not fetched, to be computed here", source=ticket.source.slot, reason=str(error))
            context.metrics.observe_fetch(PrefixFetch.FAILED, seconds=context.clock_s() - started_s)
            return 0
        context.metrics.observe_fetch(
            _outcome(fetched, len(fill.keys)),
            seconds=context.clock_s() - started_s,
            kv_bytes=fetched.num_pages * context.page_bytes,
        )
        return fetched.num_pages

    def _limit_s(self, fill: Fill) -> float:
        profile = self._context.profile()
        if profile is None:
            return UNMEASURED_LIMIT_S
        compute_s = profile.prefill_s(len(fill.keys) * PAGE_TOKENS, len(fill.found) * PAGE_TOKENS)
        return max(SHORTEST_LIMIT_S, LIMIT_SHARE * compute_s)


def _begin(engine: Engine, request: EngineRequest, num_pages: int) -> Fill | None:
    """Set pages aside before the request is in line: nobody is to compute what comes."""
    fill = engine.fill(request, num_pages)
    try:
        engine.add(request)
    except ValueError:
        if fill is not None:
            engine.filled(fill, 0)
        raise
    return fill


def _outcome(fetched: Fetched, num_wanted: int) -> PrefixFetch:
    if fetched.num_pages == num_wanted:
        return PrefixFetch.WHOLE
    return PrefixFetch.PART if fetched.num_pages else PrefixFetch.GONE
