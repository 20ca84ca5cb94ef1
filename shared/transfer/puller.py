"""The puller's side of `shared.transfer.ucx`: connects to sources, asks for pages and receives them."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count

import torch

from shared.errors import KvTransferFailed, LayoutMismatch
from shared.transfer.control import (
    PROTOCOL_VERSION,
    TO_PULLER_DECODER,
    Confirm,
    ControlMessage,
    GiveUp,
    Granted,
    Hello,
    Pull,
    Ready,
    Refused,
    Released,
)
from shared.transfer.link import Link
from shared.transfer.plan import Message, plan_messages
from shared.transfer.port import Clock
from shared.transfer.staging import Staging, to_completion
from shared.wire.codec import UndecodableMessage
from shared.wire.to_worker import KvTicket

NUM_LANES = 2
"""Messages of one pull on their way at once: one is copied while the other is on the wire."""


class _Pulling:
    """One pull: the answer it waits for, and what ended it early.

    Attributes:
        stopped: why nothing more will come; None while all is well.
    """

    def __init__(self) -> None:
        self.stopped: KvTransferFailed | None = None
        self._answer: asyncio.Future[None] | None = None

    async def answer(self) -> None:
        """Wait for the source's yes. Raises KvTransferFailed for a no."""
        if self.stopped is not None:
            raise self.stopped
        self._answer = asyncio.get_running_loop().create_future()
        await self._answer

    def agree(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def stop(self, error: KvTransferFailed) -> None:
        self.stopped = self.stopped or error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class _Connection:
    """A source we are connected to and the pulls on the way from it."""

    def __init__(self, address: str, link: Link, hello: Hello) -> None:
        self.address = address
        self.link = link
        self.hello = hello
        self.pulls: dict[int, _Pulling] = {}
        self.numbers = count(1)

    async def follow(self) -> None:
        """Hand the source's answers to the pulls they are for, until the connection ends."""
        reason = "the connection was cut"
        try:
            while True:
                self._handle(TO_PULLER_DECODER.decode(await self.link.read()))
        except (KvTransferFailed, UndecodableMessage) as error:
            reason = str(error)
        finally:
            await self.link.cut()
            for pulling in self.pulls.values():
                pulling.stop(KvTransferFailed(f"{self.address}: {reason}"))

    def _handle(self, message: ControlMessage) -> None:
        match message:
            case Granted(pull=number) | Released(pull=number):
                if number in self.pulls:
                    self.pulls[number].agree()
            case Refused(pull=number, reason=reason):
                if number in self.pulls:
                    self.pulls[number].stop(KvTransferFailed(f"{self.address} refused: {reason}"))
            case _:
                raise UndecodableMessage(f"{type(message).__name__} has no place here")


class Puller:
    """Pulls from any number of sources, with one connection to each."""

    def __init__(
        self,
        hello: Hello,
        staging: Staging,
        new_tag: Callable[[], int],
        clock: Clock,
        tasks: asyncio.TaskGroup,
        peer_timeout_s: float,
    ) -> None:
        self._hello = hello
        self._staging = staging
        self._new_tag = new_tag
        self._clock = clock
        self._tasks = tasks
        self._peer_timeout_s = peer_timeout_s
        self._connections: dict[str, _Connection] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._closed = False

    async def close(self) -> None:
        """Break off every pull and cut every connection."""
        self._closed = True
        await asyncio.gather(*(connection.link.cut() for connection in tuple(self._connections.values())))

    async def pull(self, ticket: KvTicket, want: Sequence[int], into: Sequence[int], timeout_s: float) -> None:
        """See `Transfer.pull`."""
        deadline_s = self._clock() + timeout_s
        try:
            async with self._until(deadline_s):
                connection = await self._connection_to(ticket)
            await self._pull_over(connection, ticket, want, into, deadline_s)
        except TimeoutError as error:
            raise KvTransferFailed(f"{ticket.address} did not send {ticket.key} within {timeout_s} s") from error

    def _until(self, deadline_s: float) -> asyncio.Timeout:
        return asyncio.timeout(max(0.0, deadline_s - self._clock()))

    async def _connection_to(self, ticket: KvTicket) -> _Connection:
        address = ticket.address
        async with self._connecting.setdefault(address, asyncio.Lock()):
            connection = self._connections.get(address)
            if connection is None or connection.link.is_cut:
                connection = await self._connect(address)
                self._connections[address] = connection
                self._tasks.create_task(connection.follow(), name=f"answers of {address}")
        if connection.hello.incarnation != ticket.source:
            raise KvTransferFailed(
                f"{address} has restarted: it is {connection.hello.incarnation}, not {ticket.source}"
            )
        return connection

    async def _connect(self, address: str) -> _Connection:
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                link = Link(*await asyncio.open_connection(host, int(port)))
                try:
                    hello = await self._greet(address, link)
                    await link.open_endpoint(hello.ucx_address)
                    self._check_open()
                except BaseException:
                    await link.cut()
                    raise
        except (OSError, ValueError) as error:
            raise KvTransferFailed(f"no connection to {address}: {error or type(error).__name__}") from error
        return _Connection(address, link, hello)

    def _check_open(self) -> None:
        if self._closed:
            raise KvTransferFailed("this worker is closing")

    async def _greet(self, address: str, link: Link) -> Hello:
        self._check_open()
        link.post(self._hello)
        try:
            theirs = TO_PULLER_DECODER.decode(await link.read())
        except UndecodableMessage as error:
            raise KvTransferFailed(f"{address} is no Baton worker: {error}") from error
        if not isinstance(theirs, Hello):
            raise KvTransferFailed(f"{address} answered a hello with {type(theirs).__name__}")
        if theirs.protocol != PROTOCOL_VERSION:
            raise KvTransferFailed(f"{address} speaks protocol {theirs.protocol}, we {PROTOCOL_VERSION}")
        if theirs.layout_fingerprint != self._hello.layout_fingerprint:
            raise LayoutMismatch(
                f"{address} has KV layout {theirs.layout_fingerprint}, ours is {self._hello.layout_fingerprint}"
            )
        if theirs.message_bytes < self._staging.cache.layout.page_bytes:
            raise KvTransferFailed(f"{address} sends messages of {theirs.message_bytes} bytes, which hold no page")
        return theirs

    async def _pull_over(
        self, connection: _Connection, ticket: KvTicket, want: Sequence[int], into: Sequence[int], deadline_s: float
    ) -> None:
        link = connection.link
        number = next(connection.numbers)
        pulling = connection.pulls[number] = _Pulling()
        confirmed = False
        try:
            link.post(Pull(number, ticket.key, ticket.secret, tuple(want)))
            await self._answer(link, pulling, deadline_s)
            await self._receive_all(connection, number, pulling, into, deadline_s)
            link.post(Confirm(number))
            confirmed = True
            await self._answer(link, pulling, deadline_s)
        finally:
            del connection.pulls[number]
            if not confirmed:
                with suppress(KvTransferFailed):  # a connection that is gone says as much
                    link.post(GiveUp(number))

    async def _answer(self, link: Link, pulling: _Pulling, deadline_s: float) -> None:
        """Wait for the source's word on the pull; a source that is silent until the deadline is cut off."""
        try:
            async with self._until(deadline_s):
                await pulling.answer()
        except TimeoutError:
            await link.cut()
            raise

    async def _receive_all(
        self, connection: _Connection, number: int, pulling: _Pulling, into: Sequence[int], deadline_s: float
    ) -> None:
        message_bytes = min(self._hello.message_bytes, connection.hello.message_bytes)
        plan = plan_messages(len(into), self._staging.cache.layout.page_bytes, message_bytes)
        todo = enumerate(plan)
        lanes = [
            asyncio.create_task(self._receive_some(connection.link, number, pulling, todo, into, deadline_s))
            for _ in range(min(NUM_LANES, len(plan)))
        ]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            if lanes:
                await to_completion(asyncio.wait(lanes))

    async def _receive_some(
        self,
        link: Link,
        number: int,
        pulling: _Pulling,
        todo: Iterator[tuple[int, Message]],
        into: Sequence[int],
        deadline_s: float,
    ) -> None:
        page_bytes = self._staging.cache.layout.page_bytes
        for index, message in todo:
            async with self._until(deadline_s) as wait, self._staging.incoming.lease() as buffer:
                wait.reschedule(None)  # it bounds the wait for a buffer; the receive minds the deadline itself
                part = buffer[: message.num_pages * page_bytes]
                if pulling.stopped is not None:
                    raise pulling.stopped
                await to_completion(self._receive(link, number, index, part, deadline_s))
                await self._staging.scatter(part, into[message.start : message.end])
        if pulling.stopped is not None:
            raise pulling.stopped

    async def _receive(self, link: Link, number: int, index: int, part: torch.Tensor, deadline_s: float) -> None:
        """Message `index` into `part`. However this ends, UCX no longer writes to `part`."""
        tag = self._new_tag()
        arrival = await link.post_receive(tag, part)
        try:
            link.post(Ready(number, index, tag, part.numel()))
            await asyncio.wait({arrival}, timeout=max(0.0, deadline_s - self._clock()))
            if not arrival.done():
                raise TimeoutError
            arrival.result()
        except (KvTransferFailed, TimeoutError):
            await link.cut()
            await asyncio.wait({arrival})
            raise
