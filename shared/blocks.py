"""Token ids as int32 and the hash chain over blocks of them. Torch-free: ingest, policy and kv need it."""

from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, NewType

PAGE_TOKENS = 64
"""Tokens of one KV page and of one hashed block."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes naming a block of tokens *and everything before it*, for one tenant salt and model."""

# array is generic for the type checker only before Python 3.12.
if TYPE_CHECKING:
    TokenIds = array[int]
else:
    TokenIds = array
"""Token ids, 4 bytes each (typecode "i")."""


def token_ids(ids: Iterable[int]) -> TokenIds:
    """`ids` as int32. Raises OverflowError for an id that does not fit."""
    return array("i", ids)


def token_ids_to_text(ids: TokenIds) -> str:
    """Base64 of the ids as little-endian int32, for JSON."""
    return b64encode(ids.tobytes()).decode("ascii")


def token_ids_from_text(text: str) -> TokenIds:
    """Inverse of `token_ids_to_text`. Raises ValueError for text that is no base64 of whole int32s."""
    ids = array("i")
    ids.frombytes(b64decode(text, validate=True))
    return ids


def root_hash(model_fingerprint: str, tenant_salt: str) -> BlockHash:
    """Parent of every first block: prompts of other models or salts never share a hash."""
    return BlockHash(sha256(f"{model_fingerprint}\0{tenant_salt}".encode()).digest()[:16])


def extend_chain(parent: BlockHash, block: TokenIds) -> BlockHash:
    """Hash of one full block of PAGE_TOKENS ids that follows `parent`."""
    return BlockHash(sha256(parent + block.tobytes()).digest()[:16])


def hash_chain(root: BlockHash, ids: TokenIds) -> list[BlockHash]:
    """Hashes of the full blocks of `ids`, first block first; a partial last block has none."""
    chain: list[BlockHash] = []
    parent = root
    for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        parent = extend_chain(parent, ids[start : start + PAGE_TOKENS])
        chain.append(parent)
    return chain


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)
