"""Do we take it? What bounds an edge: clients at once, the wait for a placement, the limits of tenants.

What would only wait to be late is refused at once, so that what is accepted is answered in time. The limits live in
Redis, shared by all edges; while it is away they hold nobody up.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

from services.stream_out.metrics import EdgeMetrics
from services.stream_out.settings import Settings
from services.stream_out.takeover import GROUP
from shared.errors import EdgeDraining, Overloaded, RateLimited
from shared.observe.log import Logger
from shared.policy.admission import Forecast
from shared.policy.limits import TenantLimits
from shared.request import Priority, RequestId
from shared.state.keys import LEASE_MS, LEASE_S
from shared.state.port import PublishedBacklog, State, StateUnavailable

FULL_RETRY_S = 1.0

MAX_RETRY_S = 5.0
"""The prediction changes with each beat, and who comes back too early is refused again in milliseconds: after an outage
a line that seemed long is gone in a second."""

CLIENTS_A_REQUEST = 4
"""Of a tenant's, at one edge: who reads, who looks on, and those that were cut off and are not known to be gone."""

ON_THE_WAY_S = 0.5
"""A job is counted by ingest so long after it was accepted, or before."""

MAX_AGE_S = 2 * LEASE_S + ON_THE_WAY_S
"""What was accepted longer ago than this every report counts: older reports are not used."""

PLACE_SLACK_S = 60.0
"""A place outlasts its request's deadline by this: the owner ends the request then, and gives the place back."""

MAX_OWED = 10_000
"""Places that wait for the store to be given back. Of more, those of the oldest end by themselves."""

MAX_OWED_A_BEAT = 100

CUT_TIMEOUT_S = 1.0
"""Exchanges that are cut at the end of a drain are over within this."""


class Admission:
    """Of one edge.

    Args:
        clock_s: unix seconds.

    Attributes:
        draining: no client is taken any more.
        cut: set when those who are still there must go.
        blind: the store is away: nobody is refused for a wait or a limit.
    """

    def __init__(
        self,
        state: State,
        settings: Settings,
        *,
        clock_s: Callable[[], float],
        logger: Logger,
        metrics: EdgeMetrics,
    ) -> None:
        self.draining = False
        self.cut = asyncio.Event()
        self.blind = False
        self._state = state
        self._settings = settings
        self._clock_s = clock_s
        self._logger = logger
        self._metrics = metrics
        self._num_clients = 0
        self._clients: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self._backlogs: Sequence[PublishedBacklog] = ()
        self._num_edges = 1
        self._read_s = clock_s()
        self._accepted: deque[tuple[float, int, Priority]] = deque()
        self._owed: deque[tuple[RequestId, int]] = deque(maxlen=MAX_OWED)

    @contextmanager
    def client(self, tenant: str, limits: TenantLimits) -> Iterator[None]:
        """One client's exchange, from before its body is read to the end of its answer.

        Raises Overloaded, and RateLimited for a tenant whose requests are limited and that has more clients than these
        need: it must not take the places of the others by following one request a thousand times.
        """
        if self.draining:
            raise EdgeDraining("this edge is leaving; another one takes the request", retry_after_s=FULL_RETRY_S)
        if self._num_clients >= self._settings.max_streams:
            self._metrics.refused.labels("streams").inc()
            raise Overloaded(f"{self._settings.max_streams} clients are served here", retry_after_s=FULL_RETRY_S)
        if limits.max_concurrent is not None and self._clients[tenant] >= CLIENTS_A_REQUEST * limits.max_concurrent:
            self._metrics.refused.labels("concurrent").inc()
            raise RateLimited("the tenant has too many clients here", retry_after_s=FULL_RETRY_S, headers={})
        self._num_clients += 1
        self._clients[tenant] += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_clients -= 1
            self._clients -= Counter((tenant,))  # who has none left is no key any more
            if not self._num_clients:
                self._empty.set()

    def check_wait(self, deadline_s: float, priority: Priority, max_new_tokens: int | None) -> None:
        """Raises Overloaded if a request would wait too long for its placement, or its answer come too late."""
        now_s = self._clock_s()
        if now_s - self._read_s > LEASE_S:
            self._metrics.unlimited.inc()
            return
        backlogs = [each.report for each in self._backlogs]
        forecast = Forecast.of(backlogs, self._num_accepted_since(priority), priority, max_new_tokens)
        refusal = forecast.check(deadline_s - now_s, self._settings.max_queue_s, priority)
        if refusal is not None:
            self._metrics.refused.labels(refusal.cause).inc()
            raise Overloaded(refusal.told, retry_after_s=min(max(refusal.excess_s, FULL_RETRY_S), MAX_RETRY_S))

    def count(self, num_choices: int, priority: Priority) -> None:
        """So many choices are being accepted: no report counts them yet. Batch is in nobody's way."""
        if priority is Priority.BATCH:
            return
        now_s = self._clock_s()
        while self._accepted and self._accepted[0][0] < now_s - MAX_AGE_S:
            self._accepted.popleft()
        self._accepted.append((now_s, num_choices, priority))

    async def take_place(
        self, tenant: str, limits: TenantLimits, request_id: RequestId, *, num_tokens: int, deadline_s: float
    ) -> dict[str, str]:
        """Note for whom the request is accepted; HTTP headers that tell where its tenant stands. Raises RateLimited."""
        keep_ms = int((max(0.0, deadline_s - self._clock_s()) + PLACE_SLACK_S) * 1000)
        try:
            verdict = await self._state.take_place(tenant, request_id, limits, num_tokens=num_tokens, keep_ms=keep_ms)
        except StateUnavailable:
            self._metrics.unlimited.inc()
            return {}
        if verdict.refused_by is not None:
            self._metrics.refused.labels(verdict.refused_by).inc()
            raise RateLimited(
                f"the tenant's limit of {verdict.refused_by} is reached",
                retry_after_s=verdict.retry_after_s,
                headers=verdict.headers,
            )
        return verdict.headers

    async def leave_place(self, request_id: RequestId, num_tokens: int) -> None:
        """Give a request's place back, while the store is away as soon as it is there again."""
        try:
            if not self.blind:
                await self._state.leave_place(request_id, num_tokens=num_tokens)
                return
        except StateUnavailable:
            pass
        self._owed.append((request_id, num_tokens))

    async def _leave_owed(self) -> None:
        """Raises StateUnavailable."""
        for _ in range(min(len(self._owed), MAX_OWED_A_BEAT)):
            request_id, num_tokens = self._owed[0]
            await self._state.leave_place(request_id, num_tokens=num_tokens)
            self._owed.popleft()

    async def drain(self, timeout_s: float) -> None:
        """Take nobody any more, let who is there come to an end, and cut who is left after `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            self._logger.info("clients are sent elsewhere", clients=self._num_clients)
            self.cut.set()
            try:
                async with asyncio.timeout(CUT_TIMEOUT_S):
                    await self._empty.wait()
            except TimeoutError:
                self._logger.warning("clients are left", clients=self._num_clients)

    async def look(self) -> None:
        """Read the backlogs, once a beat, and give back places that could not be given back before."""
        asked_s = self._clock_s()
        try:
            self._backlogs = await self._state.backlogs(lease_ms=LEASE_MS)
            self._num_edges = max(1, len(await self._state.group_members(GROUP)))
            self.blind, self._read_s = False, asked_s
            await self._leave_owed()
        except StateUnavailable:
            self.blind = True

    def _num_accepted_since(self, priority: Priority) -> int:
        """Choices before one of `priority` that all edges accepted and no report counts yet, if each accepts as much as
        this one."""
        age_s = max((each.age_s for each in self._backlogs), default=0.0)
        counted_s = self._read_s - age_s - ON_THE_WAY_S
        since = takewhile(lambda accepted: accepted[0] >= counted_s, reversed(self._accepted))
        ahead = (
            num for _, num, theirs in since if priority is not Priority.INTERACTIVE or theirs is Priority.INTERACTIVE
        )
        return sum(ahead) * self._num_edges
