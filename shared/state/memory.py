"""The store's twin: what the Lua scripts do, on dictionaries, by a clock that is given.

Any number of simulated processes share one `MemoryStore`. Every call gives way to the event loop once before it has its
effect, as a round trip would.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TypeVar

from shared.policy.admission import BacklogReport
from shared.policy.limits import Budget, TenantLimits, Verdict
from shared.request import Incarnation, PlacementId, RequestId, WorkerRef
from shared.state import keys
from shared.state.port import (
    BlockFeedEntry,
    BlockNews,
    LiveWorker,
    Placement,
    PlacementKey,
    PublishedBacklog,
    Registry,
    Renewed,
    RequestHint,
    StateUnavailable,
    WorkerCard,
    WorkerLoad,
)

FEED_READ_LENGTH = 8

MICROSECONDS = 1_000_000

UNITS = 60_000
"""As in take_place.lua."""

T = TypeVar("T")


class Answer(Enum):
    """What becomes of a call."""

    GIVEN = auto()
    LOST = auto()
    """The call has its effect, and the caller gets StateUnavailable."""
    REFUSED = auto()
    """The call has no effect, and the caller gets StateUnavailable."""


@dataclass(slots=True)
class HeldWorker:
    """A slot's holder."""

    card: WorkerCard
    load: WorkerLoad
    ends_ms: int


@dataclass(slots=True)
class Group:
    """Members (-> end of their membership, ms) and the holders of partitions."""

    members: dict[Incarnation, int] = field(default_factory=dict[Incarnation, int])
    holders: dict[int, Incarnation] = field(default_factory=dict[int, Incarnation])


@dataclass(frozen=True, slots=True)
class Credit:
    """Pages that a placement has taken, for as long as it may run, and the work it has brought."""

    num_pages: int
    ends_ms: int
    work_us: int


@dataclass(slots=True)
class Traces:
    """What outlasts a worker for a while: its credits and its feed."""

    ends_ms: int
    credits: dict[PlacementId, Credit] = field(default_factory=dict[PlacementId, Credit])
    feed: list[BlockFeedEntry] = field(default_factory=list[BlockFeedEntry])


@dataclass(slots=True)
class Place:
    """An accepted request's; `num_tokens` were charged for it."""

    tenant: str
    num_tokens: int
    ends_ms: int


@dataclass(slots=True)
class Budgets:
    """A tenant's: what is left of each limit, in units, and up to when it has grown."""

    at_ms: int
    left: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class Contents:
    """All that the store knows; `up_since` and `up_last` as in `keys.up`."""

    up_since_ms: int | None = None
    up_last_ms: int = 0
    slots: dict[int, HeldWorker] = field(default_factory=dict[int, HeldWorker])
    traces: dict[Incarnation, Traces] = field(default_factory=dict[Incarnation, Traces])
    groups: defaultdict[str, Group] = field(default_factory=lambda: defaultdict[str, Group](Group))
    placements: dict[PlacementKey, tuple[Placement, int]] = field(
        default_factory=dict[PlacementKey, tuple[Placement, int]]
    )
    blocks_wanted_until_ms: dict[Incarnation, int] = field(default_factory=dict[Incarnation, int])
    backlogs: dict[Incarnation, tuple[BacklogReport, int]] = field(
        default_factory=dict[Incarnation, tuple[BacklogReport, int]]
    )
    places: dict[RequestId, Place] = field(default_factory=dict[RequestId, Place])
    budgets: dict[str, Budgets] = field(default_factory=dict[str, Budgets])
    requests: dict[RequestId, tuple[RequestHint, int]] = field(default_factory=dict[RequestId, tuple[RequestHint, int]])


class MemoryStore:
    """What the server holds.

    Attributes:
        away: True: nobody reaches it.
        answer: decides what becomes of each call, by the call's name; may be exchanged at any time.
        way_s: seconds that a call takes on its way here and on its way back; may be exchanged at any time.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self.away = False
        self.answer: Callable[[str], Answer] = lambda _: Answer.GIVEN
        self.way_s: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        self.contents = Contents()
        self._clock = clock

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def flush(self) -> None:
        """Forget all."""
        self.contents = Contents()

    def touch_up(self, now_ms: int, lease_ms: int) -> int:
        """As in prelude.lua."""
        contents = self.contents
        if contents.up_since_ms is None or now_ms - contents.up_last_ms > lease_ms / 2:
            contents.up_since_ms = now_ms
        contents.up_last_ms = now_ms
        return now_ms - contents.up_since_ms

    def holder(self, slot: int) -> HeldWorker | None:
        """Who holds the slot now."""
        held = self.contents.slots.get(slot)
        return held if held is not None and held.ends_ms > self.now_ms() else None

    def traces(self, incarnation: Incarnation) -> Traces | None:
        found = self.contents.traces.get(incarnation)
        return found if found is not None and found.ends_ms > self.now_ms() else None

    def renewed_traces(self, incarnation: Incarnation) -> Traces:
        ends_ms = self.now_ms() + keys.WORKER_TRACES_MS
        found = self.traces(incarnation) or Traces(ends_ms)
        found.ends_ms = ends_ms
        self.contents.traces[incarnation] = found
        return found

    def drop_old_credits(self, incarnation: Incarnation) -> None:
        """As in beat.lua."""
        traces, now_ms = self.traces(incarnation), self.now_ms()
        if traces is not None:
            traces.credits = {key: credit for key, credit in traces.credits.items() if credit.ends_ms > now_ms}

    def wants_blocks(self, incarnation: Incarnation) -> bool:
        """Whether somebody wants the full list of the worker's blocks."""
        return self.contents.blocks_wanted_until_ms.get(incarnation, 0) > self.now_ms()

    def live_group(self, name: str) -> Group:
        """The group without members whose membership has ended."""
        group = self.contents.groups[name]
        now_ms = self.now_ms()
        group.members = {member: ends_ms for member, ends_ms in group.members.items() if ends_ms > now_ms}
        return group


class MemoryState:
    """One process's connection to the store; see `State`.

    Attributes:
        cut_off: True: this process does not reach the store.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.cut_off = False
        self._store = store

    async def claim_slot(self, card: WorkerCard, load: WorkerLoad, *, num_slots: int, lease_ms: int) -> int | None:
        def claim() -> int | None:
            self._store.touch_up(self._store.now_ms(), lease_ms)
            free: list[int] = []
            for slot in range(num_slots):
                held = self._store.holder(slot)
                if held is not None and held.card.incarnation == card.incarnation:
                    return self._hold(slot, card, load, lease_ms)
                if held is None:
                    free.append(slot)
            return self._hold(free[0], card, load, lease_ms) if free else None

        return await self._call("claim_slot", claim)

    async def beat(self, slot: int, card: WorkerCard, load: WorkerLoad, *, lease_ms: int) -> Renewed | None:
        def renew() -> Renewed | None:
            up_ms = self._store.touch_up(self._store.now_ms(), lease_ms)
            held = self._store.holder(slot)
            if held is not None and held.card.incarnation != card.incarnation:
                return None
            if held is None and up_ms >= lease_ms:
                return None
            self._hold(slot, card, load, lease_ms)
            self._store.drop_old_credits(card.incarnation)
            return Renewed(blocks_wanted=self._store.wants_blocks(card.incarnation))

        return await self._call("beat", renew)

    async def release_slot(self, slot: int, incarnation: Incarnation) -> None:
        def release() -> None:
            if self._holds(WorkerRef(slot, incarnation)):
                del self._store.contents.slots[slot]

        await self._call("release_slot", release)

    async def workers(self, *, num_slots: int) -> Sequence[LiveWorker]:
        return (await self.registry(num_slots=num_slots)).workers

    async def registry(self, *, num_slots: int) -> Registry:
        def look() -> Registry:
            found: list[LiveWorker] = []
            for slot in sorted(self._store.contents.slots):
                held = self._store.holder(slot) if slot < num_slots else None
                if held is not None:
                    taken = self._credits(held.card.incarnation)
                    work_us = sum(credit.work_us for credit in taken)
                    pages = sum(credit.num_pages for credit in taken)
                    found.append(LiveWorker(slot, held.card, held.load, pages, len(taken), work_us / MICROSECONDS))
            return Registry(found)

        return await self._call("workers", look)

    async def up_ms(self, *, lease_ms: int) -> int:
        return await self._call("up_ms", lambda: self._store.touch_up(self._store.now_ms(), lease_ms))

    async def lease_partitions(
        self, group: str, member: Incarnation, *, num_partitions: int, lease_ms: int
    ) -> frozenset[int]:
        def lease() -> frozenset[int]:
            now_ms = self._store.now_ms()
            self._store.touch_up(now_ms, lease_ms)
            return _settle(self._store.live_group(group), member, num_partitions, now_ms + lease_ms)

        return await self._call("lease_partitions", lease)

    async def leave_group(self, group: str, member: Incarnation) -> None:
        def leave() -> None:
            found = self._store.live_group(group)
            found.members.pop(member, None)
            found.holders = {partition: holder for partition, holder in found.holders.items() if holder != member}

        await self._call("leave_group", leave)

    async def group_members(self, group: str) -> frozenset[Incarnation]:
        return await self._call("group_members", lambda: frozenset(self._store.live_group(group).members))

    async def place(
        self,
        key: PlacementKey,
        placement: Placement,
        *,
        num_prefill_pages: int,
        num_decode_pages: int,
        prefill_s: float,
        keep_ms: int,
    ) -> Placement | None:
        pages = {placement.prefill: num_prefill_pages}
        pages[placement.decode] = pages.get(placement.decode, 0) + num_decode_pages

        def take() -> Placement | None:
            now_ms = self._store.now_ms()
            standing = self._standing(key)
            if standing is not None:
                return standing
            if not all(self._has_room(worker, num_pages) for worker, num_pages in pages.items()):
                return None
            ends_ms = now_ms + keep_ms
            for worker, num_pages in pages.items():
                work_us = round(prefill_s * MICROSECONDS) if worker == placement.prefill else 0
                credit = Credit(num_pages, ends_ms, work_us)
                self._store.renewed_traces(worker.incarnation).credits[placement.id] = credit
            self._store.contents.placements[key] = (placement, ends_ms)
            return placement

        return await self._call("place", take)

    async def find_placement(self, key: PlacementKey) -> Placement | None:
        return await self._call("find_placement", lambda: self._standing(key))

    async def computed(self, placement: PlacementId, worker: Incarnation) -> None:
        def note() -> None:
            traces = self._store.traces(worker)
            if traces is not None and placement in traces.credits:
                traces.credits[placement] = replace(traces.credits[placement], work_us=0)

        await self._call("computed", note)

    async def give_back(self, placement: PlacementId, worker: Incarnation) -> None:
        def give() -> None:
            traces = self._store.traces(worker)
            if traces is not None:
                traces.credits.pop(placement, None)

        await self._call("give_back", give)

    async def note_request(self, request_id: RequestId, hint: RequestHint, *, keep_ms: int) -> None:
        def note() -> None:
            if self._request(request_id) is None:
                self._store.contents.requests[request_id] = (hint, self._store.now_ms() + keep_ms)

        await self._call("note_request", note)

    async def find_request(self, request_id: RequestId) -> RequestHint | None:
        return await self._call("find_request", lambda: self._request(request_id))

    async def report_backlog(self, member: Incarnation, report: BacklogReport, *, lease_ms: int) -> None:
        def publish() -> None:
            self._store.contents.backlogs[member] = (report, self._store.now_ms())
            self._drop_old_backlogs(lease_ms)

        await self._call("report_backlog", publish)

    async def backlogs(self, *, lease_ms: int) -> Sequence[PublishedBacklog]:
        def read() -> list[PublishedBacklog]:
            self._drop_old_backlogs(lease_ms)
            now_ms = self._store.now_ms()
            return [
                PublishedBacklog(member, report, (now_ms - at_ms) / 1000)
                for member, (report, at_ms) in self._store.contents.backlogs.items()
            ]

        return await self._call("backlogs", read)

    async def take_place(
        self, tenant: str, request_id: RequestId, limits: TenantLimits, *, num_tokens: int, keep_ms: int
    ) -> Verdict:
        return await self._call(
            "take_place", lambda: _take_place(self._store, tenant, request_id, limits, num_tokens, keep_ms)
        )

    async def leave_place(self, request_id: RequestId, *, num_tokens: int) -> None:
        def leave() -> None:
            place = self._place(request_id)
            if place is None:
                return
            del self._store.contents.places[request_id]
            budgets = self._store.contents.budgets.get(place.tenant)
            if budgets is not None and "tokens" in budgets.left:
                budgets.left["tokens"] += (place.num_tokens - num_tokens) * UNITS

        await self._call("leave_place", leave)

    async def tenant_of(self, request_id: RequestId) -> str | None:
        def look() -> str | None:
            place = self._place(request_id)
            return place.tenant if place is not None else None

        return await self._call("tenant_of", look)

    async def announce_blocks(self, incarnation: Incarnation, sequence: int, news: BlockNews) -> None:
        def add() -> None:
            feed = self._store.renewed_traces(incarnation).feed
            if feed and feed[-1].sequence >= sequence:
                return
            if news.is_full:
                feed.clear()
                self._store.contents.blocks_wanted_until_ms.pop(incarnation, None)
            feed.append(BlockFeedEntry(incarnation, sequence, news, cursor=f"{sequence + 1}-0"))
            del feed[: -keys.BLOCK_FEED_LENGTH]

        await self._call("announce_blocks", add)

    async def read_block_feeds(self, cursors: Mapping[Incarnation, str]) -> Sequence[BlockFeedEntry]:
        def read() -> list[BlockFeedEntry]:
            found: list[BlockFeedEntry] = []
            for incarnation, cursor in cursors.items():
                first = int(cursor.partition("-")[0])
                traces = self._store.traces(incarnation)
                feed = traces.feed if traces is not None else []
                found += [entry for entry in feed if entry.sequence >= first][:FEED_READ_LENGTH]
            return found

        return await self._call("read_block_feeds", read)

    async def ask_for_blocks(self, incarnation: Incarnation) -> None:
        def ask() -> None:
            until_ms = self._store.now_ms() + keys.WORKER_TRACES_MS
            self._store.contents.blocks_wanted_until_ms[incarnation] = until_ms

        await self._call("ask_for_blocks", ask)

    async def reachable(self) -> bool:
        return not self._store.away and not self.cut_off

    def _hold(self, slot: int, card: WorkerCard, load: WorkerLoad, lease_ms: int) -> int:
        self._store.contents.slots[slot] = HeldWorker(card, load, self._store.now_ms() + lease_ms)
        traces = self._store.traces(card.incarnation)
        if traces is not None:
            self._store.renewed_traces(card.incarnation)
        return slot

    def _holds(self, worker: WorkerRef) -> bool:
        held = self._store.holder(worker.slot)
        return held is not None and held.card.incarnation == worker.incarnation

    def _has_room(self, worker: WorkerRef, num_pages: int) -> bool:
        held = self._store.holder(worker.slot)
        if held is None or held.card.incarnation != worker.incarnation or not held.load.takes_work:
            return False
        taken = [credit.num_pages for credit in self._credits(worker.incarnation)]
        return len(taken) < held.card.max_running and sum(taken) + num_pages <= held.card.num_pages

    def _credits(self, incarnation: Incarnation) -> list[Credit]:
        traces = self._store.traces(incarnation)
        return list(traces.credits.values()) if traces is not None else []

    def _drop_old_backlogs(self, lease_ms: int) -> None:
        contents, oldest_ms = self._store.contents, self._store.now_ms() - lease_ms
        contents.backlogs = {member: entry for member, entry in contents.backlogs.items() if entry[1] > oldest_ms}

    def _place(self, request_id: RequestId) -> Place | None:
        found = self._store.contents.places.get(request_id)
        return found if found is not None and found.ends_ms > self._store.now_ms() else None

    def _standing(self, key: PlacementKey) -> Placement | None:
        found = self._store.contents.placements.get(key)
        return found[0] if found is not None and found[1] > self._store.now_ms() else None

    def _request(self, request_id: RequestId) -> RequestHint | None:
        found = self._store.contents.requests.get(request_id)
        return found[0] if found is not None and found[1] > self._store.now_ms() else None

    async def _call(self, name: str, effect: Callable[[], T]) -> T:
        here_s, back_s = self._store.way_s()
        await asyncio.sleep(here_s)
        answer = Answer.REFUSED if self._store.away or self.cut_off else self._store.answer(name)
        if answer is Answer.REFUSED:
            raise StateUnavailable(f"{name}: the store is away")
        result = effect()
        if back_s:
            await asyncio.sleep(back_s)
        if answer is Answer.LOST:
            raise StateUnavailable(f"{name}: no answer")
        return result


def _take_place(
    store: MemoryStore, tenant: str, request_id: RequestId, limits: TenantLimits, num_tokens: int, keep_ms: int
) -> Verdict:
    """As in take_place.lua."""
    contents, now_ms = store.contents, store.now_ms()
    bounds = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
    limited = {name: limit for name, limit in bounds.items() if limit is not None}
    costs = {"requests": 1, "tokens": num_tokens}
    budgets = contents.budgets.setdefault(tenant, Budgets(now_ms))
    left = {
        name: min(limit * UNITS, budgets.left.get(name, limit * UNITS) + limit * (now_ms - budgets.at_ms))
        for name, limit in limited.items()
    }
    contents.places = {key: place for key, place in contents.places.items() if place.ends_ms > now_ms}
    why, retry_ms = None, 0
    if request_id not in contents.places:
        num_places = sum(place.tenant == tenant for place in contents.places.values())
        if limits.max_concurrent is not None and num_places >= limits.max_concurrent:
            why, retry_ms = "concurrent", 1000
        for name, limit in limited.items():
            wanted = min(costs[name], limit) * UNITS
            if why is None and left[name] < wanted:
                why, retry_ms = name, math.ceil((wanted - left[name]) / limit)
        if why is None:
            left = {name: units - costs[name] * UNITS for name, units in left.items()}
            contents.places[request_id] = Place(tenant, num_tokens, now_ms + keep_ms)
    contents.budgets[tenant] = Budgets(now_ms, left)
    told = {
        name: Budget(limit, max(0, left[name] // UNITS), math.ceil((limit * UNITS - left[name]) / limit) / 1000)
        for name, limit in limited.items()
    }
    return Verdict(why, retry_ms / 1000, told)


def _settle(group: Group, member: Incarnation, num_partitions: int, ends_ms: int) -> frozenset[int]:
    """As in lease_partitions.lua; `group` has live members only."""
    group.members[member] = ends_ms
    num_held = dict.fromkeys(group.members, 0)
    mine: list[int] = []
    free: list[int] = []
    for partition in range(num_partitions):
        holder = group.holders.get(partition)
        if holder == member:
            mine.append(partition)
        elif holder is not None and holder in num_held:
            num_held[holder] += 1
        else:
            free.append(partition)
    smaller, num_larger = divmod(num_partitions, len(group.members))
    num_larger -= sum(count > smaller for name, count in num_held.items() if name != member)
    share = smaller + 1 if num_larger > 0 else smaller
    for partition in mine[share:]:
        del group.holders[partition]
    taken = [*mine[:share], *free[: max(0, share - len(mine))]]
    group.holders |= dict.fromkeys(taken, member)
    return frozenset(taken)
