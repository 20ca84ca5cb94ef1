"""What every `Transfer` does with KV that is still being computed, and with forms that cost fewer bytes."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from shared.blocks import PAGE_TOKENS
from shared.errors import KvTransferFailed
from shared.kv.progress import Chunk, KvProgress
from shared.kv.wire_format import packed_bytes
from shared.transfer import puller as puller_module
from shared.transfer.plan import LinkSpeed
from shared.transfer.port import Outcome, Refusal
from shared.wire.wire_format import WireFormat
from tests.contract.transfer_pair import a_pair
from tests.contract.transfer_worlds import LocalWorld, UcxWorld, a_layout

NUM_LAYERS = 8
LAYOUT = replace(a_layout(num_layers=NUM_LAYERS), head_dim=16)
PAGES = (3, 4, 5, 20, 7)
NUM_TOKENS = 4 * PAGE_TOKENS + 13
TIMEOUT_S = 20.0


@pytest.fixture(params=[LocalWorld, UcxWorld], ids=["local", "ucx"])
def world(request):
    return request.param()


@pytest.fixture
def claim_speed(monkeypatch):
    """Makes self-tests measure what the test says."""

    def claim(world, bytes_per_s):
        async def measure(exchange, max_bytes):
            await exchange(max_bytes)
            return LinkSpeed(bytes_per_s, 1e-4)

        if isinstance(world, LocalWorld):
            world.network.bytes_per_s = bytes_per_s
        else:
            monkeypatch.setattr(puller_module, "measure", measure)

    return claim


class Marks:
    def __init__(self):
        self.done = 0

    def num_done(self):
        return self.done


class Prefill:
    """Computes the KV of an offer chunk by chunk and layer by layer, into pages that hold rubbish before."""

    def __init__(self, pair, chunks, *, step_s=0.002, first=0):
        self.pair = pair
        self.chunks = chunks
        self.step_s = step_s
        self.progress = KvProgress(NUM_TOKENS, tokens_per_s=PAGE_TOKENS / (NUM_LAYERS * step_s))
        self._rows = pair.source_cache.pages[list(PAGES)]  # a copy: [page, layer, 2, token, head, dim]
        self._first = first
        rubbish = torch.full_like(self._rows, float("nan"))
        pair.source_cache.pages[list(PAGES)] = rubbish
        self._write(0, first, slice(0, NUM_LAYERS))

    def _write(self, start, end, layers):
        for position in range(start, end):
            page, token = divmod(position, PAGE_TOKENS)
            self.pair.source_cache.pages[PAGES[page], layers, :, token] = self._rows[page, layers, :, token]

    async def run(self):
        for start, end in self.chunks:
            marks = Marks()
            self.progress.launched(Chunk(start, end, marks))
            for layer in range(NUM_LAYERS):
                await asyncio.sleep(self.step_s)
                self._write(start, end, slice(layer, layer + 1))
                marks.done = layer + 1
        # Positions that no token fills stay rubbish at the source; nobody compares them.
        self.progress.complete()

    def check_arrived(self, want, into, **tolerance):
        for index, page in zip(want, into, strict=True):
            num_tokens = min(PAGE_TOKENS, NUM_TOKENS - index * PAGE_TOKENS)
            arrived = self.pair.puller_cache.pages[page, :, :, :num_tokens]
            torch.testing.assert_close(arrived, self._rows[index, :, :, :num_tokens], **tolerance)


@asynccontextmanager
async def a_prefill(world, chunks, *, bytes_per_s=None, claim_speed=None, first=0, step_s=0.002, **options):
    """A pair whose source computes; with `bytes_per_s` a link that was tested and found that slow."""
    if bytes_per_s is not None:
        claim_speed(world, bytes_per_s)
    async with a_pair(world, layout=LAYOUT, **options) as pair:
        if bytes_per_s is not None:
            report = await pair.puller.connect(pair.source.address, "source")
            assert report.speed.bytes_per_s == bytes_per_s
        yield pair, Prefill(pair, chunks, first=first, step_s=step_s)


ONE_CHUNK = ((0, NUM_TOKENS),)
CHUNKS = ((0, 100), (100, 128), (128, 129), (129, 250), (250, NUM_TOKENS))


@pytest.mark.parametrize("bytes_per_s", [None, 8e6, 1e9])
@pytest.mark.parametrize("chunks", [ONE_CHUNK, CHUNKS])
@pytest.mark.parametrize(
    ("want", "into"), [((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ((4, 1, 2), (1, 0, 2)), ((3,), (31,)), ((), ())]
)
async def test_what_is_computed_arrives_as_it_was_computed(world, claim_speed, bytes_per_s, chunks, want, into):
    async with a_prefill(world, chunks, bytes_per_s=bytes_per_s, claim_speed=claim_speed) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress)
        computing = asyncio.create_task(prefill.run())
        pulled = await pair.pull(ticket, want, into)
        prefill.check_arrived(want, into, rtol=0, atol=0)
        assert pulled.format is WireFormat.NATIVE
        assert pulled.wire_bytes == len(want) * LAYOUT.page_bytes
        await computing
        assert await pair.ends.wait("k") is Outcome.PULLED


async def test_what_was_found_is_sent_before_anything_is_computed(world):
    first = 2 * PAGE_TOKENS
    async with a_prefill(world, ((first, NUM_TOKENS),), first=first) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress)
        pull = asyncio.create_task(pair.pull(ticket, (0, 1, 4), (0, 1, 4)))
        marks = Marks()
        prefill.progress.launched(Chunk(first, NUM_TOKENS, marks))
        async with asyncio.timeout(TIMEOUT_S):
            while not pair.puller_cache.pages[:2].all():
                await asyncio.sleep(0.001)
        prefill.check_arrived((0, 1), (0, 1), rtol=0, atol=0)
        assert not pull.done()
        prefill._write(first, NUM_TOKENS, slice(0, NUM_LAYERS))
        marks.done = NUM_LAYERS
        await pull
        prefill.check_arrived((0, 1, 4), (0, 1, 4), rtol=0, atol=0)
        prefill.progress.complete()


async def test_layers_travel_while_later_ones_are_computed(world, claim_speed):
    async with a_prefill(world, (), bytes_per_s=8e6, claim_speed=claim_speed) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress)
        prefill.progress.tokens_per_s = NUM_TOKENS / 0.05
        marks = Marks()
        prefill.progress.launched(Chunk(0, NUM_TOKENS, marks))
        pull = asyncio.create_task(pair.pull(ticket, (0, 1, 2, 3), (0, 1, 2, 3)))
        prefill._write(0, NUM_TOKENS, slice(0, 4))
        marks.done = 4
        async with asyncio.timeout(TIMEOUT_S):
            while not pair.puller_cache.pages[:4, :4].all():
                await asyncio.sleep(0.001)
        assert not pair.puller_cache.pages[:4, 4:].any()
        prefill._write(0, NUM_TOKENS, slice(4, NUM_LAYERS))
        marks.done = NUM_LAYERS
        await pull
        prefill.check_arrived((0, 1, 2, 3), (0, 1, 2, 3), rtol=0, atol=0)


async def test_a_pull_waits_for_the_first_chunk_however_long_the_hold_is(world):
    async with a_prefill(world, ONE_CHUNK) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress, hold_s=0.05)
        pull = asyncio.create_task(pair.pull(ticket, (0, 4), (0, 4)))
        await asyncio.sleep(0.15)
        assert pair.ends.outcomes == {}
        await prefill.run()
        await pull
        prefill.check_arrived((0, 4), (0, 4), rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before the first chunk", "in a chunk"])
@pytest.mark.parametrize("how", ["withdrawn", "cancelled", "too late"])
async def test_a_pull_that_ends_while_kv_is_computed_leaves_nothing(world, when, how):
    async with a_prefill(world, (), step_s=60.0) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress, hold_s=0.1)
        timeout_s = 0.2 if how == "too late" else TIMEOUT_S
        pull = asyncio.create_task(pair.pull(ticket, (0, 4), (0, 4), timeout_s=timeout_s))
        if when == "in a chunk":
            prefill.progress.launched(Chunk(0, NUM_TOKENS, Marks()))
        await asyncio.sleep(0.1)
        if how == "withdrawn":
            pair.source.withdraw("k")
        elif how == "cancelled":
            pull.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(asyncio.CancelledError if how == "cancelled" else KvTransferFailed):
                await pull
        assert await pair.ends.wait("k") is (Outcome.WITHDRAWN if how == "withdrawn" else Outcome.FAILED)
        pair.check_arrived((), (), ())


async def test_a_source_that_closes_while_it_computes_fails_the_pull(world):
    async with a_prefill(world, ()) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress)
        pull = asyncio.create_task(pair.pull(ticket, (0,), (0,)))
        await asyncio.sleep(0.1)
        await pair.source.__aexit__(None, None, None)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(KvTransferFailed):
                await pull


TOLERANCE = {
    WireFormat.NATIVE: {"rtol": 0, "atol": 0},
    WireFormat.INT8: {"rtol": 0, "atol": 0.51 / 127 + 1e-3},
    WireFormat.INT4: {"rtol": 0, "atol": 0.51 / 15 + 1e-3},
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("max_loss", list(WireFormat))
async def test_a_slow_link_carries_what_the_ticket_allows_and_no_less_exact(world, claim_speed, max_loss, is_streamed):
    want, into = (0, 1, 2, 3, 4), (9, 8, 7, 6, 5)
    options = {"bytes_per_s": 5e5, "claim_speed": claim_speed, "pages_per_part": 32}
    async with a_prefill(world, CHUNKS, **options) as (pair, prefill):
        progress = prefill.progress if is_streamed else None
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=progress, max_loss=max_loss)
        assert ticket.max_loss is max_loss
        if is_streamed:
            _, pulled = await asyncio.gather(prefill.run(), pair.pull(ticket, want, into))
        else:
            await prefill.run()
            pulled = await pair.pull(ticket, want, into)
        assert pulled.format is max_loss
        first = WireFormat.INT8 if max_loss is WireFormat.INT4 else max_loss
        assert pulled.wire_bytes == packed_bytes(LAYOUT, first, 1, NUM_LAYERS) + packed_bytes(
            LAYOUT, max_loss, len(want) - 1, NUM_LAYERS
        )
        prefill.check_arrived(want, into, **TOLERANCE[max_loss])
        prefill.check_arrived((0,), (9,), **TOLERANCE[first])


async def test_a_fast_link_carries_exact_pages_though_others_are_allowed(world, claim_speed):
    async with a_prefill(world, ONE_CHUNK, bytes_per_s=1e11, claim_speed=claim_speed) as (pair, prefill):
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, progress=prefill.progress, max_loss=WireFormat.INT4)
        _, pulled = await asyncio.gather(prefill.run(), pair.pull(ticket, (0, 4), (0, 4)))
        assert pulled.format is WireFormat.NATIVE
        prefill.check_arrived((0, 4), (0, 4), rtol=0, atol=0)


async def test_a_puller_takes_nothing_more_lossy_than_its_ticket_says(world, claim_speed):
    async with a_prefill(world, ONE_CHUNK, bytes_per_s=5e5, claim_speed=claim_speed) as (pair, prefill):
        await prefill.run()
        ticket = pair.offer(pages=PAGES, num_tokens=NUM_TOKENS, max_loss=WireFormat.INT8)
        with pytest.raises(KvTransferFailed, match="lossy"):
            await pair.pull(replace(ticket, max_loss=WireFormat.NATIVE), (0,), (0,))
        assert await pair.ends.wait("k") is Outcome.FAILED
        pair.check_arrived((), (), ())


async def test_many_pulls_share_a_link_while_their_kv_is_computed(world, claim_speed):
    async with a_prefill(world, (), bytes_per_s=1e7, claim_speed=claim_speed, pages_per_part=2) as (pair, _):

        async def hand_over(number):
            key, page = f"{number}", 3 * number
            progress = KvProgress(3 * PAGE_TOKENS, tokens_per_s=1e4)
            ticket = pair.offer(key, (page, page + 1, page + 2), progress=progress)
            pull = asyncio.create_task(pair.pull(ticket, (0, 1, 2), (page, page + 1, page + 2)))
            for start in range(0, 3 * PAGE_TOKENS, 48):
                marks = Marks()
                progress.launched(Chunk(start, start + 48, marks))
                for marks.done in range(NUM_LAYERS + 1):
                    await asyncio.sleep(0.001)
            await pull
            pages = slice(page, page + 3)
            torch.testing.assert_close(
                pair.puller_cache.pages[pages], pair.source_cache.pages[pages], rtol=0, atol=0, equal_nan=True
            )

        await asyncio.gather(*map(hand_over, range(10)))
        assert all([await pair.ends.wait(f"{number}") is Outcome.PULLED for number in range(10)])
        assert not pair.source.refusals


async def test_a_link_that_was_not_tested_has_no_speed(world):
    async with a_pair(world) as pair:
        assert pair.puller.links() == ()
        await pair.pull(pair.offer())
        (link,) = pair.puller.links()
        assert (link.address, link.incarnation, link.speed) == (pair.source.address, "source", None)


async def test_a_link_is_tested_once_and_both_ends_know_it(world):
    async with a_pair(world, pages_per_part=64) as pair:
        if isinstance(world, LocalWorld):
            world.network.bytes_per_s = 1e9
        report, again = await asyncio.gather(*(pair.puller.connect(pair.source.address, "source") for _ in range(2)))
        assert report == again
        assert pair.puller.links() == (report,)
        assert 1e5 < report.speed.bytes_per_s < 1e12
        assert 0 <= report.speed.latency_s < 1
        assert report.transport
        await pair.pull(pair.offer())
        assert Refusal.PROTOCOL not in pair.source.refusals
