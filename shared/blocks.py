"""Token ids as int32 and the hash chain over blocks of them. Torch-free: ingest, policy and kv need it."""

from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, NewType

PAGE_TOKENS = 64
"""Tokens of one KV page and of one hashed block."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes naming a block of tokens *and everything before it*, for one tenant salt and model. Workers announce it."""

NAME_BYTES = 16

BlockKey = NewType("BlockKey", BlockHash)
"""32 bytes, which name a block inside an engine: its BlockHash, and behind that as many that nobody can tell from block
hashes. Only who knows the salt and every token up to the block's last can make it, so whoever has it may have the
block's KV. Never announced, sent or logged."""

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


def root_hash(model_fingerprint: str, tenant_salt: str) -> BlockKey:
    """Parent of every first block: prompts of other models or salts never share a block."""
    return BlockKey(BlockHash(sha256(f"{model_fingerprint}\0{tenant_salt}".encode()).digest()))


def extend_chain(parent: BlockKey, block: TokenIds) -> BlockKey:
    """Key of one full block of PAGE_TOKENS ids that follows `parent`."""
    return BlockKey(BlockHash(sha256(parent + block.tobytes()).digest()))


def name_of(key: BlockHash) -> BlockHash:
    """What a block is announced as; a name is its own."""
    return BlockHash(key[:NAME_BYTES])


def hash_chain(root: BlockKey, ids: TokenIds) -> list[BlockHash]:
    """Names of the full blocks of `ids`, first block first; a partial last block has none."""
    return [name_of(key) for key in key_chain(root, ids)]


def key_chain(root: BlockKey, ids: TokenIds) -> list[BlockKey]:
    """Keys of the full blocks of `ids`, first block first."""
    chain: list[BlockKey] = []
    parent = root
    for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        parent = extend_chain(parent, ids[start : start + PAGE_TOKENS])
        chain.append(parent)
    return chain


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)
