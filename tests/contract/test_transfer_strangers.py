"""`UcxTransfer` facing peers that say what no peer of ours says, or say it twice, or stand still."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import torch

from shared.blocks import PAGE_TOKENS, token_ids
from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer import link_meter
from shared.transfer.control import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    TO_PULLER_DECODER,
    TO_SOURCE_DECODER,
    Confirm,
    GiveUp,
    Hello,
    Knock,
    Part,
    Probe,
    Pull,
    Ready,
    Refused,
    Released,
)
from shared.transfer.link import Link
from shared.transfer.port import Outcome, Refusal
from shared.transfer.proof import Claim
from shared.transfer.ucx import PEER_TIMEOUT_S
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat
from tests.contract.transfer_pair import TIMEOUT_S, Ends
from tests.contract.transfer_worlds import SECRET, UcxWorld, a_cache

LAYOUT = a_cache(1).layout


def a_hello(world, incarnation):
    return Hello(
        protocol=PROTOCOL_VERSION,
        layout_fingerprint=LAYOUT.fingerprint,
        incarnation=Incarnation(incarnation),
        max_part_bytes=2**30,
        ucx_address=world._context.address,
        host=world._context.facts(torch.device("cpu")),
    )


class Stranger:
    """The other end of a connection, by hand."""

    def __init__(self, world, link, decoder):
        self.world = world
        self.link = link
        self._decoder = decoder

    def say(self, *messages):
        for message in messages:
            self.link.post(proven(self, message) if isinstance(message, Pull) else message)

    async def hear(self):
        async with asyncio.timeout(TIMEOUT_S):
            return self._decoder.decode(await self.link.read())

    async def is_hung_up_on(self):
        with suppress(KvTransferFailed):
            while True:
                await self.hear()


@asynccontextmanager
async def a_source():
    """A source with one offer of pages 1 and 2, and a stranger that has said hello to it."""
    world, ends = UcxWorld(), Ends()
    cache = a_cache(seed=1)
    async with world, world.transfer(cache, "source") as source:
        source.offer("k", (1, 2), num_tokens=128, secret=SECRET, puller="stranger", hold_s=60.0, on_end=ends.of("k"))
        host, port = source.address.split(":")
        link = Link(*await asyncio.open_connection(host, int(port)), asyncio.get_running_loop().time, None)
        stranger = Stranger(world, link, TO_PULLER_DECODER)
        stranger.say(Knock("source"), a_hello(world, "stranger"))
        hello = await stranger.hear()
        stranger.challenge = hello.challenge
        await link.open_endpoint(hello.ucx_address)
        try:
            yield source, stranger, ends
        finally:
            await link.cut()
        assert await ends.wait("k")
        await world.check_nothing_leaked()


PULL = Pull(1, "k", b"", token_ids((0, 1)))
"""Proven when it is said."""


def proven(stranger, pull):
    ucx_address = stranger.world._context.address
    claim = Claim(stranger.challenge, Incarnation("stranger"), ucx_address, pull.key, pull.want)
    return replace(pull, proof=claim.proof(SECRET))


async def receive(stranger, part, num_bytes):
    space = torch.zeros(num_bytes, dtype=torch.uint8)
    tag = stranger.world._context.new_tag()
    receiving = asyncio.create_task(stranger.link.receive(tag, space))
    stranger.say(Ready(part.pull, part.index, tag))
    async with asyncio.timeout(TIMEOUT_S):
        await receiving
    return space


async def test_a_confirmation_said_twice_is_answered_twice_and_counts_once():
    async with a_source() as (_, stranger, ends):
        stranger.say(replace(PULL, want=token_ids(())), Confirm(1), Confirm(1))
        assert [await stranger.hear(), await stranger.hear()] == [Released(1), Released(1)]
        assert await ends.wait("k") is Outcome.PULLED
        stranger.say(Confirm(1))
        assert await stranger.hear() == Released(1)


async def test_a_confirmation_that_comes_too_late_is_refused_each_time():
    async with a_source() as (source, stranger, _):
        stranger.say(PULL)
        part = await stranger.hear()
        await receive(stranger, part, part.num_bytes)
        source.withdraw("k")
        stranger.say(Confirm(1), Confirm(1))
        answers = {await stranger.hear() for _ in range(3)}
        assert answers == {Refused(1, Refusal.WITHDRAWN)}
        assert source.refusals == {Refusal.WITHDRAWN: 1}


async def test_who_is_ready_for_what_was_withdrawn_gets_a_void_message():
    async with a_source() as (source, stranger, _):
        stranger.say(PULL)
        part = await stranger.hear()
        source.withdraw("k")
        assert await stranger.hear() == Refused(1, Refusal.WITHDRAWN)
        space = await receive(stranger, part, part.num_bytes)
        assert not space.any()


async def test_a_pull_given_up_can_be_given_up_again_and_nothing_of_it_asked_for():
    async with a_source() as (source, stranger, ends):
        stranger.say(PULL)
        part = await stranger.hear()
        stranger.say(GiveUp(1), GiveUp(1))
        assert await ends.wait("k") is Outcome.FAILED
        stranger.say(Ready(1, part.index, 1))
        await stranger.is_hung_up_on()
        assert source.refusals == {Refusal.PROTOCOL: 1}


@pytest.mark.parametrize("again", [PULL, replace(PULL, key="other"), replace(PULL, pull=0)])
async def test_a_number_is_used_once(again):
    async with a_source() as (source, stranger, ends):
        stranger.say(PULL, again)
        await stranger.is_hung_up_on()
        assert await ends.wait("k") is Outcome.FAILED
        assert source.refusals == {Refusal.PROTOCOL: 1}


async def test_a_part_is_sent_once():
    async with a_source() as (source, stranger, ends):
        stranger.say(PULL)
        part = await stranger.hear()
        await receive(stranger, part, part.num_bytes)
        stranger.say(Ready(1, part.index, 1))
        await stranger.is_hung_up_on()
        assert await ends.wait("k") is Outcome.FAILED
        assert source.refusals == {Refusal.PROTOCOL: 1}


async def test_a_probe_that_is_answered_wrongly_keeps_no_memory():
    async with a_source() as (source, stranger, _):
        stranger.say(Probe(1, 4096))
        part = await stranger.hear()
        stranger.say(Ready(1, part.index + 1, 1))
        await stranger.is_hung_up_on()
        source.withdraw("k")


async def test_who_was_refused_and_confirms_all_the_same_is_refused_again():
    async with a_source() as (source, stranger, ends):
        source.withdraw("k")
        await ends.wait("k")
        stranger.say(replace(PULL, want=token_ids(())), Confirm(1))
        assert [await stranger.hear(), await stranger.hear()] == [Refused(1, Refusal.WITHDRAWN)] * 2
        assert source.refusals == {Refusal.WITHDRAWN: 1}


async def test_an_oversized_request_is_refused_and_counted():
    async with a_source() as (source, stranger, ends):
        stranger.link._writer.write((MAX_CONTROL_BYTES + 1).to_bytes(4, "big"))
        await stranger.is_hung_up_on()
        assert source.refusals == {Refusal.OVERSIZED: 1}
        assert ends.outcomes == {}
        source.withdraw("k")


async def test_a_puller_that_never_gets_ready_is_cut_off_and_keeps_no_memory(monkeypatch):
    monkeypatch.setattr(link_meter, "STALL_S", 0.1)
    async with a_source() as (_, stranger, ends):
        stranger.say(PULL)
        await stranger.hear()
        await stranger.is_hung_up_on()
        assert await ends.wait("k") is Outcome.FAILED


PART = Part(
    pull=1,
    index=0,
    start=0,
    end=2,
    first_layer=0,
    end_layer=1,
    format=WireFormat.NATIVE,
    num_bytes=2 * LAYOUT.page_bytes,
)


@asynccontextmanager
async def a_puller(pages_per_part=4):
    """A puller that pulls two pages from a stranger, who has been asked for them."""
    world, cache = UcxWorld(), a_cache()
    strangers = asyncio.Queue()

    async def accept(reader, writer):
        stranger = Stranger(world, Link(reader, writer, asyncio.get_running_loop().time, None), TO_SOURCE_DECODER)
        assert [await stranger.hear(), (await stranger.hear()).incarnation] == [Knock("stranger"), "puller"]
        stranger.say(a_hello(world, "stranger"))
        strangers.put_nowait((stranger, await stranger.hear()))

    async with world, world.transfer(cache, "puller", pages_per_part=pages_per_part) as puller:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        ticket = KvTicket("k", f"{host}:{port}", "stranger", SECRET, 2 * PAGE_TOKENS, LAYOUT.fingerprint)
        pull = asyncio.create_task(puller.pull(ticket, want=(0, 1), into=(4, 5), timeout_s=TIMEOUT_S))
        stranger, asked = await strangers.get()
        claim = Claim(b"", Incarnation("puller"), world._context.address, "k", asked.want)
        assert asked == replace(PULL, proof=claim.proof(SECRET))
        try:
            yield stranger, pull
        finally:
            server.close()
            await stranger.link.cut()
        with pytest.raises((KvTransferFailed, asyncio.CancelledError)):
            await pull
        assert not cache.pages.any()
        await world.check_nothing_leaked()
        assert puller.links() == ()


@pytest.mark.parametrize(
    "part",
    [
        replace(PART, end=3, num_bytes=3 * LAYOUT.page_bytes),
        replace(PART, start=1, end=1, num_bytes=0),
        replace(PART, start=2, end=1, num_bytes=0),
        replace(PART, first_layer=1, end_layer=2),
        replace(PART, first_layer=0, end_layer=0, num_bytes=0),
        replace(PART, num_bytes=2 * LAYOUT.page_bytes + 1),
        replace(PART, num_bytes=1),
        replace(PART, format=WireFormat.INT8),
    ],
    ids=repr,
)
async def test_a_part_that_was_not_asked_for_ends_the_connection(part):
    async with a_puller() as (stranger, _):
        stranger.say(part)
        await stranger.is_hung_up_on()


async def test_a_page_announced_twice_ends_the_connection():
    async with a_puller() as (stranger, _):
        stranger.say(replace(PART, end=1, num_bytes=LAYOUT.page_bytes), replace(PART, index=1))
        await stranger.is_hung_up_on()


async def test_a_part_larger_than_our_arena_takes_ends_the_connection():
    async with a_puller(pages_per_part=1) as (stranger, _):
        stranger.say(PART)
        await stranger.is_hung_up_on()


async def test_pages_released_before_we_have_them_end_the_connection():
    async with a_puller() as (stranger, _):
        stranger.say(Released(1))
        await stranger.is_hung_up_on()


async def test_what_is_said_of_a_pull_that_nobody_waits_for_is_passed_over():
    async with a_puller() as (stranger, _):
        stranger.say(Released(7), Refused(7, Refusal.EXPIRED), replace(PART, pull=7), PART)
        assert isinstance(await stranger.hear(), Ready)


async def test_a_source_that_announces_and_never_sends_is_cut_off(monkeypatch):
    monkeypatch.setattr(link_meter, "STALL_S", 0.1)
    async with a_puller() as (stranger, pull):
        stranger.say(PART)
        assert isinstance(await stranger.hear(), Ready)
        with pytest.raises(KvTransferFailed, match="no progress"):
            await pull
        await stranger.is_hung_up_on()


async def test_a_cancelled_pull_gives_up_and_waits_no_longer_than_a_peer_may_take():
    async with a_puller() as (stranger, pull):
        stranger.say(PART)
        assert isinstance(await stranger.hear(), Ready)
        pull.cancel()
        assert await stranger.hear() == GiveUp(1)
        async with asyncio.timeout(2 * PEER_TIMEOUT_S):
            await stranger.is_hung_up_on()
        with pytest.raises(asyncio.CancelledError):
            await pull
