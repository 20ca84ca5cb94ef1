"""The twin of the workers' network, whose ends may be stopped, dead or cut off."""

import asyncio

from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer.local import Link, LocalNetwork, LocalTransfer
from shared.transfer.offers import Offer
from tests.sim.processes import Process

LOOK_AGAIN_S = 0.1


class SimNetwork(LocalNetwork):
    """Attributes:
    cut_off: addresses that nobody reaches.
    processes: by address.
    """

    def __init__(self, delay_s: float) -> None:
        super().__init__(delay_s)
        self.cut_off: set[str] = set()
        self.processes: dict[str, Process] = {}

    def cut_away(self, address: str) -> None:
        self.cut_off.add(address)
        self.cut(address)

    def died(self, transfer: LocalTransfer) -> None:
        """Its process was killed: what it was sending or being sent is not touched any more."""
        self.leave(transfer)
        for link in list(self.links):
            if transfer is link.puller:
                link._offer.idle.set()
                link._offer._num_sending = 0
                self.links.discard(link)

    def reach(self, puller: LocalTransfer, address: str, incarnation: Incarnation) -> LocalTransfer:
        if not self.cut_off.isdisjoint((puller.address, address)):
            raise KvTransferFailed(f"{address} does not answer")
        return super().reach(puller, address, incarnation)

    def link(self, offer: Offer, source: LocalTransfer, puller: LocalTransfer) -> Link:
        link = super().link(offer, source, puller)
        return _Link(offer, source, puller, self.processes[source.address], fails=link.fails)


class _Link(Link):
    """A source that is stopped sends nothing."""

    def __init__(
        self, offer: Offer, source: LocalTransfer, puller: LocalTransfer, process: Process, *, fails: bool
    ) -> None:
        super().__init__(offer, source, puller, fails=fails)
        self._process = process

    async def carry(self, delay_s: float) -> None:
        await super().carry(delay_s)
        while self._process.stopped:
            await super().carry(LOOK_AGAIN_S)
            await asyncio.sleep(0)
