"""The source's side of `shared.transfer.ucx`: checks tickets and sends the pages that pullers ask for."""

import asyncio

from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer.control import (
    PROTOCOL_VERSION,
    TO_SOURCE_DECODER,
    Confirm,
    GiveUp,
    Granted,
    Hello,
    Pull,
    Ready,
    Refused,
    Released,
)
from shared.transfer.link import VOID, Link
from shared.transfer.offers import REFUSAL_AFTER, Offer, Offers, OfferState, PullRefused
from shared.transfer.plan import Message, plan_messages
from shared.transfer.port import Outcome, Refusal
from shared.transfer.staging import Staging
from shared.wire.codec import UndecodableMessage


class ProtocolViolation(UndecodableMessage):
    """A control message that has no place here."""


def _refusal_after(offer: Offer) -> Refusal:
    assert offer.outcome is not None
    return REFUSAL_AFTER[offer.outcome]


class _Sending:
    """A granted pull: the pages still to be asked for."""

    def __init__(self, offer: Offer, want: tuple[int, ...], plan: tuple[Message, ...]) -> None:
        self.offer = offer
        self._want = want
        self._to_ask = dict(enumerate(plan))

    def take(self, ready: Ready, page_bytes: int) -> tuple[int, ...]:
        """Page numbers of the message asked for, which may be asked for once. Raises ProtocolViolation."""
        message = self._to_ask.pop(ready.index, None)
        if message is None:
            raise ProtocolViolation(f"message {ready.index} is not in the plan or was asked for before")
        if ready.num_bytes != message.num_pages * page_bytes:
            raise ProtocolViolation(f"message {ready.index} has another length in our plan")
        return tuple(self.offer.pages[index] for index in self._want[message.start : message.end])


class _Visit:
    """One puller on one connection."""

    def __init__(self, link: Link, hello: Hello) -> None:
        self.link = link
        self.hello = hello
        self.pulls: dict[int, _Sending] = {}

    @property
    def puller(self) -> Incarnation:
        return self.hello.incarnation

    def granted(self, pull: int) -> _Sending:
        if pull not in self.pulls:
            raise ProtocolViolation(f"pull {pull} was not granted or has ended")
        return self.pulls[pull]


class Source:
    """Serves pullers until closed."""

    def __init__(
        self, hello: Hello, staging: Staging, offers: Offers, tasks: asyncio.TaskGroup, peer_timeout_s: float
    ) -> None:
        self._hello = hello
        self._staging = staging
        self._offers = offers
        self._tasks = tasks
        self._peer_timeout_s = peer_timeout_s
        self._links: set[Link] = set()
        self._closed = False

    async def close(self) -> None:
        """Cut every connection; serve no more."""
        self._closed = True
        await asyncio.gather(*(link.cut() for link in tuple(self._links)))

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a new connection."""
        if self._closed:
            writer.transport.abort()
            return
        link = Link(reader, writer)
        self._links.add(link)
        self._tasks.create_task(self._serve(link))

    async def _serve(self, link: Link) -> None:
        visit: _Visit | None = None
        try:
            visit = await self._greet(link)
            while True:
                await self._handle(visit, await link.read())
        except (KvTransferFailed, UndecodableMessage):
            pass  # whatever the reason, it ends this connection alone; what was being pulled over it reports FAILED
        finally:
            await link.cut()
            self._links.discard(link)
            for sending in visit.pulls.values() if visit is not None else ():
                sending.offer.settle(Outcome.FAILED)

    async def _greet(self, link: Link) -> _Visit:
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                return await self._exchange_hello(link)
        except TimeoutError as error:
            raise KvTransferFailed("the peer did not say hello or goodbye in time") from error

    async def _exchange_hello(self, link: Link) -> _Visit:
        hello = TO_SOURCE_DECODER.decode(await link.read())
        if not isinstance(hello, Hello):
            raise ProtocolViolation("the first message is not a hello")
        link.post(self._hello)
        if (hello.protocol, hello.layout_fingerprint) != (PROTOCOL_VERSION, self._hello.layout_fingerprint):
            await link.read()  # the puller sees the difference too, and the connection ends here
            raise ProtocolViolation("a peer of another protocol or layout asked for pages")
        if hello.message_bytes < self._staging.cache.layout.page_bytes:
            raise ProtocolViolation("the peer's messages hold no page")
        return _Visit(link, hello)

    async def _handle(self, visit: _Visit, encoded: bytes) -> None:
        match TO_SOURCE_DECODER.decode(encoded):
            case Pull() as pull:
                await self._begin(visit, pull)
            case Ready() as ready:
                sending = visit.granted(ready.pull)
                pages = sending.take(ready, self._staging.cache.layout.page_bytes)
                self._tasks.create_task(self._send(visit.link, sending.offer, ready, pages))
            case Confirm(pull=number):
                offer = visit.granted(number).offer
                del visit.pulls[number]
                if offer.settle(Outcome.PULLED):
                    visit.link.post(Released(number))
                else:
                    visit.link.post(Refused(number, _refusal_after(offer)))
            case GiveUp(pull=number):
                if number in visit.pulls:
                    visit.pulls.pop(number).offer.settle(Outcome.FAILED)
            case Hello():
                raise ProtocolViolation("a second hello")

    async def _begin(self, visit: _Visit, pull: Pull) -> None:
        if pull.pull in visit.pulls:
            raise ProtocolViolation(f"pull {pull.pull} is in progress")
        try:
            offer = self._offers.begin(pull.key, pull.secret, visit.puller, pull.want, visit.link.cut)
        except PullRefused as refusal:
            visit.link.post(Refused(pull.pull, refusal.reason))
            return
        message_bytes = min(self._hello.message_bytes, visit.hello.message_bytes)
        plan = plan_messages(len(pull.want), self._staging.cache.layout.page_bytes, message_bytes)
        visit.pulls[pull.pull] = _Sending(offer, pull.want, plan)
        if not visit.link.has_endpoint:
            await visit.link.open_endpoint(visit.hello.ucx_address)
        visit.link.post(Granted(pull.pull))

    async def _send(self, link: Link, offer: Offer, ready: Ready, pages: tuple[int, ...]) -> None:
        try:
            async with self._staging.outgoing.lease() as buffer:
                if offer.state is OfferState.PULLING:
                    with offer.sending():
                        part = buffer[: ready.num_bytes]
                        await self._staging.gather(pages, part)
                        await link.send(ready.tag, part)
                    return
            link.post(Refused(ready.pull, _refusal_after(offer)))
            await link.send(ready.tag, VOID)
        except KvTransferFailed:
            await link.cut()  # `serve` sees the end of the connection and reports what was being pulled over it
