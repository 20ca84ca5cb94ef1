"""Who asks a worker for pages that nobody offered him: only who knows the prompt gets them."""

import asyncio
from base64 import b64encode
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from shared.blocks import BlockHash, BlockKey, extend_chain, name_of, token_ids
from shared.errors import KvTransferFailed
from shared.request import Incarnation
from shared.transfer.control import (
    PROTOCOL_VERSION,
    TO_PULLER_DECODER,
    Fetch,
    Found,
    Hello,
    Knock,
    Pull,
    Refused,
    to_frame,
)
from shared.transfer.link import Link
from shared.transfer.port import Refusal
from shared.transfer.proof import BlocksClaim, Claim
from tests.contract.transfer_lender import Shelf, some_keys
from tests.contract.transfer_worlds import UcxWorld, a_cache

KEYS = some_keys(3)
NAMES = tuple(map(name_of, KEYS))
"""What stands in Redis."""


@dataclass
class Attacker:
    """Somebody in the workers' network who has read in Redis what stands there: addresses, incarnations and names."""

    world: object
    link: Link
    challenge: bytes

    def claim(self, **changes):
        claim = BlocksClaim(self.challenge, Incarnation("attacker"), self.world._context.address, NAMES)
        return replace(claim, **changes)

    async def ask(self, proofs, number=1):
        self.link.post(Fetch(number, b"".join(NAMES), proofs))
        async with asyncio.timeout(10):
            return TO_PULLER_DECODER.decode(await self.link.read())


@asynccontextmanager
async def an_attack():
    world, cache, shelf = UcxWorld(), a_cache(seed=1), Shelf(dict(zip(KEYS, range(3), strict=True)))
    async with world, world.transfer(cache, "source") as source:
        source.lend_from(shelf)
        yield world, source, shelf
        await shelf.all_given_back()
        assert source.num_offers == 0


@asynccontextmanager
async def an_attacker(world, source):
    host, port = source.address.split(":")
    link = Link(*await asyncio.open_connection(host, int(port)), asyncio.get_running_loop().time, None)
    link.post(Knock(Incarnation("source")))
    link.post(
        Hello(
            PROTOCOL_VERSION,
            a_cache(1).layout.fingerprint,
            Incarnation("attacker"),
            2**30,
            world._context.address,
            world._context.facts(torch.device("cpu")),
        )
    )
    try:
        yield Attacker(world, link, TO_PULLER_DECODER.decode(await link.read()).challenge)
    finally:
        await link.cut()


def made_from_names():
    return [BlockKey(BlockHash(name + bytes(16))) for name in NAMES]


@pytest.mark.parametrize(
    "proofs",
    [
        lambda claim: b"",
        lambda claim: bytes(48),
        lambda claim: b"".join(NAMES),
        lambda claim: claim.proofs(made_from_names()),
        lambda claim: claim.proofs([BlockKey(name) for name in NAMES]),
        lambda claim: claim.proofs(KEYS[:2]),
        lambda claim: claim.proofs(KEYS[:2]) + bytes(16),
        lambda claim: claim.proofs(KEYS)[::-1],
    ],
    ids=["none", "zeros", "the names", "keys of names", "names as keys", "one is lacking", "one is wrong", "reversed"],
)
async def test_who_has_read_the_names_in_redis_gets_no_page(proofs):
    async with an_attack() as (world, source, _), an_attacker(world, source) as attacker:
        assert await attacker.ask(proofs(attacker.claim())) == Refused(1, Refusal.UNPROVEN_BLOCKS)
        assert source.refusals == {Refusal.UNPROVEN_BLOCKS: 1}


@pytest.mark.parametrize(
    "overheard",
    [
        {"challenge": bytes(16)},  # what was said on another connection
        {"puller": Incarnation("a worker")},
        {"ucx_address": b"the worker's own"},
        {"names": NAMES[:2]},
    ],
    ids=str,
)
async def test_a_fetch_that_was_overheard_is_worth_nothing(overheard):
    async with an_attack() as (world, source, _), an_attacker(world, source) as attacker:
        proofs = attacker.claim(**overheard).proofs(KEYS)
        assert await attacker.ask(proofs) == Refused(1, Refusal.UNPROVEN_BLOCKS)


async def test_who_knows_the_prompt_is_told_what_is_there():
    """The attack above fails for want of the keys, not of something else."""
    async with an_attack() as (world, source, shelf), an_attacker(world, source) as attacker:
        assert await attacker.ask(attacker.claim().proofs(KEYS)) == Found(1, 3)
        assert len(shelf.loans) == 1


async def test_a_loan_cannot_be_pulled_by_who_guesses_its_name():
    async with an_attack() as (world, source, _), an_attacker(world, source) as attacker:
        await attacker.ask(attacker.claim().proofs(KEYS))
        async with an_attacker(world, source) as other:
            for number, secret in enumerate((b"", bytes(16), KEYS[0]), start=1):
                claim = Claim(other.challenge, Incarnation("attacker"), world._context.address, "loan 1", (0,))
                other.link.post(Pull(number, "loan 1", claim.proof(secret), token_ids((0,))))
                refused = TO_PULLER_DECODER.decode(await other.link.read())
                assert refused == Refused(number, Refusal.WRONG_SECRET)


async def test_no_key_crosses_the_wire(monkeypatch):
    sent = []
    post = Link.post
    monkeypatch.setattr(Link, "post", lambda link, message: (sent.append(to_frame(message)), post(link, message))[1])
    async with an_attack() as (world, source, _), world.transfer(a_cache(), "puller") as puller:
        fetched = await puller.fetch(source.address, "source", KEYS, (0, 1, 2), timeout_s=10)
        assert fetched.num_pages == 3
        with pytest.raises(KvTransferFailed):
            await puller.fetch(source.address, "source", made_from_names(), (0, 1, 2), timeout_s=10)
    talk = b"".join(sent)
    assert b'"fetch"' in talk
    for key in KEYS:
        secret = key[16:]
        for form in (secret, b64encode(secret), b64encode(key), secret.hex().encode()):
            assert form not in talk


def test_who_knows_the_name_of_a_block_cannot_test_a_guess_of_what_follows():
    """Without the salt: each block's key depends on the whole key before it, of which the name is half."""
    following = token_ids(range(64, 128))
    assert extend_chain(KEYS[0], following) == KEYS[1]
    for parent in (BlockKey(NAMES[0]), made_from_names()[0]):
        assert name_of(extend_chain(parent, following)) != NAMES[1]
