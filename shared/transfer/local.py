"""The twin of `shared.transfer.ucx`: hand-overs inside one process, without threads, sockets or UCX.

Same offers, same plan, same formats, same refusals; a `LocalNetwork` stands for the wire and can be told to misbehave.
Nothing here waits for anything but the event loop's clock, so it runs under a virtual one.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import torch

from shared.blocks import BlockKey, name_of
from shared.errors import KvTransferFailed, LayoutMismatch
from shared.kv.copy import PageCopier
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.checks import check_fetch, check_pull, is_allowed
from shared.transfer.feed import Load, PartFeed
from shared.transfer.offer import Offer
from shared.transfer.offers import Offering, Offers, PullRefused
from shared.transfer.plan import LinkSpeed
from shared.transfer.port import Clock, Fetched, LinkReport, Outcome, Pulled, Refusal
from shared.transfer.proof import BlocksClaim, Claim
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat

TRANSPORT = "memory"


class LocalNetwork:
    """Workers that can reach each other, by address.

    Attributes:
        delay_s: how long each message takes beside its bytes.
        bytes_per_s: how many bytes of one pull travel in a second; None: any number, and no speed is measured.
        links: of the pulls in progress.
    """

    def __init__(self, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self._transfers: dict[str, LocalTransfer] = {}
        self.links: set[Link] = set()
        self._num_to_fail = 0

    @property
    def speed(self) -> LinkSpeed | None:
        return None if self.bytes_per_s is None else LinkSpeed(self.bytes_per_s, self.delay_s)

    def fail_next_pull(self) -> None:
        """The next pull on this network breaks off after its first message, or at its end if it has none."""
        self._num_to_fail += 1

    def cut(self, address: str) -> None:
        """Break every pull from and to `address` off, as if its cable was pulled for a moment."""
        for link in self.links:
            if address in (link.source.address, link.puller.address):
                link.break_off()

    def join(self, transfer: "LocalTransfer") -> None:
        if transfer.address in self._transfers:
            raise ValueError(f"{transfer.address} is taken")
        self._transfers[transfer.address] = transfer

    def leave(self, transfer: "LocalTransfer") -> None:
        self.cut(transfer.address)
        del self._transfers[transfer.address]

    def reach(self, puller: "LocalTransfer", address: str, incarnation: Incarnation) -> "LocalTransfer":
        """The source at `address`. Raises what `Transfer.connect` does."""
        source = self._transfers.get(address)
        if source is None:
            raise KvTransferFailed(f"{address} does not answer")
        ours, theirs = puller.cache.layout.fingerprint, source.cache.layout.fingerprint
        if ours != theirs:
            source.refusals[Refusal.WRONG_LAYOUT] += 1
            raise LayoutMismatch(f"{address} has KV layout {theirs}, ours is {ours}")
        if source.incarnation != incarnation:
            source.refusals[Refusal.WRONG_SOURCE] += 1
            raise KvTransferFailed(f"{address} refused: {Refusal.WRONG_SOURCE}")
        return source

    async def lend(
        self, source: "LocalTransfer", puller: "LocalTransfer", claim: BlocksClaim, proofs: bytes
    ) -> Offer | None:
        """`Offers.lend` of the source, asked by the puller, who is cut off from it when it is cancelled."""
        del puller
        return await source.offers.lend(claim, proofs)

    def link(self, offer: Offer, source: "LocalTransfer", puller: "LocalTransfer") -> "Link":
        fails, self._num_to_fail = self._num_to_fail > 0, max(0, self._num_to_fail - 1)
        return Link(offer, source, puller, fails=fails)


class Link:
    """One pull's connection."""

    def __init__(self, offer: Offer, source: "LocalTransfer", puller: "LocalTransfer", *, fails: bool) -> None:
        self.source = source
        self.puller = puller
        self.fails = fails
        self.broken = asyncio.Event()
        self._offer = offer

    def break_off(self) -> None:
        self.broken.set()
        self._offer.settle(Outcome.FAILED)

    async def cut(self) -> None:
        self.break_off()

    def check(self) -> None:
        """Raises KvTransferFailed if it is broken."""
        if self.broken.is_set():
            raise KvTransferFailed(f"the link to {self.source.address} broke")

    async def carry(self, delay_s: float) -> None:
        """The time of one message. Raises KvTransferFailed if the link breaks in it."""
        try:
            async with asyncio.timeout(delay_s):
                await self.broken.wait()
        except TimeoutError:
            return
        self.check()


class LocalTransfer(Offering):
    """One worker's end; see `Transfer`.

    Attributes:
        cache: whose pages travel.
        copier: packs and unpacks them.
        incarnation: this worker's.
        max_part_bytes: its largest part.
    """

    def __init__(
        self,
        network: LocalNetwork,
        cache: PagedCache,
        *,
        address: str,
        incarnation: Incarnation,
        clock: Clock,
        max_part_bytes: int,
    ) -> None:
        self._tasks = asyncio.TaskGroup()
        super().__init__(Offers(cache, incarnation, clock, self._tasks))
        self.cache = cache
        self.copier = PageCopier(cache, cache.num_pages)
        self.incarnation = incarnation
        self.max_part_bytes = max_part_bytes
        self._network = network
        self._address = address
        self._lifetime = AsyncExitStack()
        self._links: dict[str, LinkReport] = {}

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

    async def connect(self, address: str, incarnation: Incarnation) -> LinkReport:
        await asyncio.sleep(0)
        self._network.reach(self, address, incarnation)
        report = self._links[address] = LinkReport(address, incarnation, TRANSPORT, self._network.speed)
        return report

    def links(self) -> tuple[LinkReport, ...]:
        return tuple(self._links.values())

    async def pull(self, ticket: KvTicket, *, want: Sequence[int], into: Sequence[int], timeout_s: float) -> Pulled:
        check_pull(self.cache, ticket, want, into)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._pull(ticket, want, into)
        except TimeoutError as error:
            raise KvTransferFailed(f"{ticket.address} did not send {ticket.key} within {timeout_s} s") from error

    async def _pull(self, ticket: KvTicket, want: Sequence[int], into: Sequence[int]) -> Pulled:
        source = await self._reach(ticket.address, ticket.source)
        try:
            claim = Claim(b"", self.incarnation, self.address.encode(), ticket.key, want)
            offer = source.offers.find(claim, claim.proof(ticket.secret))
        except PullRefused as refusal:
            raise KvTransferFailed(f"{ticket.address} refused {ticket.key}: {refusal}") from refusal
        return await self._take(source, offer, ticket.max_loss, want, into)

    async def fetch(
        self, address: str, source: Incarnation, keys: Sequence[BlockKey], into: Sequence[int], *, timeout_s: float
    ) -> Fetched:
        check_fetch(self.cache, keys, into)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._fetch(address, source, keys, into)
        except TimeoutError as error:
            raise KvTransferFailed(f"{address} did not send {len(keys)} pages within {timeout_s} s") from error

    async def _fetch(
        self, address: str, incarnation: Incarnation, keys: Sequence[BlockKey], into: Sequence[int]
    ) -> Fetched:
        source = await self._reach(address, incarnation)
        claim = BlocksClaim(b"", self.incarnation, self.address.encode(), tuple(map(name_of, keys)))
        try:
            offer = await self._network.lend(source, self, claim, claim.proofs(keys))
        except PullRefused as refusal:
            raise KvTransferFailed(f"{address} refused: {refusal}") from refusal
        if offer is None:
            return Fetched(0, 0)
        num_pages = len(offer.pages)
        pulled = await self._take(source, offer, WireFormat.NATIVE, range(num_pages), into[:num_pages])
        return Fetched(num_pages, pulled.wire_bytes)

    async def _take(
        self,
        source: "LocalTransfer",
        offer: Offer,
        max_loss: WireFormat,
        want: Sequence[int],
        into: Sequence[int],
    ) -> Pulled:
        """Pull an offer that we were let into."""
        network = self._network
        link = network.link(offer, source, self)
        offer.begin(link.cut, lambda: None)
        network.links.add(link)
        try:
            pulled = await self._receive(link, offer, max_loss, want, into)
            if not offer.settle(Outcome.PULLED):
                raise self._stopped(link, offer)
        finally:
            offer.settle(Outcome.FAILED)
            network.links.discard(link)
        return pulled

    async def _reach(self, address: str, incarnation: Incarnation) -> "LocalTransfer":
        await asyncio.sleep(0)
        source = self._network.reach(self, address, incarnation)
        known = self._links.get(address)
        if known is None or known.incarnation != incarnation:
            self._links[address] = LinkReport(address, incarnation, TRANSPORT, speed=None)
        return source

    def _stopped(self, link: Link, offer: Offer) -> KvTransferFailed:
        refusal = link.source.offers.refused(offer.refusal_after)
        return KvTransferFailed(f"{link.source.address} refused {offer.key}: {refusal}")

    async def _receive(
        self, link: Link, offer: Offer, max_loss: WireFormat, want: Sequence[int], into: Sequence[int]
    ) -> Pulled:
        source = link.source
        feed = PartFeed(
            source.cache.layout,
            offer,
            want,
            speed=lambda: self._links[source.address].speed,
            max_part_bytes=min(self.max_part_bytes, source.max_part_bytes),
        )
        pulled = Pulled(WireFormat.NATIVE, 0)
        while not (link.fails and feed.num_parts) and (load := await feed.next()) is not None:
            part = load.part
            if not is_allowed(max_loss, load.format, want[part.start : part.end]):
                raise KvTransferFailed(f"{load.format} is more lossy than is allowed")
            packed = await self._carry(link, offer, load)
            self.copier.unpack(packed, into[part.start : part.end], part.layers, load.format)
            pulled = pulled.plus(load.format, load.num_bytes)
        if link.fails:
            link.break_off()
        link.check()
        if offer.outcome is not None:
            raise self._stopped(link, offer)
        return pulled

    async def _carry(self, link: Link, offer: Offer, load: Load) -> torch.Tensor:
        """The load as it lies in the puller's memory."""
        packed = torch.empty(load.num_bytes, dtype=torch.uint8, device=self.cache.device)
        network = self._network
        wire_s = 0.0 if network.bytes_per_s is None else load.num_bytes / network.bytes_per_s
        with offer.sending():
            link.source.copier.pack(load.pages, load.part.layers, load.format, packed, last_tokens=load.last_tokens)
            await link.carry(network.delay_s + wire_s)
        return packed
