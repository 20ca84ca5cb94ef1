"""The source's book of offers: who may pull what, until when, and when the pages are free again.

    offered ──begin──> pulling
       │                  │
       └─────settle───────┴──> closing ──(nothing in flight)──> ended: on_end(outcome)

The first to settle an offer decides its outcome: the puller's confirmation, the loss of the puller, a withdrawal, or
the hold's deadline. From then on nothing new is sent. What is in flight may finish until the hold's deadline; then the
connection is cut, and the offer ends when that is done.
"""

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto

from shared.blocks import pages_for
from shared.errors import BatonError, LayoutMismatch
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.port import Clock, OnEnd, Outcome, Refusal
from shared.wire.to_worker import KvTicket

MIN_SECRET_BYTES = 16

NUM_REMEMBERED = 1024
"""Ended offers remembered so that a late puller is told what became of its offer."""

Cut = Callable[[], Awaitable[None]]
"""Cuts the connection to a puller; when it returns nothing is in flight on it."""


class PullRefused(BatonError):
    """A pull that the source does not serve; the puller is told the reason."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


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
    """Pages held for one puller.

    Attributes:
        pages: page numbers, in order of position.
        deadline_s: end of the hold, by the book's clock.
        outcome: set when the offer is settled.
    """

    def __init__(self, *, pages: tuple[int, ...], secret: bytes, puller: Incarnation, deadline_s: float) -> None:
        self.pages = pages
        self.deadline_s = deadline_s
        self.outcome: Outcome | None = None
        self._secret = secret
        self._puller = puller
        self._state = OfferState.OFFERED
        self._cut: Cut | None = None
        self._num_sending = 0
        self.settled = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def state(self) -> OfferState:
        return self._state

    def _move(self, state: OfferState) -> None:
        assert state in TRANSITIONS[self._state], f"an offer does not go from {self._state.name} to {state.name}"
        self._state = state

    def refusal(self, secret: bytes, puller: Incarnation, want: Sequence[int]) -> Refusal | None:
        """Why this pull must not be served; None: it may be. Says nothing about the offer without its secret."""
        if not hmac.compare_digest(secret, self._secret):
            return Refusal.WRONG_SECRET
        if puller != self._puller:
            return Refusal.WRONG_PULLER
        if self.outcome is not None:
            return REFUSAL_AFTER[self.outcome]
        if self._state is OfferState.PULLING:
            return Refusal.ALREADY_PULLED
        if len(set(want)) != len(want) or any(not 0 <= index < len(self.pages) for index in want):
            return Refusal.WRONG_PAGES
        return None

    def begin(self, cut: Cut) -> None:
        """A puller was let in; `cut` ends the connection to it."""
        self._move(OfferState.PULLING)
        self._cut = cut

    def settle(self, outcome: Outcome) -> bool:
        """Decide the outcome, unless it is decided; returns whether this call did."""
        if self.outcome is not None:
            return False
        self._move(OfferState.CLOSING)
        self.outcome = outcome
        self.settled.set()
        return True

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

    def end(self) -> Outcome:
        """Nothing is in flight; returns how it ended."""
        assert self._num_sending == 0
        assert self.outcome is not None
        self._move(OfferState.ENDED)
        self._cut = None  # the offer is remembered, its connection need not be
        return self.outcome


class Offers:
    """All offers of one source; one of `tasks` lives with each from offer to end."""

    def __init__(self, cache: PagedCache, incarnation: Incarnation, clock: Clock, tasks: asyncio.TaskGroup) -> None:
        self._cache = cache
        self._tasks = tasks
        self._incarnation = incarnation
        self._clock = clock
        self._open: dict[str, Offer] = {}
        self._ended: OrderedDict[str, Offer] = OrderedDict()
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    def __len__(self) -> int:
        return len(self._open)

    def add(
        self,
        address: str,
        key: str,
        pages: Sequence[int],
        *,
        num_tokens: int,
        secret: bytes,
        puller: Incarnation,
        hold_s: float,
        on_end: OnEnd,
    ) -> KvTicket:
        """See `Transfer.offer`; `address` is the source's."""
        if key in self._open:
            raise ValueError(f"{key} is on offer already")
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has {MIN_SECRET_BYTES} bytes or more, this one {len(secret)}")
        if len(pages) != pages_for(num_tokens):
            raise ValueError(f"{num_tokens} tokens fill {pages_for(num_tokens)} pages, not {len(pages)}")
        check_pages(self._cache, pages)
        offer = Offer(pages=tuple(pages), secret=secret, puller=puller, deadline_s=self._clock() + hold_s)
        self._open[key] = offer
        self._all_ended.clear()
        self._tasks.create_task(self._live(key, offer, on_end), name=f"offer {key}")
        return KvTicket(
            key=key,
            address=address,
            source=self._incarnation,
            secret=secret,
            num_tokens=num_tokens,
            layout_fingerprint=self._cache.layout.fingerprint,
        )

    def begin(self, key: str, secret: bytes, puller: Incarnation, want: Sequence[int], cut: Cut) -> Offer:
        """Let a puller in. Raises PullRefused; the offer then stays as it was."""
        offer = self._open.get(key) or self._ended.get(key)
        if offer is None:
            raise PullRefused(Refusal.UNKNOWN_KEY)
        refusal = offer.refusal(secret, puller, want)
        if refusal is None and self._clock() >= offer.deadline_s:
            refusal = Refusal.EXPIRED
        if refusal is not None:
            raise PullRefused(refusal)
        offer.begin(cut)
        return offer

    def withdraw(self, key: str) -> None:
        """See `Transfer.withdraw`."""
        offer = self._open.get(key)
        if offer is not None:
            offer.settle(Outcome.WITHDRAWN)

    async def close(self) -> None:
        """Withdraw every offer and wait until all have ended."""
        for offer in self._open.values():
            offer.settle(Outcome.WITHDRAWN)
        await self._all_ended.wait()

    async def _live(self, key: str, offer: Offer, on_end: OnEnd) -> None:
        await self._wait(offer.settled, offer.deadline_s)
        offer.settle(Outcome.EXPIRED)
        await self._wait(offer.idle, offer.deadline_s)
        if not offer.idle.is_set():
            await offer.cut()
            await offer.idle.wait()
        del self._open[key]
        self._ended[key] = offer
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)
        if not self._open:
            self._all_ended.set()
        on_end(offer.end())

    async def _wait(self, event: asyncio.Event, deadline_s: float) -> None:
        """Until `event` is set or the deadline has passed."""
        while not event.is_set() and (left_s := deadline_s - self._clock()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await event.wait()


def check_pages(cache: PagedCache, pages: Sequence[int]) -> None:
    """Raise ValueError unless `pages` are pages of `cache`, each named once."""
    if len(set(pages)) != len(pages):
        raise ValueError("a page is named twice")
    for page in pages:
        if not 0 <= page < cache.num_pages:
            raise ValueError(f"page {page} is outside the cache of {cache.num_pages} pages")


def check_pull(cache: PagedCache, ticket: KvTicket, want: Sequence[int], into: Sequence[int]) -> None:
    """Raise what `Transfer.pull` says of arguments that can never work."""
    if ticket.layout_fingerprint != cache.layout.fingerprint:
        raise LayoutMismatch(
            f"the ticket is for layout {ticket.layout_fingerprint}, ours is {cache.layout.fingerprint}"
        )
    if len(want) != len(into):
        raise ValueError(f"{len(want)} pages are wanted into {len(into)} pages")
    num_pages = pages_for(ticket.num_tokens)
    if len(set(want)) != len(want) or any(not 0 <= index < num_pages for index in want):
        raise ValueError(f"wanted pages are distinct indexes below {num_pages}")
    check_pages(cache, into)
