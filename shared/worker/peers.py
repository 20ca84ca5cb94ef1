"""The workers that this one may pull from: connected to and measured before the first pull, judged, and told of.

At each beat the registry is read. A worker that we may pull from and have not connected to is connected to, one after
the other, so that no self-test disturbs another; where that fails, again later and later. Behind those whose prompts we
take over come, one a beat, all others whose pages fit ours: prefixes may be fetched from them. A peer that restarts
comes as a new incarnation, and one that is gone is forgotten with its lease. That it is gone is known for sure when no
reading for some leases found it: an emptied store knows nobody for a beat.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shared.errors import KvTransferFailed, StartupError
from shared.observe.log import Logger
from shared.policy.profile import LinkRate
from shared.request import Incarnation
from shared.state import keys
from shared.state.port import Role, State, StateUnavailable, WorkerCard
from shared.transfer.plan import GROUP_COST_S
from shared.transfer.port import LinkReport, Transfer
from shared.wire.topics import NUM_SLOTS

LONGEST_RETRY_S = 30.0
"""A peer that cannot be connected to is tried again after a beat, then after twice as long, at last so often."""

GONE_AFTER_S = 5 * keys.LEASE_S
"""A peer is gone when the registry, read all the time, has not named it for so long."""

SOURCES = {Role.DECODE: frozenset({Role.PREFILL}), Role.PREFILL: frozenset[Role]()}
"""Whose prompts a role takes over. It must reach them; prefixes it may fetch from any worker that it reaches."""


@dataclass(frozen=True, slots=True)
class LinkFloor:
    """The slowest link that the operator takes for good.

    Attributes:
        refuse: a worker that finds a slower one before it is open for work ends; else it says that it is degraded.
    """

    gb_per_s: float
    refuse: bool = False


@dataclass(frozen=True, slots=True)
class PeerLink:
    """A link, by the name of the peer.

    Attributes:
        below_floor: its measured speed is under the floor, if there is one.
    """

    peer: str
    report: LinkReport
    below_floor: bool

    @property
    def gb_per_s(self) -> float | None:
        """As measured, in four digits; None before the self-test."""
        return None if self.report.speed is None else float(f"{self.report.speed.bytes_per_s / 1e9:.4g}")


@dataclass(frozen=True, slots=True)
class _Failure:
    """Of the newest try to connect to a peer; `wait_s` until the next."""

    error: str
    wait_s: float
    retry_at_s: float


class Peers:
    """See the module. Nothing here waits for a peer but `refresh`, and a pull never waits for that."""

    def __init__(
        self,
        transfer: Transfer,
        state: State,
        *,
        role: Role,
        incarnation: Incarnation,
        layout_fingerprint: str,
        floor: LinkFloor | None,
        log: Logger,
        clock_s: Callable[[], float],
    ) -> None:
        self._transfer = transfer
        self._state = state
        self._role = role
        self._incarnation = incarnation
        self._layout_fingerprint = layout_fingerprint
        self._floor = floor
        self._log = log
        self._clock_s = clock_s
        self._cards: dict[Incarnation, WorkerCard] = {}  # of all whose pages fit ours
        self._tested: dict[Incarnation, LinkReport] = {}
        self._failures: dict[Incarnation, _Failure] = {}
        self._seen_s: dict[Incarnation, float] = {}
        self._read_since_s = self._read_s = clock_s()

    async def run(self) -> None:
        """Keep the links up, for ever."""
        while True:
            await self.refresh()
            await self._reach_one_more()
            await asyncio.sleep(keys.BEAT_INTERVAL_S)

    async def refresh(self) -> None:
        """Read the registry and connect to the sources that we lack. Without the store all stays as it is."""
        try:
            registry = await self._state.registry(num_slots=NUM_SLOTS)
        except StateUnavailable:
            self._read_since_s = self._read_s = self._clock_s()
            return
        self._cards = {each.card.incarnation: each.card for each in registry.workers if self._may_pull_from(each.card)}
        self._note_seen(registry.holders)
        self._failures = {peer: failure for peer, failure in self._failures.items() if peer in self._cards}
        self._tested = {peer: report for peer, report in self._tested.items() if peer in self._cards}
        for card in self._missing():
            if self._is_due(card):
                await self._connect(card)

    async def _reach_one_more(self) -> None:
        card = next(filter(self._is_due, self._untested()), None)
        if card is not None:
            await self._connect(card)

    def _is_due(self, card: WorkerCard) -> bool:
        failure = self._failures.get(card.incarnation)
        return failure is None or self._clock_s() >= failure.retry_at_s

    def is_gone(self, peer: Incarnation, heard_s: float) -> bool:
        """Whether a worker that was there at `heard_s` has ended, for all that the registry tells. It does not come
        back."""
        last_s = max(self._read_since_s, heard_s, self._seen_s.get(peer, heard_s))
        return self._read_s - last_s > GONE_AFTER_S

    def links(self) -> tuple[PeerLink, ...]:
        """The links to workers that stand in the registry."""
        reports = self._transfer.links()
        return tuple(
            self._named(self._cards[report.incarnation], report)
            for report in reports
            if report.incarnation in self._cards
        )

    def rates(self) -> dict[Incarnation, LinkRate]:
        """How fast pulls over the measured ones of the links are."""
        return {
            link.report.incarnation: LinkRate(GROUP_COST_S + speed.latency_s, speed.bytes_per_s)
            for link in self.links()
            if (speed := link.report.speed) is not None
        }

    def num_missing(self) -> int:
        """Workers whose prompts we may take over and that we have not connected to."""
        return len(self._missing())

    def health(self) -> dict[str, object]:
        """`status`, "ok" or "degraded", and what is known of each link: what is wrong with it stands in `warning`."""
        shown = [_shown(link) for link in self.links()]
        shown += [
            {"peer": card.name, "address": card.transfer_address, "warning": self._failures[card.incarnation].error}
            for card in self._missing()
            if card.incarnation in self._failures
        ]
        degraded = any(each["warning"] is not None or each.get("below_floor") for each in shown)
        return {"status": "degraded" if degraded else "ok", "links": shown}

    def check_floor(self) -> None:
        """Raise StartupError if there is a link below a floor that the operator wants kept."""
        if self._floor is None or not self._floor.refuse:
            return
        for link in self.links():
            if link.below_floor:
                raise StartupError(
                    f"the link to {link.peer} at {link.report.address} carries {link.gb_per_s} GB/s by "
                    f"{link.report.transport}, under the floor of {self._floor.gb_per_s} GB/s that "
                    f"BATON_TRANSFER_FLOOR_GB_PER_S sets: "
                    f"{link.report.warning or 'no cause is known; docs/links.md tells what to look at'}"
                )

    def _note_seen(self, workers: Iterable[Incarnation]) -> None:
        now_s = self._clock_s()
        if now_s - self._read_s > keys.LEASE_S:
            self._read_since_s = now_s
        self._read_s = now_s
        self._seen_s = {peer: at_s for peer, at_s in self._seen_s.items() if at_s >= now_s - GONE_AFTER_S}
        self._seen_s |= dict.fromkeys(workers, now_s)

    def _may_pull_from(self, card: WorkerCard) -> bool:
        return card.incarnation != self._incarnation and card.layout_fingerprint == self._layout_fingerprint

    def _missing(self) -> list[WorkerCard]:
        return [card for card in self._untested() if card.role in SOURCES[self._role]]

    def _untested(self) -> list[WorkerCard]:
        links = self._transfer.links()  # a pull may have made one, or made it again, without a test
        return [card for peer, card in self._cards.items() if self._tested.get(peer) not in links]

    async def _connect(self, card: WorkerCard) -> None:
        try:
            report = await self._transfer.connect(card.transfer_address, card.incarnation)
        except KvTransferFailed as error:
            self._remember_failure(card, str(error))
            return
        self._tested[card.incarnation] = report
        self._failures.pop(card.incarnation, None)
        link = self._named(card, report)
        tell = self._log.warning if link.below_floor or report.warning is not None else self._log.info
        tell("link measured", **_shown(link), floor_gb_per_s=None if self._floor is None else self._floor.gb_per_s)

    def _remember_failure(self, card: WorkerCard, error: str) -> None:
        before = self._failures.get(card.incarnation)
        wait_s = keys.BEAT_INTERVAL_S if before is None else min(2 * before.wait_s, LONGEST_RETRY_S)
        self._failures[card.incarnation] = _Failure(error, wait_s, self._clock_s() + wait_s)
        self._log.warning("no link", peer=card.name, address=card.transfer_address, error=error, retry_s=wait_s)

    def _named(self, card: WorkerCard, report: LinkReport) -> PeerLink:
        floor, speed = self._floor, report.speed
        below_floor = floor is not None and speed is not None and speed.bytes_per_s < floor.gb_per_s * 1e9
        return PeerLink(card.name, report, below_floor)


def _shown(link: PeerLink) -> dict[str, object]:
    speed = link.report.speed
    return {
        "peer": link.peer,
        "address": link.report.address,
        "transport": link.report.transport,
        "gb_per_s": link.gb_per_s,
        "latency_us": None if speed is None else round(speed.latency_s * 1e6, 1),
        "below_floor": link.below_floor,
        "warning": link.report.warning,
    }
