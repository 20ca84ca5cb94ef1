"""Coordination: who holds which slot and partition, what each worker has taken on, where a request was placed.

Nothing here is the truth about a request (that is the log). All calls are idempotent, so a call whose answer got lost
is simply made again; the client does that itself within its deadline and raises StateUnavailable after it, when it is
not known whether the call had its effect. Cancelling a call does not undo it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from shared.blocks import BlockHash
from shared.errors import BatonError
from shared.policy.admission import BacklogReport
from shared.policy.limits import TenantLimits, Verdict
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Incarnation, PlacementId, RequestId, WorkerRef

MAX_NEWS_BLOCKS = 1024
"""In one announcement: so that a reader is done with it in a fraction of a millisecond."""


class StateUnavailable(BatonError):
    """Redis did not answer within the call's deadline."""


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What does not change about a worker while it lives.

    Attributes:
        name: for people.
        max_context: positions of its model.
        num_pages: pages of its cache.
        max_running: requests it runs at once.
        max_batch_tokens: prompt tokens and decode rows of one step.
        page_bytes: of one page's KV as the model wrote it.
        num_host_pages: pages in host memory that hold what falls out of its cache; 0: it has no such tier.
        transfer_address: its KV listener, "host:port".
        layout_fingerprint: of its pages; KV moves only between equal ones.
    """

    incarnation: Incarnation
    role: Role
    name: str
    model: str
    model_fingerprint: str
    max_context: int
    num_pages: int
    max_running: int
    max_batch_tokens: int
    page_bytes: int
    num_host_pages: int
    transfer_address: str
    layout_fingerprint: str


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker says of itself at each beat.

    Attributes:
        draining: it takes no new work.
        log_away: the log has answered it nothing for a lease: what it makes reaches nobody.
        profile: its measured speeds; None: it has measured nothing yet.
        links: how fast it pulls KV, by the peer that sends it. Speeds are published rounded: readers take only those
            anew that changed.
    """

    num_free_pages: int
    num_running: int
    num_waiting: int
    draining: bool = False
    log_away: bool = False
    profile: SpeedProfile | None = None
    links: Mapping[Incarnation, LinkRate] = field(default_factory=dict[Incarnation, LinkRate])

    @property
    def takes_work(self) -> bool:
        return not (self.draining or self.log_away)


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker whose lease stands.

    Attributes:
        num_credit_pages, num_credits: taken by placements that have not been given back yet.
        credit_work_s: of prefill that those have brought and that is not computed yet, as predicted when they were
            made.
    """

    slot: int
    card: WorkerCard
    load: WorkerLoad
    num_credit_pages: int
    num_credits: int
    credit_work_s: float

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.slot, self.card.incarnation)


@dataclass(frozen=True, slots=True)
class Registry:
    """Who holds the slots.

    Attributes:
        workers: by slot.
        unreadable: they hold slots too, but what they say of themselves is of another version than this process: they
            live, and no more is known of them.
    """

    workers: Sequence[LiveWorker]
    unreadable: frozenset[Incarnation] = frozenset()

    @property
    def holders(self) -> frozenset[Incarnation]:
        """All of them."""
        return self.unreadable.union(worker.card.incarnation for worker in self.workers)


@dataclass(frozen=True, slots=True)
class PlacementKey:
    """Names one decision: place this choice for this epoch."""

    request_id: RequestId
    choice: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a choice runs."""

    id: PlacementId
    prefill: WorkerRef
    decode: WorkerRef


@dataclass(frozen=True, slots=True)
class RequestHint:
    """Where a request's first `open` or `cut` stands on `stream-out`."""

    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class PublishedBacklog:
    """What an ingest said of its line, `age_s` ago."""

    member: Incarnation
    report: BacklogReport
    age_s: float


@dataclass(frozen=True, slots=True)
class Renewed:
    """A beat that found the slot still held.

    Attributes:
        blocks_wanted: a reader lost track of the worker's blocks; asked at each beat until the worker announces its
            full list.
    """

    blocks_wanted: bool = False


@dataclass(frozen=True, slots=True)
class BlockNews:
    """What a worker announces at once about the blocks it holds; of each tier a block is in it once.

    Attributes:
        stored, evicted: on its GPU.
        host_stored, host_evicted: in its host memory.
        is_full: nothing that was announced before counts any more. A long list goes on in the announcements behind it.
    """

    stored: tuple[BlockHash, ...] = ()
    evicted: tuple[BlockHash, ...] = ()
    host_stored: tuple[BlockHash, ...] = ()
    host_evicted: tuple[BlockHash, ...] = ()
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class BlockFeedEntry:
    """One announcement of a worker.

    Attributes:
        sequence: 0, 1, 2, ... without gaps for one incarnation.
        cursor: pass to the next read.
    """

    incarnation: Incarnation
    sequence: int
    news: BlockNews
    cursor: str


class State(Protocol):
    """A connection to the coordination store. `lease_ms` arguments are in milliseconds of the store's own clock."""

    # Workers
    async def claim_slot(self, card: WorkerCard, load: WorkerLoad, *, num_slots: int, lease_ms: int) -> int | None:
        """Take the lowest free slot (the same one if this incarnation holds one); None: all are taken."""
        ...

    async def beat(self, slot: int, card: WorkerCard, load: WorkerLoad, *, lease_ms: int) -> Renewed | None:
        """Renew the slot's lease and publish the load; None: the lease was lost, whoever holds the slot now.

        One exception: if the store itself was emptied, or out of everybody's reach, less than a lease ago (`up_ms`),
        a slot that nobody holds is taken again, for its lease ended through no fault of its holder. A worker that
        stood still together with everybody else is not told; it must watch its own clock. What an emptied store knew
        of credits does not come back: until what runs has ended, more is placed than fits, and waits in the engine.
        """
        ...

    async def release_slot(self, slot: int, incarnation: Incarnation) -> None:
        """Give the slot back, if this incarnation holds it."""
        ...

    async def registry(self, *, num_slots: int) -> Registry:
        """All workers whose lease stands."""
        ...

    async def workers(self, *, num_slots: int) -> Sequence[LiveWorker]:
        """The registry's workers, as far as they can be read: not for judging who lives."""
        ...

    async def up_ms(self, *, lease_ms: int) -> int:
        """For how long the store has been in use without a loss of its memory or a gap of half a lease.

        Below `lease_ms`, that a lease is missing says nothing about its holder: no verdict, no placement. To judge by
        what another call returned, ask this after it.
        """
        ...

    # Partitions
    async def lease_partitions(
        self, group: str, member: Incarnation, *, num_partitions: int, lease_ms: int
    ) -> frozenset[int]:
        """Renew this member's partitions and settle its share: free ones are taken, surplus ones given up.

        Shares differ by one partition at most. Returns what it holds now; no other member holds any of these before
        it was told so by a later call, or `lease_ms` have passed without one.
        """
        ...

    async def leave_group(self, group: str, member: Incarnation) -> None:
        """Give up membership and all partitions."""
        ...

    async def group_members(self, group: str) -> frozenset[Incarnation]:
        """Members whose membership stands."""
        ...

    # Placement
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
        """Take credits on both workers and record the placement, atomically.

        Pages of both, and on the prefill worker `prefill_s` of work (0 or more; kept to the microsecond).

        Returns the placement that stands for `key` (an earlier one, if this was asked before), or None: one of the
        workers lost its slot, has said that it is draining or that the log is away, has credits for max_running
        placements already, or has not enough pages left beside the credits taken (capacity = its card's num_pages).
        Prefill and decode may be the same worker; it then needs the sum. `keep_ms` must exceed the time within which
        the call may be made again, and that for which the placement may run: credits that nobody has given back by
        then, as nobody lived who knew of them, end at a beat of their worker.
        """
        ...

    async def find_placement(self, key: PlacementKey) -> Placement | None:
        """The placement that stands for `key`, whether its credits were given back or not."""
        ...

    async def computed(self, placement: PlacementId, worker: Incarnation) -> None:
        """The placement's prefill on this worker is computed: its work is given back, its pages stay taken."""
        ...

    async def give_back(self, placement: PlacementId, worker: Incarnation) -> None:
        """Return the placement's credits on one worker, pages and work; again does nothing."""
        ...

    async def note_request(self, request_id: RequestId, hint: RequestHint, *, keep_ms: int) -> None:
        """Remember where the request's story begins; the first note stands."""
        ...

    async def find_request(self, request_id: RequestId) -> RequestHint | None: ...

    # Admission
    async def report_backlog(self, member: Incarnation, report: BacklogReport, *, lease_ms: int) -> None:
        """Publish how long an ingest's line is; the report is gone after `lease_ms`."""
        ...

    async def backlogs(self, *, lease_ms: int) -> Sequence[PublishedBacklog]:
        """What each ingest said at its last beat, if that was less than `lease_ms` ago."""
        ...

    async def take_place(
        self, tenant: str, request_id: RequestId, limits: TenantLimits, *, num_tokens: int, keep_ms: int
    ) -> Verdict:
        """Note that the request is accepted for the tenant, and charge its budgets with it, if the limits allow it.

        A request that has a place gets it again and is not charged. The place ends after `keep_ms` in any case. A
        cost of more than a minute's tokens waits for a full budget, and leaves a debt.
        """
        ...

    async def leave_place(self, request_id: RequestId, *, num_tokens: int) -> None:
        """The request has ended, or never began: its place is free, and what it really cost is charged instead of
        what was guessed. Again, or of a request without a place, does nothing."""
        ...

    async def tenant_of(self, request_id: RequestId) -> str | None:
        """For whom the request has a place."""
        ...

    # Blocks
    async def announce_blocks(self, incarnation: Incarnation, sequence: int, news: BlockNews) -> None:
        """Append to the worker's feed. A sequence number at or below the last one does nothing.

        A full list takes the place of all that stood in the feed. `pieces` cuts news that are too long for one entry.
        """
        ...

    async def read_block_feeds(self, cursors: Mapping[Incarnation, str]) -> Sequence[BlockFeedEntry]:
        """Entries behind the cursors ("0" reads from the start of what is kept), in order for each worker.

        Not always all there are: who reads until nothing comes has read all that can be read. What another version
        announced is missing: a gap.
        """
        ...

    async def ask_for_blocks(self, incarnation: Incarnation) -> None:
        """Ask a worker for the full list of its blocks: its beats tell it so until it has announced one.

        Nobody answers if the worker is gone; if the store loses its memory, the question is lost too.
        """
        ...

    async def reachable(self) -> bool:
        """Whether the store answers now (readiness)."""
        ...


def pieces(news: BlockNews) -> list[BlockNews]:
    """The same news in announcements of at most MAX_NEWS_BLOCKS blocks, to be made in this order."""
    found: list[BlockNews] = []
    room = 0
    for name in ("stored", "host_stored", "evicted", "host_evicted"):
        blocks: tuple[BlockHash, ...] = getattr(news, name)
        while blocks:
            if room == 0:
                found.append(BlockNews(is_full=news.is_full and not found))
                room = MAX_NEWS_BLOCKS
            found[-1] = replace(found[-1], **{name: blocks[:room]})
            taken, blocks = len(blocks[:room]), blocks[room:]
            room -= taken
    return found or [news]
