from dataclasses import replace

import pytest

from shared.transfer.proof import Claim

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
