"""One pull as its puller sees it: parts announced, received, and unpacked into our pages."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from shared.errors import KvTransferFailed
from shared.kv.wire_format import LayerSpan, packed_bytes
from shared.transfer.checks import is_allowed
from shared.transfer.control import Confirm, Fetch, GiveUp, Part, ProtocolViolation, Pull, Ready
from shared.transfer.cover import Cover
from shared.transfer.link import Link
from shared.transfer.port import Pulled
from shared.transfer.staging import Staging
from shared.wire.wire_format import WireFormat


class Pulling:
    """See `shared.transfer.ucx` for the talk.

    Attributes:
        over: set when the pull has succeeded or failed, and nothing writes to our pages or our arena any more.
        error: why it failed; None while all is well.
        pulled: what has arrived.
    """

    def __init__(
        self,
        number: int,
        link: Link,
        ask: Pull | Fetch,
        into: Sequence[int],
        *,
        max_loss: WireFormat,
        staging: Staging,
        new_tag: Callable[[], int],
        tasks: asyncio.TaskGroup,
        answer_timeout_s: float,
    ) -> None:
        """`max_loss` is allowed of what `ask` asks for. `answer_timeout_s`: a source that does not answer the
        confirmation in this time is cut off."""
        self.over = asyncio.Event()
        self.error: KvTransferFailed | None = None
        self.pulled = Pulled(WireFormat.NATIVE, 0)
        self._number = number
        self._link = link
        self._ask = ask
        self._want: Sequence[int] | None = None  # until it is known what the source has
        self._max_loss = max_loss
        self._into = into
        self._staging = staging
        self._layout = staging.cache.layout
        self._new_tag = new_tag
        self._tasks = tasks
        self._answer_timeout_s = answer_timeout_s
        self._answer_timer: asyncio.TimerHandle | None = None
        self._cover = Cover(0, self._layout.num_layers)
        self._num_to_arrive = 0
        self._num_in_flight = 0
        self._released = False

    def start(self) -> None:
        """Ask. Raises KvTransferFailed."""
        self._link.post(self._ask)
        if isinstance(self._ask, Pull):
            self._expect(self._ask.want)

    @property
    def num_pages(self) -> int:
        """Pages that the source has of those that were asked for, as far as that is known."""
        return 0 if self._want is None else len(self._want)

    def found(self, num_pages: int) -> None:
        """The source has the first `num_pages` of the blocks. Raises ProtocolViolation if that is no answer."""
        if self.error is not None:
            return
        if self._want is not None or num_pages > len(self._into):
            raise ProtocolViolation(f"pull {self._number}: {num_pages} pages are found")
        if num_pages:
            self._expect(range(num_pages))
        else:
            self._want, self._released = (), True
            self._look_whether_over()

    def _expect(self, want: Sequence[int]) -> None:
        self._want = want
        self._cover = Cover(len(want), self._layout.num_layers)
        self._num_to_arrive = self._cover.num_left
        self._confirm_if_all_arrived()

    def announced(self, part: Part) -> None:
        """The source sends `part` when we are ready. Raises ProtocolViolation for one that we did not ask for."""
        if self.error is not None:
            return
        self._check(part)
        self._tasks.create_task(self._take(part))

    def released(self) -> None:
        """The source held the pages until we had them. Raises ProtocolViolation if we did not say so."""
        if self._answer_timer is None:
            raise ProtocolViolation(f"pull {self._number} was not confirmed")
        self._answer_timer.cancel()
        self._released = True
        self._look_whether_over()

    def stop(self, error: KvTransferFailed) -> None:
        """The pull has failed, unless it is over: nothing more is asked for."""
        if self.over.is_set():
            return
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        elif self.error is None:
            with suppress(KvTransferFailed):  # a connection that is gone says as much
                self._link.post(GiveUp(self._number))
        self.error = self.error or error
        self._look_whether_over()

    async def end(self, patience_s: float) -> None:
        """Wait until it is over, once it was stopped; what is in flight after `patience_s` is cut off."""
        with self._link.watched(patience_s):
            await self.over.wait()

    def _check(self, part: Part) -> None:
        layers = LayerSpan(part.first_layer, part.end_layer)
        try:
            self._cover.add(part.start, part.end, layers)
        except ValueError as error:
            raise ProtocolViolation(f"a part that was not asked for: {error}") from error
        if self._want is None or not is_allowed(self._max_loss, part.format, self._want[part.start : part.end]):
            raise ProtocolViolation(f"{part.format} is more lossy than is allowed")
        num_bytes = packed_bytes(self._layout, part.format, part.end - part.start, layers.num_layers)
        if part.num_bytes != num_bytes or num_bytes > self._staging.max_part_bytes:
            raise ProtocolViolation(f"a part of {part.num_bytes} bytes, where {num_bytes} would do")

    async def _take(self, part: Part) -> None:
        async with self._staging.incoming.lease(part.num_bytes) as space:
            if self.error is not None:
                return
            self._num_in_flight += 1
            try:
                await self._receive(part, space)
                if self.error is None:
                    await self._unpack(part, space)
            except KvTransferFailed as error:
                self.stop(error)
                await self._link.cut()
            finally:
                self._num_in_flight -= 1
        self._look_whether_over()

    async def _receive(self, part: Part, space: torch.Tensor) -> None:
        tag = self._new_tag()
        self._link.post(Ready(self._number, part.index, tag))
        await self._link.receive(tag, space)
        self._num_to_arrive -= (part.end - part.start) * (part.end_layer - part.first_layer)
        self._confirm_if_all_arrived()

    async def _unpack(self, part: Part, space: torch.Tensor) -> None:
        layers = LayerSpan(part.first_layer, part.end_layer)
        await self._staging.unpack(space, self._into[part.start : part.end], layers, part.format)
        self.pulled = self.pulled.plus(part.format, part.num_bytes)

    def _confirm_if_all_arrived(self) -> None:
        """What has arrived lies in our arena; the source need not wait until it is unpacked."""
        if self._num_to_arrive == 0 and self.error is None:
            self._link.post(Confirm(self._number))
            self._answer_timer = self._link.cut_after(self._answer_timeout_s)

    def _look_whether_over(self) -> None:
        if self._num_in_flight == 0 and (self._released or self.error is not None):
            self.over.set()
