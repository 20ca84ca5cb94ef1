"""A worker's surroundings, each part the test's own."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import structlog
from prometheus_client import CollectorRegistry

from shared.errors import KvTransferFailed
from shared.observe.metrics import WorkerMetrics
from shared.request import Incarnation, WorkerRef, partition_of
from shared.transfer.port import Outcome, Pulled
from shared.wire.to_stream_out import STREAM_OUT_DECODER
from shared.wire.to_worker import TO_DECODE_DECODER, KvTicket
from shared.wire.wire_format import WireFormat
from tests.fake_tokeniser import fake_tokeniser

PREFILL = WorkerRef(0, Incarnation("prefill"))
DECODE = WorkerRef(1, Incarnation("decode"))


class InlineEngine:
    """An engine without a thread: commands run at once, steps are the test's own."""

    def __init__(self, engine):
        self.engine = engine

    def call(self, command):
        future = asyncio.get_running_loop().create_future()
        try:
            future.set_result(command(self.engine))
        except ValueError as error:
            future.set_exception(error)
        return future


class Gate:
    """Lets through what waits at it, once it is open."""

    def __init__(self, *, is_open=True):
        self._open = asyncio.Event()
        if is_open:
            self._open.set()

    @property
    def is_open(self):
        return self._open.is_set()

    def open(self):
        self._open.set()

    def shut(self):
        self._open.clear()

    async def passed(self):
        await self._open.wait()


class FakeFrames:
    """What stands in the log; `gate` holds acknowledgements up."""

    def __init__(self):
        self.entries = []
        self.gate = Gate()

    async def send(self, entry, made_s):
        self.entries.append(entry)
        await self.gate.passed()

    async def post(self, entries, made_s):
        await self.gate.passed()
        self.entries += entries


class FakeHandoff:
    """What decode was sent, and cuts; `gate` holds acknowledgements up."""

    def __init__(self):
        self.sent = []
        self.cuts = []
        self.gate = Gate()

    async def send(self, topic, slot, value):
        if topic == "stream-out":
            self.cuts.append(STREAM_OUT_DECODER.decode(value))
            assert slot == partition_of(self.cuts[-1].request_id)
            return 0
        assert (topic, slot) == ("decode", DECODE.slot)
        self.sent.append(TO_DECODE_DECODER.decode(value))
        await self.gate.passed()
        return len(self.sent) - 1


class FakeTransfer:
    """Offers that end when told to; pulls that go on until `gate` is open and then end as `fails` says."""

    def __init__(self):
        self.offers = {}
        self.withdrawn = []
        self.pulling = []
        self.num_ended = 0
        self.gate = Gate()
        self.fails = False
        self.format = WireFormat.NATIVE

    def offer(self, key, pages, *, num_tokens, secret, on_end, **rest):
        self.offers[key] = (tuple(pages), on_end, rest)
        return KvTicket(key, "prefill:1", PREFILL.incarnation, secret, num_tokens, "layout", rest["max_loss"])

    def end(self, key, outcome=Outcome.PULLED):
        _, on_end, _ = self.offers.pop(key)
        on_end(outcome)

    def withdraw(self, key):
        self.withdrawn.append(key)

    async def pull(self, ticket, *, want, into, timeout_s):
        assert len(want) == len(into)
        assert timeout_s >= 0
        self.pulling.append(ticket.key)
        try:
            await self.gate.passed()
        finally:
            self.num_ended += 1
        if self.fails:
            raise KvTransferFailed("told to")
        return Pulled(self.format, 7)


@asynccontextmanager
async def a_context(engine, *, me, transfer=None, clock_s=None):
    """What a role gets; `given_back` are credits, in order, and `computed` those whose work was told to be done;
    `gone` when workers ended."""
    given_back, computed, gone = [], [], {}
    async with asyncio.TaskGroup() as tasks:
        yield SimpleNamespace(
            me=me,
            engine=engine,
            transfer=transfer or FakeTransfer(),
            tasks=tasks,
            clock_s=clock_s or asyncio.get_running_loop().time,
            page_bytes=1,
            frames=FakeFrames(),
            handoff=FakeHandoff(),
            given_back=given_back,
            computed=computed,
            credits=SimpleNamespace(
                computed=lambda placement, worker: computed.append((placement, worker)),
                give_back=lambda placement, *workers: given_back.extend((placement, worker) for worker in workers),
            ),
            tokeniser=fake_tokeniser(),
            metrics=WorkerMetrics(CollectorRegistry(), "m"),
            log=structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical")),
            random_bytes=bytes,
            gone=gone,
            is_gone=lambda peer, heard_s: gone.get(peer, heard_s - 1) >= heard_s,
            profile=lambda: None,
        )
        for task in tasks._tasks:
            task.cancel()


async def settled():
    """Until nothing more happens by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
