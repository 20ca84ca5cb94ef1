"""The twin of the workers' network, whose ends may be stopped, dead or cut off."""

import asyncio
from collections.abc import Callable

from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer.local import Link, LocalNetwork, LocalTransfer
from shared.transfer.offer import Offer
from shared.transfer.offers import PullRefused
from shared.transfer.port import Outcome
from shared.transfer.proof import BlocksClaim
from tests.sim.processes import Process

LOOK_AGAIN_S = 0.1


class SimNetwork(LocalNetwork):
    """Attributes:
    cut_off: addresses that nobody reaches.
    processes: by address.
    on_link: told of source and puller whenever one begins to pull or to fetch.
    """

    def __init__(self, delay_s: float, bytes_per_s: float | None) -> None:
        super().__init__(delay_s, bytes_per_s)
        self.cut_off: set[str] = set()
        self.processes: dict[str, Process] = {}
        self.on_link: Callable[[LocalTransfer, LocalTransfer], None] = lambda *_: None
        self._asked: dict[_Loan, None] = {}

    def cut_away(self, address: str) -> None:
        self.cut_off.add(address)
        self.cut(address)

    def cut(self, address: str) -> None:
        super().cut(address)
        for loan in self._asked:
            if address in (loan.source.address, loan.puller.address):
                loan.drop()

    def died(self, transfer: LocalTransfer) -> None:
        """Its process was killed: what it was sending or being sent is not touched any more."""
        self.leave(transfer)
        for link in list(self.links):
            if transfer is link.puller:
                link._offer.idle.set()
                link._offer._num_sending = 0
                self.links.discard(link)
        for loan in [loan for loan in self._asked if transfer is loan.puller]:
            loan.drop()
            del self._asked[loan]

    def reach(self, puller: LocalTransfer, address: str, incarnation: Incarnation) -> LocalTransfer:
        if not self.cut_off.isdisjoint((puller.address, address)):
            raise KvTransferFailed(f"{address} does not answer")
        return super().reach(puller, address, incarnation)

    async def lend(
        self, source: LocalTransfer, puller: LocalTransfer, claim: BlocksClaim, proofs: bytes
    ) -> Offer | None:
        self.on_link(source, puller)
        loan = _Loan(source, puller)
        self._asked[loan] = None
        self.processes[source.address].run(loan.serve(claim, proofs))
        try:
            return await loan.answer
        finally:
            loan.hang_up()
            self._asked.pop(loan, None)

    def link(self, offer: Offer, source: LocalTransfer, puller: LocalTransfer) -> Link:
        self.on_link(source, puller)
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


class _Loan:
    """What a puller asked a source for, from its question to the answer's arrival."""

    def __init__(self, source: LocalTransfer, puller: LocalTransfer) -> None:
        self.source = source
        self.puller = puller
        self.answer: asyncio.Future[Offer | None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def serve(self, claim: BlocksClaim, proofs: bytes) -> None:
        """The source's part, in its process."""
        if self.answer.done():
            return
        self._task = asyncio.current_task()
        try:
            offer = await self.source.offers.lend(claim, proofs)
        except PullRefused as refusal:
            if not self.answer.done():
                self.answer.set_exception(refusal)
            return
        if not self.answer.done():
            self.answer.set_result(offer)
        elif offer is not None:
            offer.settle(Outcome.FAILED)

    def hang_up(self) -> None:
        """Nobody waits for it any more."""
        if self._task is not None:
            self._task.cancel()

    def drop(self) -> None:
        """The connection broke: the source gets back what it lent, and the puller hears of it."""
        self.hang_up()
        if not self.answer.done():
            self.answer.set_exception(KvTransferFailed(f"the link to {self.source.address} broke"))
        elif not self.answer.cancelled() and self.answer.exception() is None:
            offer = self.answer.result()
            if offer is not None:
                offer.settle(Outcome.FAILED)
