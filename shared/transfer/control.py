"""Control messages between two workers, and their frames on a stream: 4 bytes of length, then JSON.

`shared.transfer.ucx` draws who sends which when.
"""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared.request import Incarnation
from shared.transfer.port import Refusal
from shared.wire.codec import Decoder, UndecodableMessage, WireBytes, encode

PROTOCOL_VERSION = 1
"""1: pages as the layout has them, staged at both ends, messages asked for one by one."""

MAX_CONTROL_BYTES = 2**20
"""Longest control message, and the most that may wait for a peer that does not read."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each end.

    Attributes:
        layout_fingerprint: of its pages.
        message_bytes: its staging buffer; the smaller of the two bounds every message.
        ucx_address: its UCX worker address.
    """

    protocol: int
    layout_fingerprint: str
    incarnation: Incarnation
    message_bytes: int
    ucx_address: WireBytes


@dataclass(frozen=True, slots=True)
class Pull:
    """May I have these pages of your offer?

    Attributes:
        pull: the puller's number for this pull, never used again on the connection.
        want: indexes of pages in the offer; the plan's messages cut this list.
    """

    pull: int
    key: str
    secret: WireBytes
    want: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Granted:
    """Yes: ask for the messages."""

    pull: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No. After a grant: no longer."""

    pull: int
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Ready:
    """I am receiving message `index` of the plan under UCX tag `tag`.

    Attributes:
        num_bytes: what the puller expects; a check that both ends have one plan.
    """

    pull: int
    index: int
    tag: Annotated[int, Field(ge=1, lt=2**64)]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Confirm:
    """All has arrived: the pages may go."""

    pull: int


@dataclass(frozen=True, slots=True)
class Released:
    """The pages were held until your confirmation: what you got is good."""

    pull: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The puller no longer wants the pages."""

    pull: int


ToSource = Hello | Pull | Ready | Confirm | GiveUp
ToPuller = Hello | Granted | Refused | Released
ControlMessage = ToSource | ToPuller

TO_SOURCE_DECODER: Decoder[ToSource] = Decoder(Hello, Pull, Ready, Confirm, GiveUp)
TO_PULLER_DECODER: Decoder[ToPuller] = Decoder(Hello, Granted, Refused, Released)

_LENGTH_BYTES = 4


def to_frame(message: ControlMessage) -> bytes:
    """Raises ValueError for a message over MAX_CONTROL_BYTES."""
    body = encode(message)
    if len(body) > MAX_CONTROL_BYTES:
        raise ValueError(f"a control message of {len(body)} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The body of the next frame.

    Raises:
        asyncio.IncompleteReadError: the stream ended.
        UndecodableMessage: the length is over MAX_CONTROL_BYTES.
    """
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    if length > MAX_CONTROL_BYTES:
        raise UndecodableMessage(f"a control message of {length} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return await reader.readexactly(length)
