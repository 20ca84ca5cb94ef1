"""The record of one transfer, at its source.

    offered ──begin──> pulling
       │                  │
       └─────settle───────┴──> closing ──(nothing in flight)──> ended: on_end(outcome)

The first to settle an offer decides its outcome: the puller's confirmation, the loss of the puller, a withdrawal, or
the hold's deadline. From then on nothing new is sent; what is in flight may finish, as `offers.py` says.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from enum import Enum, auto

from shared.kv.progress import KvProgress
from shared.request import Incarnation
from shared.transfer.port import OnEnd, Outcome, Refusal
from shared.transfer.proof import Claim
from shared.wire.wire_format import WireFormat

Cut = Callable[[], Awaitable[None]]
"""Cuts the connection to a puller; when it returns nothing is in flight on it."""


class OfferState(Enum):
    """See the module's drawing."""

    OFFERED = auto()
    PULLING = auto()
    CLOSING = auto()
    ENDED = auto()


TRANSITIONS: dict[OfferState, frozenset[OfferState]] = {
    OfferState.OFFERED: frozenset({OfferState.PULLING, OfferState.CLOSING}),
    OfferState.PULLING: frozenset({OfferState.CLOSING}),
    OfferState.CLOSING: frozenset({OfferState.ENDED}),
    OfferState.ENDED: frozenset(),
}

REFUSAL_AFTER = {
    Outcome.PULLED: Refusal.ALREADY_PULLED,
    Outcome.FAILED: Refusal.FAILED,
    Outcome.EXPIRED: Refusal.EXPIRED,
    Outcome.WITHDRAWN: Refusal.WITHDRAWN,
}


class Offer:
    """The record of one transfer: pages held for one puller.

    Attributes:
        key: names it among the offers of its source.
        source: the incarnation that holds the pages.
        puller: the only incarnation that may pull.
        pages: page numbers, in order of position.
        progress: what of them is computed.
        max_loss: the most lossy form in which they may travel.
        hold_s: how long they are held once all is computed.
        deadline_s: end of the hold, by the book's clock; None until the hold begins.
        outcome: set when the offer is settled.
        settled: set then too.
        idle: set while nothing is in flight.
    """

    def __init__(
        self,
        *,
        key: str,
        source: Incarnation,
        puller: Incarnation,
        secret: bytes | None,
        pages: tuple[int, ...],
        progress: KvProgress,
        max_loss: WireFormat,
        hold_s: float,
        on_end: OnEnd,
    ) -> None:
        """`on_end` belongs to the owner of the pages. No secret: nobody may pull it who was not let in."""
        self.key = key
        self.source = source
        self.puller = puller
        self.pages = pages
        self.progress = progress
        self.max_loss = max_loss
        self.hold_s = hold_s
        self.deadline_s: float | None = None
        self.outcome: Outcome | None = None
        self.settled = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._secret = secret
        self._state = OfferState.OFFERED
        self._num_sending = 0
        self._on_end: OnEnd | None = on_end
        self._cut: Cut | None = None
        self._on_settled: Callable[[], None] | None = None

    @property
    def state(self) -> OfferState:
        return self._state

    def _move(self, state: OfferState) -> None:
        assert state in TRANSITIONS[self._state], f"an offer does not go from {self._state.name} to {state.name}"
        self._state = state

    def refusal(self, claim: Claim, proof: bytes, now_s: float) -> Refusal | None:
        """Why this pull must not be served; None: it may be. Says nothing about the offer without its secret."""
        want = claim.want
        if self._secret is None or not claim.is_proven(proof, self._secret):
            return Refusal.WRONG_SECRET
        if claim.puller != self.puller:
            return Refusal.WRONG_PULLER
        if self.outcome is not None:
            return REFUSAL_AFTER[self.outcome]
        if self._state is OfferState.PULLING:
            return Refusal.ALREADY_PULLED
        if self.deadline_s is not None and now_s >= self.deadline_s:
            return Refusal.EXPIRED
        if len(set(want)) != len(want) or (len(want) and not 0 <= min(want) <= max(want) < len(self.pages)):
            return Refusal.WRONG_PAGES
        return None

    def begin(self, cut: Cut, on_settled: Callable[[], None]) -> None:
        """A puller was let in. `cut` ends the connection to it; `on_settled` is called when the offer is settled."""
        self._move(OfferState.PULLING)
        self._cut = cut
        self._on_settled = on_settled

    def settle(self, outcome: Outcome) -> bool:
        """Decide the outcome, unless it is decided; returns whether this call did."""
        if self.outcome is not None:
            return False
        self._move(OfferState.CLOSING)
        self.outcome = outcome
        self.settled.set()
        self.progress.stop()
        if self._on_settled is not None:
            self._on_settled()
        return True

    @property
    def refusal_after(self) -> Refusal:
        """What a puller is told of an offer that is settled."""
        assert self.outcome is not None
        return REFUSAL_AFTER[self.outcome]

    @contextmanager
    def sending(self) -> Generator[None]:
        """While inside, something reads the pages or what was copied from them. Only in PULLING."""
        assert self._state is OfferState.PULLING
        self._num_sending += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._num_sending -= 1
            if self._num_sending == 0:
                self.idle.set()

    async def cut(self) -> None:
        assert self._cut is not None
        await self._cut()

    def end(self) -> None:
        """Nothing is in flight: tell the owner how it ended."""
        assert self._num_sending == 0
        assert self.outcome is not None
        assert self._on_end is not None
        self._move(OfferState.ENDED)
        on_end = self._on_end
        # The offer is remembered; what its owner and its connection hold may be large.
        self._on_end = self._cut = self._on_settled = None
        self.progress = KvProgress(self.progress.num_tokens)
        on_end(self.outcome)
