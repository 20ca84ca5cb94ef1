"""How a puller shows that it has a ticket, or knows a prompt, without sending what whoever listens could use."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from shared.blocks import NAME_BYTES, BlockHash, BlockKey, token_ids
from shared.request import Incarnation

CHALLENGE_BYTES = 16

PROOF_BYTES = 16
"""Of the proof of one block."""

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Claim:
    """What a pull asks for, and where. A proof is good for one claim: on another connection, for other pages, for
    another puller or to another address it is worth nothing.

    Attributes:
        challenge: drawn by the source for this connection.
        puller: who it says that it is.
        ucx_address: where the pages go.
        want: indexes of pages in the offer.
    """

    challenge: bytes
    puller: Incarnation
    ucx_address: bytes
    key: str
    want: Sequence[int]

    def proof(self, secret: bytes) -> bytes:
        """HMAC-SHA256 of the claim under the ticket's secret."""
        parts = (
            self.challenge,
            self.puller.encode(),
            self.ucx_address,
            self.key.encode(),
            token_ids(self.want).tobytes(),
        )
        return hmac.digest(secret, _told(parts), "sha256")

    def is_proven(self, proof: bytes, secret: bytes) -> bool:
        """Takes as long for a near miss as for any other."""
        return hmac.compare_digest(proof, self.proof(secret))


@dataclass(frozen=True, slots=True)
class BlocksClaim:
    """What a fetch asks for, and where; as with a `Claim`, its proofs are worth nothing for any other.

    Each block is proven by its key, which only who knows the tenant's salt and every token up to the block's end can
    make. So a peer that may have a block's KV learns nothing from it that it did not know; the names, which stand in
    Redis for whoever reads there, prove nothing.

    Attributes:
        names: of the blocks.
    """

    challenge: bytes
    puller: Incarnation
    ucx_address: bytes
    names: Sequence[BlockHash]

    def proofs(self, keys: Sequence[BlockKey]) -> bytes:
        """Of the blocks with these keys, which the first of the names are of: `PROOF_BYTES` each, of the HMAC under the
        block's key of the claim's digest (a long prompt has thousands of blocks, and the claim names them all)."""
        parts = (b"blocks", self.challenge, self.puller.encode(), self.ucx_address, b"".join(self.names))
        digest = sha256(_told(parts)).digest()
        return b"".join(hmac.digest(key, digest, "sha256")[:PROOF_BYTES] for key in keys)

    def are_proven(self, proofs: bytes, keys: Sequence[BlockKey]) -> bool:
        """Whether the first of the blocks, which have these keys, are all proven."""
        return hmac.compare_digest(proofs[: len(keys) * PROOF_BYTES], self.proofs(keys))


def names_of(joined: bytes) -> tuple[BlockHash, ...]:
    """Names that lie one behind the other; what is left over counts as one, which no block has."""
    return tuple(BlockHash(joined[start : start + NAME_BYTES]) for start in range(0, len(joined), NAME_BYTES))


def _told(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts)
