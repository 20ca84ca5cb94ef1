"""The twin of `shared.transfer.ucx`: hand-overs inside one process, without threads, sockets or UCX.

Same offers, same plan, same refusals; a `LocalNetwork` stands for the wire and can be told to misbehave. Nothing here
waits for anything but the event loop's clock, so it runs under a virtual one.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import torch

from shared.errors import KvTransferFailed, LayoutMismatch
from shared.kv.copy import gather_pages, scatter_pages
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.offers import Offer, Offers, PullRefused, check_pull
from shared.transfer.plan import plan_messages
from shared.transfer.port import Clock, OnEnd, Outcome
from shared.wire.to_worker import KvTicket


class LocalNetwork:
    """Workers that can reach each other, by address.

    Attributes:
        delay_s: how long each message takes.
        links: of the pulls in progress.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self._transfers: dict[str, LocalTransfer] = {}
        self.links: set[Link] = set()
        self._num_to_fail = 0

    def fail_next_pull(self) -> None:
        """The next pull on this network breaks off after its first message, or at its end if it has none."""
        self._num_to_fail += 1

    def cut(self, address: str) -> None:
        """Break every pull from and to `address` off, as if its cable was pulled for a moment."""
        for link in self.links:
            if address in (link.source.address, link.puller.address):
                link.broken.set()

    def join(self, transfer: "LocalTransfer") -> None:
        if transfer.address in self._transfers:
            raise ValueError(f"{transfer.address} is taken")
        self._transfers[transfer.address] = transfer

    def leave(self, transfer: "LocalTransfer") -> None:
        self.cut(transfer.address)
        del self._transfers[transfer.address]

    def connect(self, puller: "LocalTransfer", ticket: KvTicket) -> "Link":
        source = self._transfers.get(ticket.address)
        if source is None:
            raise KvTransferFailed(f"{ticket.address} does not answer")
        ours, theirs = puller.cache.layout.fingerprint, source.cache.layout.fingerprint
        if ours != theirs:
            raise LayoutMismatch(f"{ticket.address} has KV layout {theirs}, ours is {ours}")
        if source.incarnation != ticket.source:
            raise KvTransferFailed(f"{ticket.address} has restarted: it is {source.incarnation}, not {ticket.source}")
        fails, self._num_to_fail = self._num_to_fail > 0, max(0, self._num_to_fail - 1)
        return Link(source, puller, fails=fails)


class Link:
    """One pull's connection."""

    def __init__(self, source: "LocalTransfer", puller: "LocalTransfer", *, fails: bool) -> None:
        self.source = source
        self.puller = puller
        self.fails = fails
        self.broken = asyncio.Event()

    async def cut(self) -> None:
        self.broken.set()

    async def carry(self, delay_s: float) -> None:
        """The time of one message. Raises KvTransferFailed if the link breaks in it."""
        try:
            async with asyncio.timeout(delay_s):
                await self.broken.wait()
        except TimeoutError:
            return
        raise KvTransferFailed(f"the link to {self.source.address} broke")


class LocalTransfer:
    """One worker's end; see `Transfer`.

    Attributes:
        cache: whose pages travel.
        incarnation: this worker's.
        message_bytes: its largest message.
        offers: what it has on offer.
    """

    def __init__(
        self,
        network: LocalNetwork,
        cache: PagedCache,
        *,
        address: str,
        incarnation: Incarnation,
        clock: Clock,
        message_bytes: int,
    ) -> None:
        self.cache = cache
        self.incarnation = incarnation
        self._network = network
        self._address = address
        self.message_bytes = message_bytes
        self._tasks = asyncio.TaskGroup()
        self.offers = Offers(cache, incarnation, clock, self._tasks)
        self._lifetime = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._network.join(self)
        await self._lifetime.enter_async_context(self._tasks)
        self._lifetime.push_async_callback(self.offers.close)
        self._lifetime.callback(self._network.leave, self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._lifetime.__aexit__(kind, error, traceback)

    @property
    def address(self) -> str:
        return self._address

    @property
    def num_offers(self) -> int:
        return len(self.offers)

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
    ) -> KvTicket:
        return self.offers.add(
            self._address, key, pages, num_tokens=num_tokens, secret=secret, puller=puller, hold_s=hold_s, on_end=on_end
        )

    def withdraw(self, key: str) -> None:
        self.offers.withdraw(key)

    async def pull(self, ticket: KvTicket, *, want: Sequence[int], into: Sequence[int], timeout_s: float) -> None:
        check_pull(self.cache, ticket, want, into)
        try:
            async with asyncio.timeout(timeout_s):
                await self._pull(ticket, want, into)
        except TimeoutError as error:
            raise KvTransferFailed(f"{ticket.address} did not send {ticket.key} within {timeout_s} s") from error

    async def _pull(self, ticket: KvTicket, want: Sequence[int], into: Sequence[int]) -> None:
        await asyncio.sleep(0)
        network = self._network
        link = network.connect(self, ticket)
        source = link.source
        try:
            offer = source.offers.begin(ticket.key, ticket.secret, self.incarnation, want, link.cut)
        except PullRefused as refusal:
            raise KvTransferFailed(f"{ticket.address} refused {ticket.key}: {refusal}") from refusal
        network.links.add(link)
        try:
            await self._receive(link, offer, want, into)
            if not offer.settle(Outcome.PULLED):
                raise KvTransferFailed(f"{ticket.address} stopped {ticket.key}: {offer.outcome}")
        finally:
            offer.settle(Outcome.FAILED)
            network.links.discard(link)

    async def _receive(self, link: Link, offer: Offer, want: Sequence[int], into: Sequence[int]) -> None:
        source = link.source
        page_bytes = self.cache.layout.page_bytes
        message_bytes = min(self.message_bytes, source.message_bytes)
        for message in plan_messages(len(want), page_bytes, message_bytes):
            if offer.outcome is not None:
                raise KvTransferFailed(f"{source.address} stopped sending: {offer.outcome}")
            staging = torch.empty(message.num_pages * page_bytes, dtype=torch.uint8, device=self.cache.device)
            with offer.sending():
                wanted = want[message.start : message.end]
                gather_pages(source.cache, [offer.pages[index] for index in wanted], staging)
                await link.carry(self._network.delay_s)
            scatter_pages(self.cache, staging, into[message.start : message.end])
            if link.fails:
                break
        if link.fails:
            raise KvTransferFailed(f"the link to {source.address} broke")
