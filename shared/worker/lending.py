"""Lends pages of this worker's cache to peers that fetch them."""

import asyncio
from collections.abc import Sequence

from shared.blocks import BlockHash
from shared.engine.port import Engine
from shared.kv.loan import Loan
from shared.observe.metrics import WorkerMetrics
from shared.worker.engine_thread import EngineThread


class EngineLender:
    """`shared.transfer.port.Lender` over an engine on its thread; used on one event loop.

    A batch that is computed is not waited for; what comes back from host memory first is.
    """

    def __init__(self, engine: EngineThread, metrics: WorkerMetrics) -> None:
        self._engine = engine
        self._metrics = metrics

    async def lend(self, names: Sequence[BlockHash]) -> Loan:
        """See `Lender`."""
        loop = asyncio.get_running_loop()
        lent: asyncio.Future[Loan] = loop.create_future()

        def begin(engine: Engine) -> None:
            def over() -> None:
                loop.call_soon_threadsafe(self._lent, engine.lend(names), lent)

            engine.bring(names, over)

        try:
            await self._engine.call_beside(begin)
            loan = await lent
        except asyncio.CancelledError:
            lent.cancel()
            if lent.done() and not lent.cancelled():
                self.give_back(lent.result())
            raise
        self._metrics.lent_pages.inc(len(loan.pages))
        return loan

    def give_back(self, loan: Loan) -> None:
        """See `Lender`."""
        self._engine.call(lambda engine: engine.give_back(loan))

    def _lent(self, loan: Loan, lent: asyncio.Future[Loan]) -> None:
        if lent.done():
            self.give_back(loan)  # who asked for it is gone
        else:
            lent.set_result(loan)
