"""One pull as its source serves it: parts packed, announced, and sent when the puller is ready for them."""

import asyncio
from contextlib import suppress

import torch

from shared.errors import KvTransferFailed
from shared.transfer.control import Part, ProtocolViolation, Ready, Refused
from shared.transfer.feed import Load, PartFeed
from shared.transfer.link import Link
from shared.transfer.offer import Offer
from shared.transfer.offers import Offers
from shared.transfer.port import Outcome
from shared.transfer.staging import NUM_LANES, Staging
from shared.wire.wire_format import WireFormat


class Announcements:
    """What was announced on one link under one number, each to be answered by one `Ready`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._tags: dict[int, asyncio.Future[int | None]] = {}
        self._stopped = False

    def announce(self, part: Part) -> asyncio.Future[int | None]:
        """Tell the puller; the future gets the tag under which it receives, or None if all is stopped before."""
        tag = self._tags[part.index] = asyncio.get_running_loop().create_future()
        self._link.post(part)
        if self._stopped:
            tag.set_result(None)
        return tag

    async def tag(self, tag: "asyncio.Future[int | None]") -> int | None:
        """Wait for the puller; the link is cut if it stands still."""
        if tag.done():
            return tag.result()
        with self._link.watched(self._link.meter.patience_s()):
            return await tag

    def ready(self, ready: Ready) -> bool:
        """The puller is ready; False if nobody waits for that any more, and it gets a void message.

        Raises ProtocolViolation for what was not announced or answered before.
        """
        tag = self._tags.pop(ready.index, None)
        if tag is None:
            raise ProtocolViolation(f"part {ready.index} was not announced, or asked for before")
        if tag.done():
            return False
        tag.set_result(ready.tag)
        return True

    def stop(self) -> None:
        """Nothing more is sent to whoever has not said that it is ready."""
        self._stopped = True
        for tag in self._tags.values():
            if not tag.done():
                tag.set_result(None)


class Serving:
    """A pull that was let in; lives until the puller confirms, gives up, or is gone."""

    def __init__(self, number: int, link: Link, offers: Offers, offer: Offer, feed: PartFeed, staging: Staging) -> None:
        self.offer = offer
        self._number = number
        self._link = link
        self._offers = offers
        self._feed = feed
        self._staging = staging
        self._announcements = Announcements(link)
        self._wanted = True

    def begin(self) -> None:
        """Let the puller in."""
        self.offer.begin(self._link.cut, self._settled)

    def send_by(self, tasks: asyncio.TaskGroup) -> None:
        """Send what the feed gives, in up to `NUM_LANES` tasks."""
        tasks.create_task(self._lane(tasks, NUM_LANES - 1))

    def ready(self, ready: Ready) -> bool:
        """See `Announcements.ready`."""
        return self._announcements.ready(ready)

    def give_up(self) -> None:
        """The puller does not want the pages, or is gone."""
        self._wanted = False
        self.offer.settle(Outcome.FAILED)

    def _settled(self) -> None:
        self._announcements.stop()
        if self._wanted and self.offer.outcome is not Outcome.PULLED:
            refusal = self._offers.refused(self.offer.refusal_after)
            with suppress(KvTransferFailed):  # a link that is cut says as much
                self._link.post(Refused(self._number, refusal.reason))

    async def _lane(self, tasks: asyncio.TaskGroup, num_more: int) -> None:
        try:
            while (load := await self._feed.next()) is not None:
                if num_more and not self._feed.is_empty:
                    tasks.create_task(self._lane(tasks, num_more - 1))
                num_more = 0
                async with self._link.lanes, self._staging.outgoing.lease(load.num_bytes) as space:
                    if self.offer.outcome is not None:
                        return
                    with self.offer.sending():
                        await self._send(load, space)
        except KvTransferFailed:
            await self._link.cut()  # whoever reads it sees its end and reports what was being pulled over it

    async def _send(self, load: Load, space: torch.Tensor) -> None:
        """Announce first: the puller gets ready while the part is packed."""
        part = load.part
        announced = self._announcements.announce(
            Part(
                pull=self._number,
                index=load.index,
                start=part.start,
                end=part.end,
                first_layer=part.layers.first,
                end_layer=part.layers.end,
                format=load.format,
                num_bytes=load.num_bytes,
            )
        )
        await self._staging.pack(load.pages, part.layers, load.format, space, last_tokens=load.last_tokens)
        tag = await self._announcements.tag(announced)
        if tag is not None:
            await self._link.send(tag, space)


class Probing:
    """A probe of the link: zeros, so that nobody learns what lay in the arena before."""

    def __init__(self, number: int, link: Link, staging: Staging) -> None:
        self.number = number
        self._link = link
        self._staging = staging
        self._announcements = Announcements(link)

    async def run(self, num_bytes: int) -> None:
        try:
            async with self._staging.outgoing.lease(num_bytes) as space:
                await self._staging.clear(space)
                tag = await self._announcements.tag(self._announcements.announce(self._announcement(num_bytes)))
                if tag is not None:
                    await self._link.send(tag, space)
        except KvTransferFailed:
            await self._link.cut()

    def _announcement(self, num_bytes: int) -> Part:
        return Part(self.number, 0, 0, 0, 0, 0, WireFormat.NATIVE, num_bytes)

    def ready(self, ready: Ready) -> bool:
        """See `Announcements.ready`."""
        return self._announcements.ready(ready)

    def stop(self) -> None:
        """The puller is gone."""
        self._announcements.stop()
