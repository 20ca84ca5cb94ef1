"""The source's book of offers: who may pull what, until when, and when the pages are free again.

What is in flight when an offer is settled may finish until the hold's deadline; then the connection is cut, and the
offer ends when that is done.

An offer may be made, and pulled, before its KV is computed. The hold begins, and the offer has a deadline, when all KV
is there or the offer is settled, whichever is first.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from shared.blocks import PAGE_TOKENS, pages_for
from shared.errors import BatonError
from shared.kv.loan import Loan
from shared.kv.paged_cache import PagedCache
from shared.kv.progress import KvProgress
from shared.request import Incarnation
from shared.transfer.checks import check_pages
from shared.transfer.offer import Offer
from shared.transfer.port import Clock, Lender, OnEnd, Outcome, Refusal
from shared.transfer.proof import BlocksClaim, Claim
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat

MIN_SECRET_BYTES = 16

LOAN_S = 30.0
"""A peer that has not got what it fetches in this time gets no more of it, and the pages are given back."""

NUM_REMEMBERED = 1024
"""Ended offers remembered so that a late puller is told what became of its offer."""


class PullRefused(BatonError):
    """A pull that the source does not serve; the puller is told the reason."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Offers:
    """All offers of one source; one of `tasks` lives with each from offer to end.

    Attributes:
        refusals: what was not served, by reason.
    """

    def __init__(self, cache: PagedCache, incarnation: Incarnation, clock: Clock, tasks: asyncio.TaskGroup) -> None:
        self._cache = cache
        self._tasks = tasks
        self._incarnation = incarnation
        self._clock = clock
        self.refusals: Counter[Refusal] = Counter()
        self._open: dict[str, Offer] = {}
        self._ended: OrderedDict[str, Offer] = OrderedDict()
        self._num_loans = 0
        self._lender: Lender | None = None
        self._is_closed = False
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
        progress: KvProgress | None,
        max_loss: WireFormat,
    ) -> KvTicket:
        """See `Transfer.offer`; `address` is the source's."""
        if key in self._open:
            raise ValueError(f"{key} is on offer already")
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has {MIN_SECRET_BYTES} bytes or more, this one {len(secret)}")
        if len(pages) != pages_for(num_tokens):
            raise ValueError(f"{num_tokens} tokens fill {pages_for(num_tokens)} pages, not {len(pages)}")
        check_pages(self._cache, pages)
        if progress is not None and progress.num_tokens != num_tokens:
            raise ValueError(f"the progress is that of {progress.num_tokens} tokens, not {num_tokens}")
        offer = Offer(
            key=key,
            source=self._incarnation,
            puller=puller,
            secret=secret,
            pages=tuple(pages),
            progress=progress or KvProgress.all_there(num_tokens),
            max_loss=max_loss,
            hold_s=hold_s,
            on_end=on_end,
        )
        self._begin(offer)
        return KvTicket(
            key=key,
            address=address,
            source=self._incarnation,
            secret=secret,
            num_tokens=num_tokens,
            layout_fingerprint=self._cache.layout.fingerprint,
            max_loss=max_loss,
        )

    def lend_from(self, lender: Lender) -> None:
        """See `Transfer.lend_from`."""
        self._lender = lender

    async def lend(self, claim: BlocksClaim, proofs: bytes) -> Offer | None:
        """An offer, for this puller alone, of what is here of the blocks that it claims; None: nothing is.

        Cancelled, nothing is lent. Raises PullRefused.
        """
        lender = self._lender
        if lender is None:
            return None
        if len(set(claim.names)) != len(claim.names):
            raise self.refused(Refusal.WRONG_PAGES)
        loan = await lender.lend(claim.names)
        refusal = self._refusal_of_loan(claim, proofs, loan)
        if refusal is not None or not loan.pages:
            lender.give_back(loan)
            if refusal is not None:
                raise self.refused(refusal)
            return None
        self._num_loans += 1
        offer = Offer(
            key=f"loan {self._num_loans}",
            source=self._incarnation,
            puller=claim.puller,
            secret=None,
            pages=loan.pages,
            progress=KvProgress.all_there(len(loan.pages) * PAGE_TOKENS),
            max_loss=WireFormat.NATIVE,
            hold_s=LOAN_S,
            on_end=lambda _: lender.give_back(loan),
        )
        self._begin(offer)
        return offer

    def _refusal_of_loan(self, claim: BlocksClaim, proofs: bytes, loan: Loan) -> Refusal | None:
        if self._is_closed:
            return Refusal.WITHDRAWN
        return None if claim.are_proven(proofs, loan.keys) else Refusal.UNPROVEN_BLOCKS

    def _begin(self, offer: Offer) -> None:
        self._open[offer.key] = offer
        self._all_ended.clear()
        self._tasks.create_task(self._live(offer), name=f"offer {offer.key}")

    def find(self, claim: Claim, proof: bytes) -> Offer:
        """The offer that a puller asks for, if it may have it. Raises PullRefused; the offer then stays as it was."""
        offer = self._open.get(claim.key) or self._ended.get(claim.key)
        refusal = Refusal.UNKNOWN_KEY if offer is None else offer.refusal(claim, proof, self._clock())
        if offer is None or refusal is not None:
            raise self.refused(refusal or Refusal.UNKNOWN_KEY)
        return offer

    def refused(self, reason: Refusal) -> PullRefused:
        """Count a refusal."""
        self.refusals[reason] += 1
        return PullRefused(reason)

    def withdraw(self, key: str) -> None:
        """See `Transfer.withdraw`."""
        offer = self._open.get(key)
        if offer is not None:
            offer.settle(Outcome.WITHDRAWN)

    async def close(self) -> None:
        """Withdraw every offer, lend no more, and wait until all have ended."""
        self._is_closed = True
        for offer in self._open.values():
            offer.settle(Outcome.WITHDRAWN)
        await self._all_ended.wait()

    async def _live(self, offer: Offer) -> None:
        await offer.progress.over()
        deadline_s = offer.deadline_s = self._clock() + offer.hold_s
        await self._wait(offer.settled, deadline_s)
        offer.settle(Outcome.EXPIRED)
        await self._wait(offer.idle, deadline_s)
        if not offer.idle.is_set():
            await offer.cut()
            await offer.idle.wait()
        del self._open[offer.key]
        self._ended[offer.key] = offer
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)
        if not self._open:
            self._all_ended.set()
        offer.end()

    async def _wait(self, event: asyncio.Event, deadline_s: float) -> None:
        """Until `event` is set or the deadline has passed."""
        while not event.is_set() and (left_s := deadline_s - self._clock()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await event.wait()


class Offering(ABC):
    """The part of a `Transfer` that is the same however pages travel.

    Attributes:
        offers: what this worker has on offer.
    """

    def __init__(self, offers: Offers) -> None:
        self.offers = offers

    @property
    @abstractmethod
    def address(self) -> str:
        """See `Transfer.address`."""

    @property
    def num_offers(self) -> int:
        return len(self.offers)

    @property
    def refusals(self) -> Counter[Refusal]:
        return self.offers.refusals

    def offer(
        self,
        key: str,
        pages: Sequence[int],
        *,
        num_tokens: int,
        secret: bytes,
        puller: Incarnation,
        hold_s: float,
        on_end: OnEnd,
        progress: KvProgress | None = None,
        max_loss: WireFormat = WireFormat.NATIVE,
    ) -> KvTicket:
        return self.offers.add(
            self.address,
            key,
            pages,
            num_tokens=num_tokens,
            secret=secret,
            puller=puller,
            hold_s=hold_s,
            on_end=on_end,
            progress=progress,
            max_loss=max_loss,
        )

    def withdraw(self, key: str) -> None:
        self.offers.withdraw(key)

    def lend_from(self, lender: Lender) -> None:
        self.offers.lend_from(lender)
