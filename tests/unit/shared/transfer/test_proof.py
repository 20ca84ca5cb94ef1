import hmac
from dataclasses import replace

import pytest

from shared.blocks import BlockHash, BlockKey, key_chain, name_of, root_hash, token_ids
from shared.transfer.proof import PROOF_BYTES, BlocksClaim, Claim, names_of

CLAIM = Claim(b"c" * 16, "puller", b"address", "key", (0, 3))
SECRET = bytes(range(16))


def test_a_proof_proves_its_claim():
    assert CLAIM.is_proven(CLAIM.proof(SECRET), SECRET)


@pytest.mark.parametrize(
    "other",
    [
        {"challenge": b"d" * 16},
        {"puller": "other"},
        {"ucx_address": b"elsewhere"},
        {"key": "other"},
        {"want": (0,)},
        {"puller": "pullera", "ucx_address": b"ddress"},  # the same bytes, cut elsewhere
    ],
)
def test_it_proves_no_other(other):
    assert not replace(CLAIM, **other).is_proven(CLAIM.proof(SECRET), SECRET)


@pytest.mark.parametrize("proof", [b"", bytes(32), CLAIM.proof(b"another secret!!"), CLAIM.proof(SECRET)[:-1]])
def test_who_has_no_secret_proves_nothing(proof):
    assert not CLAIM.is_proven(proof, SECRET)


KEYS = key_chain(root_hash("model", "salt"), token_ids(range(192)))
BLOCKS = BlocksClaim(b"c" * 16, "puller", b"address", tuple(map(name_of, KEYS)))


def test_who_knows_the_prompt_proves_its_blocks_and_any_first_ones_of_them():
    proofs = BLOCKS.proofs(KEYS)
    assert len(proofs) == 3 * PROOF_BYTES
    for num_there in range(4):
        assert BLOCKS.are_proven(proofs, KEYS[:num_there])


@pytest.mark.parametrize(
    "other",
    [
        {"challenge": b"d" * 16},
        {"puller": "other"},
        {"ucx_address": b"elsewhere"},
        {"names": BLOCKS.names[:2]},
        {"puller": "pullera", "ucx_address": b"ddress"},
    ],
)
def test_the_proofs_of_blocks_are_for_one_claim(other):
    assert not replace(BLOCKS, **other).are_proven(BLOCKS.proofs(KEYS), KEYS[:1])


@pytest.mark.parametrize("change", ["last", "first", "short", "none", "swapped"])
def test_each_block_must_be_proven(change):
    proofs = BLOCKS.proofs(KEYS)
    first, rest, last = proofs[:PROOF_BYTES], proofs[PROOF_BYTES:], proofs[-PROOF_BYTES:]
    wrong = {
        "last": proofs[:-PROOF_BYTES] + bytes(PROOF_BYTES),
        "first": bytes(PROOF_BYTES) + rest,
        "short": proofs[:-1],
        "none": b"",
        "swapped": last + proofs[PROOF_BYTES:-PROOF_BYTES] + first,
    }
    assert not BLOCKS.are_proven(wrong[change], KEYS)


def test_what_a_long_prompt_s_proofs_take_grows_with_its_blocks(monkeypatch):
    """The event loop makes them."""
    read, digest = [], hmac.digest

    def noted(key, message, name):
        read.append(len(message))
        return digest(key, message, name)

    monkeypatch.setattr(hmac, "digest", noted)
    for num_blocks in (10, 1000):
        keys = [BlockKey(BlockHash(number.to_bytes(32, "big"))) for number in range(num_blocks)]
        replace(BLOCKS, names=tuple(map(name_of, keys))).proofs(keys)
        assert sum(read) == 32 * num_blocks
        read.clear()


def test_names_that_are_cut_short_name_nothing():
    joined = b"".join(BLOCKS.names)
    assert names_of(joined) == BLOCKS.names
    assert names_of(joined[:-1])[:2] == BLOCKS.names[:2]
    assert names_of(joined[:-1])[2] not in BLOCKS.names
