"""The puller's side of `shared.transfer.ucx`: connects to sources, tests links, and pulls over them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from shared.blocks import BlockKey, name_of, token_ids
from shared.errors import KvTransferFailed, LayoutMismatch
from shared.request import Incarnation
from shared.transfer.control import (
    PROTOCOL_VERSION,
    TO_PULLER_DECODER,
    Fetch,
    Found,
    Hello,
    Knock,
    Part,
    Probe,
    ProtocolViolation,
    Pull,
    Ready,
    Refused,
    Released,
    Speed,
)
from shared.transfer.diagnosis import diagnose, unreachable
from shared.transfer.host_facts import can_access_peer
from shared.transfer.link import Link
from shared.transfer.port import Clock, Fetched, LinkReport, Pulled
from shared.transfer.progress_thread import ProgressThread
from shared.transfer.proof import BlocksClaim, Claim
from shared.transfer.pulling import Pulling
from shared.transfer.self_test import measure
from shared.transfer.staging import Staging, to_completion
from shared.transfer.transport import UNPROVEN
from shared.wire.codec import UndecodableMessage
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat


class Connection:
    """A source that we are connected to, and the pulls and probes on the way from it.

    Attributes:
        report: what is known of the link.
        testing: held while the link is tested.
    """

    def __init__(self, address: str, link: Link, hello: Hello) -> None:
        self.link = link
        self.hello = hello
        self.report = LinkReport(address, hello.incarnation, transport=UNPROVEN, speed=None)
        self.testing = asyncio.Lock()
        self.pulls: dict[int, Pulling] = {}
        self.probes: dict[int, asyncio.Future[Part]] = {}
        self.numbers = count(1)

    async def follow(self) -> None:
        """Hand what the source says to the pulls it is for, until the connection ends."""
        reason = "the connection was cut"
        try:
            while True:
                self._handle(TO_PULLER_DECODER.decode(await self.link.read()))
        except (KvTransferFailed, UndecodableMessage) as error:
            reason = str(error)
        finally:
            await self.link.cut(reason)
            failed = KvTransferFailed(f"{self.report.address}: {reason}")
            for pulling in self.pulls.values():
                pulling.stop(failed)
            for announced in self.probes.values():
                if not announced.done():
                    announced.set_exception(failed)

    def _handle(self, message: object) -> None:
        """What is said of a pull that has ended here crossed our word on the way."""
        match message:
            case Part(pull=number) if number in self.probes:
                if not self.probes[number].done():
                    self.probes[number].set_result(message)
            case Found() | Part() | Released() | Refused():
                if message.pull in self.pulls:
                    self._tell(self.pulls[message.pull], message)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    def _tell(self, pulling: Pulling, message: Found | Part | Released | Refused) -> None:
        match message:
            case Found(num_pages=num_pages):
                pulling.found(num_pages)
            case Part():
                pulling.announced(message)
            case Released():
                pulling.released()
            case Refused(reason=reason):
                pulling.stop(KvTransferFailed(f"{self.report.address} refused: {reason}"))


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a pull is from."""

    address: str
    incarnation: Incarnation


class Puller:
    """Pulls from any number of sources, with one connection to each."""

    def __init__(
        self,
        hello: Hello,
        staging: Staging,
        new_tag: Callable[[], int],
        clock: Clock,
        progress: ProgressThread | None,
        tasks: asyncio.TaskGroup,
        peer_timeout_s: float,
    ) -> None:
        self._hello = hello
        self._staging = staging
        self._new_tag = new_tag
        self._clock = clock
        self._progress = progress
        self._tasks = tasks
        self._peer_timeout_s = peer_timeout_s
        self._connections: dict[str, Connection] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._closed = False

    async def close(self) -> None:
        """Break off every pull and cut every connection."""
        self._closed = True
        await asyncio.gather(*(connection.link.cut() for connection in tuple(self._connections.values())))

    def links(self) -> tuple[LinkReport, ...]:
        """See `Transfer.links`."""
        return tuple(connection.report for connection in self._connections.values() if not connection.link.is_cut)

    async def connect(self, address: str, incarnation: Incarnation) -> LinkReport:
        """See `Transfer.connect`."""
        connection = await self._connection_to(address, incarnation)
        async with connection.testing:
            if connection.report.speed is None:
                await to_completion(self._test(connection))
        return connection.report

    async def pull(self, ticket: KvTicket, want: Sequence[int], into: Sequence[int], timeout_s: float) -> Pulled:
        """See `Transfer.pull`."""

        def ask(connection: Connection, number: int) -> Pull:
            us = self._hello
            claim = Claim(connection.hello.challenge, us.incarnation, us.ucx_address, ticket.key, want)
            return Pull(number, ticket.key, claim.proof(ticket.secret), token_ids(want))

        peer = Peer(ticket.address, ticket.source)
        pulling = await self._run(peer, ask, into, timeout_s, what=ticket.key, max_loss=ticket.max_loss)
        return pulling.pulled

    async def fetch(self, peer: Peer, keys: Sequence[BlockKey], into: Sequence[int], timeout_s: float) -> Fetched:
        """See `Transfer.fetch`."""

        def ask(connection: Connection, number: int) -> Fetch:
            us, names = self._hello, tuple(map(name_of, keys))
            claim = BlocksClaim(connection.hello.challenge, us.incarnation, us.ucx_address, names)
            return Fetch(number, b"".join(names), claim.proofs(keys))

        what = f"a prefix of {len(keys)} pages"
        pulling = await self._run(peer, ask, into, timeout_s, what=what, max_loss=WireFormat.NATIVE)
        return Fetched(pulling.num_pages, pulling.pulled.wire_bytes)

    async def _run(
        self,
        peer: Peer,
        ask: Callable[[Connection, int], Pull | Fetch],
        into: Sequence[int],
        timeout_s: float,
        *,
        what: str,
        max_loss: WireFormat,
    ) -> Pulling:
        """One pull from its first message to its end; `ask` makes that message, for a connection and a number."""
        deadline_s = self._clock() + timeout_s
        too_late = KvTransferFailed(f"{peer.address} did not send {what} within {timeout_s} s")
        connection = self._open_connection_to(peer.address, peer.incarnation)
        if connection is None:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._connection_to(peer.address, peer.incarnation)
            except TimeoutError as error:
                raise too_late from error
        number = next(connection.numbers)
        pulling = connection.pulls[number] = Pulling(
            number,
            connection.link,
            ask(connection, number),
            into,
            max_loss=max_loss,
            staging=self._staging,
            new_tag=self._new_tag,
            tasks=self._tasks,
            answer_timeout_s=self._peer_timeout_s,
        )
        try:
            pulling.start()
            connection.link.hurry()
            async with asyncio.timeout(max(0.0, deadline_s - self._clock())):
                await pulling.over.wait()
        except TimeoutError:
            pulling.stop(too_late)
        except BaseException:
            pulling.stop(KvTransferFailed(f"{what} is no longer wanted"))
            raise
        finally:
            if not pulling.over.is_set():
                await to_completion(pulling.end(self._peer_timeout_s))
            del connection.pulls[number]
        if pulling.error is not None:
            raise pulling.error
        return pulling

    def _open_connection_to(self, address: str, incarnation: Incarnation) -> Connection | None:
        connection = self._connections.get(address)
        if connection is None or connection.link.is_cut or connection.hello.incarnation != incarnation:
            return None
        return connection

    async def _connection_to(self, address: str, incarnation: Incarnation) -> Connection:
        """The connection to `incarnation` at `address`, made if there is none.

        One to another incarnation there stays what it is unless the one asked for answers now: either may be the older.
        """
        async with self._connecting.setdefault(address, asyncio.Lock()):
            made_meanwhile = self._open_connection_to(address, incarnation)
            if made_meanwhile is not None:
                return made_meanwhile
            old = self._connections.get(address)
            connection = await self._connect(address, incarnation)
            self._connections[address] = connection
            self._tasks.create_task(self._follow(address, connection), name=f"answers of {address}")
        if old is not None:
            await old.link.cut(f"{address} has restarted")
        return connection

    async def _follow(self, address: str, connection: Connection) -> None:
        await connection.follow()
        if self._connections.get(address) is connection:
            del self._connections[address]

    async def _connect(self, address: str, incarnation: Incarnation) -> Connection:
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                link = Link(*await asyncio.open_connection(host, int(port)), self._clock, self._progress)
                try:
                    hello = await self._greet(address, incarnation, link)
                    await link.open_endpoint(hello.ucx_address)
                    self._check_open()
                except BaseException:
                    await link.cut()
                    raise
        except (OSError, ValueError) as error:
            raise KvTransferFailed(f"no connection to {address}: {error or type(error).__name__}") from error
        return Connection(address, link, hello)

    def _check_open(self) -> None:
        if self._closed:
            raise KvTransferFailed("this worker is closing")

    async def _greet(self, address: str, incarnation: Incarnation, link: Link) -> Hello:
        self._check_open()
        link.post(Knock(incarnation))
        link.post(self._hello)
        try:
            theirs = TO_PULLER_DECODER.decode(await link.read())
        except UndecodableMessage as error:
            raise KvTransferFailed(f"{address} is no Baton worker: {error}") from error
        if isinstance(theirs, Refused):
            raise KvTransferFailed(f"{address} refused: {theirs.reason}")
        if not isinstance(theirs, Hello):
            raise KvTransferFailed(f"{address} answered a hello with {type(theirs).__name__}")
        if theirs.protocol != PROTOCOL_VERSION:
            raise KvTransferFailed(f"{address} speaks protocol {theirs.protocol}, we {PROTOCOL_VERSION}")
        if theirs.layout_fingerprint != self._hello.layout_fingerprint:
            raise LayoutMismatch(
                f"{address} has KV layout {theirs.layout_fingerprint}, ours is {self._hello.layout_fingerprint}"
            )
        obstacle = unreachable(self._hello.host, theirs.host)
        if obstacle is not None:
            raise KvTransferFailed(f"{address}: {obstacle}")
        return theirs

    async def _test(self, connection: Connection) -> None:
        """Measure the link, and tell the source too: it is the source who plans what is sent."""
        link, hello = connection.link, connection.hello
        max_bytes = min(self._hello.max_part_bytes, hello.max_part_bytes)
        speed = await measure(lambda num_bytes: self._probe(connection, num_bytes), max_bytes)
        link.meter.speed = speed
        link.post(Speed(speed.bytes_per_s, speed.latency_s))
        device = self._staging.cache.device
        transport = link.read_transport(device.type)
        peer_access = can_access_peer(device, hello.host.gpu_uuid)
        connection.report = LinkReport(
            connection.report.address,
            hello.incarnation,
            transport,
            speed,
            warning=diagnose(self._hello.host, hello.host, transport, peer_access=peer_access),
        )

    async def _probe(self, connection: Connection, num_bytes: int) -> float:
        """Seconds that so many bytes take from the source to us."""
        link, number = connection.link, next(connection.numbers)
        announced = connection.probes[number] = asyncio.get_running_loop().create_future()
        try:
            link.post(Probe(number, num_bytes))
            with link.watched(link.meter.patience_s(num_bytes)):
                await announced
            # As with parts, space here is taken after that at the source: else the two could wait for each other.
            async with self._staging.incoming.lease(num_bytes) as space:
                tag, began_s = self._new_tag(), self._clock()
                link.post(Ready(number, 0, tag))
                await link.receive(tag, space)
                return self._clock() - began_s
        finally:
            del connection.probes[number]
