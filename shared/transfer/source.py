"""The source's side of `shared.transfer.ucx`: lets pullers in and serves what they ask for."""

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from shared.errors import KvTransferFailed
from shared.kv.wire_format import packed_bytes
from shared.transfer.control import (
    PROTOCOL_VERSION,
    TO_SOURCE_DECODER,
    Confirm,
    Fetch,
    Found,
    GiveUp,
    Hello,
    Knock,
    OversizedMessage,
    Probe,
    ProtocolViolation,
    Pull,
    Ready,
    Refused,
    Released,
    Speed,
)
from shared.transfer.feed import PartFeed
from shared.transfer.link import VOID, Link
from shared.transfer.offer import Offer
from shared.transfer.offers import Offers, PullRefused
from shared.transfer.plan import LinkSpeed
from shared.transfer.port import Outcome, Refusal
from shared.transfer.progress_thread import ProgressThread
from shared.transfer.proof import CHALLENGE_BYTES, BlocksClaim, Claim, names_of
from shared.transfer.serving import Probing, Serving
from shared.transfer.staging import Staging
from shared.wire.codec import UndecodableMessage
from shared.wire.wire_format import WireFormat

NUM_REMEMBERED = 256
"""Answers to confirmations remembered on a connection, so that one asked for again is the same."""


class Visit:
    """One puller on one connection.

    Attributes:
        challenge: what its proofs must answer.
        pulls: let in and not confirmed or given up, by number.
        probing: the probe that the puller is not ready for yet; one at a time. (It may have the message of the one
            before while our send of it has not ended.)
        last_number: of a pull, fetch or probe; each is higher than the one before.
        fetches: not answered yet, by number.
    """

    def __init__(self, link: Link, hello: Hello, challenge: bytes) -> None:
        self.link = link
        self.hello = hello
        self.challenge = challenge
        self.pulls: dict[int, Serving] = {}
        self.probing: Probing | None = None
        self.last_number = 0
        self.fetches: dict[int, asyncio.Task[None]] = {}
        self._opening = asyncio.Lock()
        self._answers: OrderedDict[int, Released | Refused] = OrderedDict()

    def take_number(self, number: int) -> None:
        """Raises ProtocolViolation for a number that is not new."""
        if number <= self.last_number:
            raise ProtocolViolation(f"number {number} was used before")
        self.last_number = number

    def answer(self, number: int) -> Released | Refused:
        """What becomes of a pull that is confirmed; the same each time. Raises ProtocolViolation if there is none."""
        answer = self._answers.get(number)
        if answer is None:
            if number not in self.pulls:
                raise ProtocolViolation(f"pull {number} was not let in or has ended")
            offer = self.pulls.pop(number).offer
            released = offer.settle(Outcome.PULLED)
            answer = Released(number) if released else Refused(number, offer.refusal_after)
            self._remember(answer)
        return answer

    def refuse(self, number: int, reason: Refusal) -> Refused:
        """A pull is not let in. One of no pages is confirmed in the same breath, and told so again."""
        refused = Refused(number, reason)
        self._remember(refused)
        return refused

    def _remember(self, answer: Released | Refused) -> None:
        self._answers[answer.pull] = answer
        if len(self._answers) > NUM_REMEMBERED:
            self._answers.popitem(last=False)

    async def open_endpoint(self) -> None:
        """Raises KvTransferFailed."""
        async with self._opening:
            if not self.link.has_endpoint:
                await self.link.open_endpoint(self.hello.ucx_address)

    def end(self) -> None:
        """The connection is cut."""
        for serving in self.pulls.values():
            serving.give_up()
        for fetch in self.fetches.values():
            fetch.cancel()
        if self.probing is not None:
            self.probing.stop()


class Source:
    """Serves pullers until closed."""

    def __init__(
        self,
        hello: Hello,
        staging: Staging,
        offers: Offers,
        clock: Callable[[], float],
        progress: ProgressThread | None,
        tasks: asyncio.TaskGroup,
        peer_timeout_s: float,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._random_bytes = random_bytes
        self._hello = hello
        self._staging = staging
        self._offers = offers
        self._clock = clock
        self._progress = progress
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
        link = Link(reader, writer, self._clock, self._progress)
        self._links.add(link)
        self._tasks.create_task(self._serve(link))

    async def _serve(self, link: Link) -> None:
        """Whatever ends this connection, it ends this one alone; what was being pulled over it reports FAILED."""
        visit: Visit | None = None
        try:
            visit = await self._greet(link)
            while True:
                await self._handle(visit, TO_SOURCE_DECODER.decode(await link.read()))
        except KvTransferFailed:
            pass
        except PullRefused as refusal:
            self._offers.refusals[refusal.reason] += 1
        except OversizedMessage:
            self._offers.refusals[Refusal.OVERSIZED] += 1
        except UndecodableMessage:
            self._offers.refusals[Refusal.PROTOCOL] += 1
        finally:
            await link.cut()
            self._links.discard(link)
            if visit is not None:
                visit.end()

    async def _greet(self, link: Link) -> Visit:
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                return await self._exchange_hello(link)
        except TimeoutError as error:
            raise KvTransferFailed("the peer did not say hello or goodbye in time") from error

    async def _exchange_hello(self, link: Link) -> Visit:
        await self._answer_knock(link)
        hello = TO_SOURCE_DECODER.decode(await link.read())
        if not isinstance(hello, Hello):
            raise ProtocolViolation("a knock without a hello")
        challenge = self._random_bytes(CHALLENGE_BYTES)
        link.post(replace(self._hello, challenge=challenge))
        if (hello.protocol, hello.layout_fingerprint) != (PROTOCOL_VERSION, self._hello.layout_fingerprint):
            await self._see_off(link)
            if hello.protocol != PROTOCOL_VERSION:
                raise ProtocolViolation("a peer of another protocol asked for pages")
            raise PullRefused(Refusal.WRONG_LAYOUT)
        if hello.max_part_bytes < packed_bytes(self._staging.cache.layout, WireFormat.NATIVE, 1, 1):
            raise ProtocolViolation("the peer's parts hold no layer of a page")
        return Visit(link, hello, challenge)

    async def _answer_knock(self, link: Link) -> None:
        knock = TO_SOURCE_DECODER.decode(await link.read())
        if not isinstance(knock, Knock):
            raise ProtocolViolation("the first message is not a knock")
        if not hmac.compare_digest(knock.source.encode(), self._hello.incarnation.encode()):
            link.post(Refused(0, Refusal.WRONG_SOURCE))
            await self._see_off(link)
            raise PullRefused(Refusal.WRONG_SOURCE)

    async def _see_off(self, link: Link) -> None:
        """The puller learns of it by what we said and hangs up; nothing that it still says is listened to."""
        with suppress(KvTransferFailed, UndecodableMessage):
            await link.read()

    async def _handle(self, visit: Visit, message: object) -> None:
        match message:
            case Pull():
                await self._begin(visit, message)
            case Ready():
                self._ready(visit, message)
            case Confirm(pull=number):
                visit.link.post(visit.answer(number))
            case Fetch():
                visit.take_number(message.pull)
                visit.fetches[message.pull] = self._tasks.create_task(self._fetch(visit, message))
            case GiveUp(pull=number):
                if number in visit.pulls:
                    visit.pulls.pop(number).give_up()
                elif number in visit.fetches:
                    visit.fetches.pop(number).cancel()
            case Probe():
                await self._probe(visit, message)
            case Speed(bytes_per_s=bytes_per_s, latency_s=latency_s):
                visit.link.meter.speed = LinkSpeed(bytes_per_s, latency_s)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    async def _begin(self, visit: Visit, pull: Pull) -> None:
        visit.take_number(pull.pull)
        link = visit.link
        claim = Claim(visit.challenge, visit.hello.incarnation, visit.hello.ucx_address, pull.key, pull.want)
        try:
            offer = self._offers.find(claim, pull.proof)
        except PullRefused as refusal:
            link.post(visit.refuse(pull.pull, refusal.reason))
            return
        await self._send(visit, self._let_in(visit, pull.pull, offer, pull.want))

    async def _fetch(self, visit: Visit, fetch: Fetch) -> None:
        """Beside what else is said on the connection: who lends may take as long as a step."""
        number, link = fetch.pull, visit.link
        claim = BlocksClaim(visit.challenge, visit.hello.incarnation, visit.hello.ucx_address, names_of(fetch.names))
        try:
            try:
                offer = await self._offers.lend(claim, fetch.proofs)
            finally:
                visit.fetches.pop(number, None)
            if offer is None:
                link.post(Found(number, 0))
                return
            serving = self._let_in(visit, number, offer, range(len(offer.pages)))
            link.post(Found(number, len(offer.pages)))
            await self._send(visit, serving)
        except PullRefused as refusal:
            with suppress(KvTransferFailed):  # whoever reads the link sees its end
                link.post(visit.refuse(number, refusal.reason))
        except KvTransferFailed:
            await link.cut()

    def _let_in(self, visit: Visit, number: int, offer: Offer, want: Sequence[int]) -> Serving:
        link = visit.link
        feed = PartFeed(
            self._staging.cache.layout,
            offer,
            want,
            speed=lambda: link.meter.speed,
            max_part_bytes=self._max_part_bytes(visit),
        )
        serving = visit.pulls[number] = Serving(number, link, self._offers, offer, feed, self._staging)
        serving.begin()
        return serving

    async def _send(self, visit: Visit, serving: Serving) -> None:
        await visit.open_endpoint()
        visit.link.hurry()
        serving.send_by(self._tasks)

    def _max_part_bytes(self, visit: Visit) -> int:
        return min(self._staging.max_part_bytes, visit.hello.max_part_bytes)

    def _ready(self, visit: Visit, ready: Ready) -> None:
        probing = visit.probing
        is_probe = probing is not None and probing.number == ready.pull
        awaited = probing if is_probe else visit.pulls.get(ready.pull)
        if awaited is None:
            raise ProtocolViolation(f"pull {ready.pull} was not let in or has ended")
        is_wanted = awaited.ready(ready)
        if is_probe:
            visit.probing = None
        if not is_wanted:
            self._tasks.create_task(self._send_void(visit.link, ready.tag))

    async def _send_void(self, link: Link, tag: int) -> None:
        try:
            await link.send(tag, VOID)
        except KvTransferFailed:
            await link.cut()

    async def _probe(self, visit: Visit, probe: Probe) -> None:
        visit.take_number(probe.pull)
        if visit.probing is not None:
            raise ProtocolViolation("two probes at once")
        if probe.num_bytes > self._max_part_bytes(visit):
            raise ProtocolViolation(f"a probe of {probe.num_bytes} bytes")
        visit.probing = Probing(probe.pull, visit.link, self._staging)
        await visit.open_endpoint()
        self._tasks.create_task(visit.probing.run(probe.num_bytes))
