"""What nobody may have, over real UCX: refused, the puller told why, and counted in the metric that workers show."""

import asyncio
import struct
from base64 import b64encode
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from services.decode.role import DecodeRole
from shared.blocks import token_ids
from shared.engine.fake import fake_engine
from shared.errors import KvTransferFailed, LayoutMismatch
from shared.observe.metrics import LocalPrefill
from shared.request import Incarnation, PlacementId, RequestId
from shared.transfer.control import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    TO_PULLER_DECODER,
    Hello,
    Knock,
    Probe,
    Pull,
    read_frame,
    to_frame,
)
from shared.transfer.host_facts import HostFacts
from shared.transfer.link import Link
from shared.transfer.port import Outcome, Refusal
from shared.transfer.proof import Claim
from shared.wire.to_worker import Assignment, DecodeWork, FirstToken
from shared.worker.link_metrics import LinkMetrics
from tests.contract.transfer_pair import TIMEOUT_S, a_pair
from tests.contract.transfer_worlds import SECRET, UcxWorld, a_cache, a_layout
from tests.engine_driver import greedy
from tests.unit.services.worker_context import DECODE, InlineEngine, a_context, until


def counted(source):
    """What the metric of this source says, without those that are 0."""
    registry = CollectorRegistry()
    registry.register(LinkMetrics(tuple, lambda: 0, lambda: source.refusals))
    samples = {reason: registry.get_sample_value("baton_kv_refusals_total", {"reason": reason}) for reason in REASONS}
    return {reason: count for reason, count in samples.items() if count}


REASONS = [refusal.name.lower() for refusal in Refusal]


@asynccontextmanager
async def refused_once(reason):
    """A pair that refuses for this reason inside, and after it hands over as ever; nobody's pages have changed."""
    async with a_pair(UcxWorld()) as pair:
        yield pair
        async with asyncio.timeout(TIMEOUT_S):
            while not counted(pair.source):
                await asyncio.sleep(0.001)
        assert counted(pair.source) == {reason: 1}
        pair.check_arrived((), (), ())
        await pair.pull(pair.offer("next"))
        pair.check_arrived((3,), (0,), (0,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": bytes(16)}, "wrong_secret"),
        ({"secret": SECRET[:-1]}, "wrong_secret"),
        ({"secret": b""}, "wrong_secret"),
        ({"key": "another"}, "unknown_key"),
    ],
)
async def test_a_wrong_ticket(change, reason):
    async with refused_once(reason) as pair:
        ticket = pair.offer()
        with pytest.raises(KvTransferFailed, match=Refusal[reason.upper()].value):
            await pair.pull(replace(ticket, **change))
        assert pair.ends.outcomes == {}
        pair.source.withdraw("k")


async def test_the_ticket_of_somebody_else():
    async with refused_once("wrong_puller") as pair:
        with pytest.raises(KvTransferFailed, match="another worker"):
            await pair.pull(pair.offer(puller="somebody-else"))
        assert pair.ends.outcomes == {}
        pair.source.withdraw("k")


async def test_a_ticket_shown_again():
    async with refused_once("already_pulled") as pair:
        ticket = pair.offer()
        await pair.pull(ticket, (), ())
        assert await pair.ends.wait("k") is Outcome.PULLED
        with pytest.raises(KvTransferFailed, match="pulled before"):
            await pair.pull(ticket)


async def test_a_ticket_shown_twice_at_once():
    async with a_pair(UcxWorld()) as pair:
        ticket = pair.offer()
        results = await asyncio.gather(*(pair.pull(ticket) for _ in range(5)), return_exceptions=True)
        assert sum(not isinstance(result, KvTransferFailed) for result in results) == 1
        assert counted(pair.source) == {"already_pulled": 4}


async def test_an_expired_ticket():
    async with refused_once("expired") as pair:
        ticket = pair.offer(hold_s=0.02)
        assert await pair.ends.wait("k") is Outcome.EXPIRED
        with pytest.raises(KvTransferFailed, match="expired"):
            await pair.pull(ticket)


async def test_a_ticket_that_was_taken_back():
    async with refused_once("withdrawn") as pair:
        ticket = pair.offer()
        pair.source.withdraw("k")
        with pytest.raises(KvTransferFailed, match="withdrawn"):
            await pair.pull(ticket)


async def test_a_ticket_for_other_pages_goes_nowhere():
    """Its fingerprint is not the puller's: the source is not asked."""
    async with a_pair(UcxWorld()) as pair:
        ticket = pair.offer()
        with pytest.raises(LayoutMismatch):
            await pair.pull(replace(ticket, layout_fingerprint="another"))
        assert pair.puller.links() == ()
        await pair.pull(ticket)
        assert counted(pair.source) == {}


async def test_a_puller_with_other_pages():
    """Its ticket is forged to its own fingerprint."""
    async with refused_once("wrong_layout") as pair:
        other = a_cache(layout=a_layout("another model"))
        ticket = pair.offer()
        forged = replace(ticket, layout_fingerprint=other.layout.fingerprint)
        async with pair.world.transfer(other, "other") as stranger:
            with pytest.raises(LayoutMismatch):
                await stranger.pull(forged, want=(0,), into=(0,), timeout_s=TIMEOUT_S)
        assert not other.pages.any()
        pair.source.withdraw("k")


async def test_pages_that_are_not_on_offer():
    async with refused_once("wrong_pages") as pair:
        ticket = pair.offer(pages=(1, 2))
        with pytest.raises(KvTransferFailed, match="outside the offer"):
            await pair.pull(replace(ticket, num_tokens=20 * 64), (0, 2), (0, 1))
        pair.source.withdraw("k")


async def test_a_ticket_for_other_ids_than_it_came_with_costs_decode_a_prefill_and_no_more():
    async with a_pair(UcxWorld()) as pair:
        engine = fake_engine()
        async with a_context(InlineEngine(engine), me=DECODE, transfer=pair.puller) as context:
            role = DecodeRole(context, pull_timeout_s=TIMEOUT_S)
            ids, placement = token_ids(range(3, 203)), PlacementId("k")
            ticket = replace(pair.offer(), num_tokens=65)
            assignment = Assignment(RequestId("r"), 0, 1, placement, len(ids), greedy(5), deadline_s=1e12)
            role.take(DecodeWork(assignment, ids, DECODE, ticket))
            role.take(FirstToken(placement, DECODE, token_id=7))
            await until(engine.has_work)
            assert engine.stats().num_importing == 0
            assert context.metrics.local_prefills.labels("m", LocalPrefill.PULL_FAILED)._value.get() == 1
        pair.source.withdraw("k")


async def say(source, *messages):
    """What a stranger with the right layout sends, each message a frame, or a function that makes one of the source's
    challenge; returns when the source has hung up."""
    hello = Hello(
        protocol=PROTOCOL_VERSION,
        layout_fingerprint=a_layout().fingerprint,
        incarnation=Incarnation("stranger"),
        max_part_bytes=2**30,
        ucx_address=b"not an address",
        host=HostFacts("boot", "host", "pid", "ipc", "net", "cpu"),
    )
    host, _, port = source.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with suppress(OSError):
            writer.write(to_frame(Knock(Incarnation("source"))) + to_frame(hello))
            challenge = TO_PULLER_DECODER.decode(await read_frame(reader)).challenge
            writer.write(b"".join(message(challenge) if callable(message) else message for message in messages))
            async with asyncio.timeout(TIMEOUT_S):
                while await reader.read(2**16):
                    pass
    finally:
        writer.transport.abort()


A_PULL = Pull(1, "k", bytes(32), token_ids((0,)))


def proven(pull, *, secret=SECRET, **changes):
    """Frame of a pull by who has the ticket; of one who proves another claim than it makes, with `changes`."""

    def frame(challenge):
        claim = Claim(challenge, Incarnation("stranger"), b"not an address", pull.key, pull.want)
        return to_frame(replace(pull, proof=replace(claim, **changes).proof(secret)))

    return frame


OVERSIZED = {
    "a message over the limit": (struct.pack("!I", MAX_CONTROL_BYTES + 1), "oversized"),
    "a message of 4 GiB": (b"\xff" * 4, "oversized"),
    "more of the arena than there is": (to_frame(Probe(1, 2**50)), "protocol"),
    "no message": (struct.pack("!I", 5) + b"what?", "protocol"),
    "a number used before": (to_frame(replace(A_PULL, key="no such")) * 2, "protocol"),
}


@pytest.mark.parametrize("name", OVERSIZED)
async def test_an_oversized_request(name):
    async with a_pair(UcxWorld()) as pair:
        ticket = pair.offer()
        request, reason = OVERSIZED[name]
        await say(pair.source, request)
        assert counted(pair.source)[reason] == 1
        assert pair.ends.outcomes == {}
        await pair.pull(ticket)
        pair.check_arrived((3,), (0,), (0,))


async def test_as_many_pages_as_a_message_holds():
    """Wanted pages that fit the message and not the offer are refused as such, before anything is read or lent."""
    async with a_pair(UcxWorld()) as pair:
        ticket = pair.offer(puller="stranger")
        many = proven(replace(A_PULL, want=token_ids(range(190_000))))
        assert len(many(b"")) > MAX_CONTROL_BYTES * 0.9
        twice = proven(replace(A_PULL, pull=2, want=token_ids([0] * 100_000)))
        beyond = struct.pack("!I", MAX_CONTROL_BYTES + 1)
        await say(pair.source, many, twice, beyond)
        assert counted(pair.source) == {"wrong_pages": 2, "oversized": 1}
        assert pair.ends.outcomes == {}
        pair.source.withdraw(ticket.key)


GARBAGE = struct.pack("!I", 5) + b"what?"
"""Ends the talk."""


@pytest.mark.parametrize(
    "overheard",
    [
        {"challenge": bytes(16)},  # what was said on another connection
        {"puller": "source"},
        {"ucx_address": b"the puller's own"},
        {"key": "j"},
        {"want": (1,)},
        {"secret": bytes(16)},
    ],
    ids=str,
)
async def test_a_proof_that_was_overheard_is_worth_nothing(overheard):
    """It proves another claim than the one that comes with it."""
    async with a_pair(UcxWorld()) as pair:
        pair.offer(puller="stranger")
        await say(pair.source, proven(A_PULL, **overheard), GARBAGE)
        assert counted(pair.source) == {"wrong_secret": 1, "protocol": 1}
        assert pair.ends.outcomes == {}
        pair.source.withdraw("k")


async def test_the_secret_of_a_ticket_never_crosses_the_wire(monkeypatch):
    sent = []
    post = Link.post
    monkeypatch.setattr(Link, "post", lambda link, message: (sent.append(to_frame(message)), post(link, message))[1])
    async with a_pair(UcxWorld()) as pair:
        await pair.pull(pair.offer())
    assert any(b'"pull"' in frame for frame in sent)
    for form in (SECRET, b64encode(SECRET), SECRET.hex().encode()):
        assert form not in b"".join(sent)
