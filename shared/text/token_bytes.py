"""The bytes that each token stands for, read off a tokenizer's decoder.

All supported decoders work token by token, so text is nothing but the concatenated bytes of its tokens, and
streaming it is nothing but incremental UTF-8.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer

from shared.errors import UnsupportedCheckpoint

_FIELD = "tokenizer.json: decoder"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], str | bytes]


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes of every token.

    Attributes:
        raw: by token id; special tokens stand for their own name.
        special: ids of special tokens, which are no part of any text.
        leading_spaces: spaces that the encoder puts before a whole text and the decoder takes away again.
    """

    raw: tuple[bytes, ...]
    special: frozenset[int]
    leading_spaces: int


def read_token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Raises UnsupportedCheckpoint for a decoder that is not made of steps on single tokens."""
    decoder = cast("dict[str, Any] | None", json.loads(tokenizer.to_str())["decoder"])
    if decoder is None:
        raise UnsupportedCheckpoint(_FIELD, "none given")
    steps, leading_spaces = _read_steps(decoder)
    added = tokenizer.get_added_tokens_decoder()
    special = frozenset(i for i, token in added.items() if token.special)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    raw = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        raw[token_id] = token.encode() if token_id in special else _bytes_of(token, steps)
    return TokenBytes(tuple(raw), special, leading_spaces)


def _bytes_of(token: str, steps: list[Step]) -> bytes:
    value: str | bytes = token
    for step in steps:
        if isinstance(value, bytes):
            return value
        value = step(value)
    return value if isinstance(value, bytes) else value.encode()


def _read_steps(decoder: dict[str, Any]) -> tuple[list[Step], int]:
    """The decoder as steps on one token, and the number of spaces stripped off the start of a whole text."""
    parts: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[Step] = []
    leading_spaces = 0
    fused = False
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level())
            case {"type": "ByteFallback"}:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                steps.append(_replace(old, new))
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                steps.append(_replace(old, " "))
                leading_spaces = 0 if scheme == "never" else 1
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if fused:
                leading_spaces = start
            case _:
                raise UnsupportedCheckpoint(_FIELD, f"step {part['type']} does not work on single tokens")
    return steps, leading_spaces


def _replace(old: str, new: str) -> Step:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return token if match is None else bytes([int(match[1], 16)])


def _byte_level() -> Step:
    """GPT-2's alphabet: visible latin characters stand for their own byte, the next free ones for the other bytes."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

    def step(token: str) -> str | bytes:
        if all(char in byte_of for char in token):
            return bytes(byte_of[char] for char in token)
        return token

    return step
