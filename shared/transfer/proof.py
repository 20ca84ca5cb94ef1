"""How a puller shows that it has a ticket without sending the ticket's secret, which whoever listens could use."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from shared.blocks import token_ids
from shared.request import Incarnation

CHALLENGE_BYTES = 16

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
        told = b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts)
        return hmac.digest(secret, told, "sha256")

    def is_proven(self, proof: bytes, secret: bytes) -> bool:
        """Takes as long for a near miss as for any other."""
        return hmac.compare_digest(proof, self.proof(secret))
