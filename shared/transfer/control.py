"""Control messages between two workers, and their frames on a stream: 4 bytes of length, then JSON.

`shared.transfer.ucx` draws who sends which when.
"""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared.request import Incarnation
from shared.transfer.host_facts import HostFacts
from shared.transfer.port import Refusal
from shared.wire.codec import Decoder, UndecodableMessage, WireBytes, WireIds, encode
from shared.wire.wire_format import WireFormat

PROTOCOL_VERSION = 4
"""1: pages as the layout has them, asked for message by message. 2: parts in several formats, announced by the source
as they are computed; self-test. 3: a ticket is proven, not shown. 4: fetches."""

MAX_CONTROL_BYTES = 2**20
"""Longest control message, and the most that may wait for a peer that does not read."""

Number = Annotated[int, Field(ge=0, lt=2**63)]


class ProtocolViolation(UndecodableMessage):
    """A control message that has no place here."""


class OversizedMessage(UndecodableMessage):
    """A control message over the limit."""


@dataclass(frozen=True, slots=True)
class Knock:
    """First message of a puller.

    Attributes:
        source: whom it comes to. A worker tells nothing to who does not know its incarnation, and opens nothing for it:
            workers know each other's from the store and from tickets.
    """

    source: Incarnation


@dataclass(frozen=True, slots=True)
class Hello:
    """Who one end is: the source's first message, the puller's second.

    Attributes:
        layout_fingerprint: of its pages.
        max_part_bytes: the largest part that it sends or receives; the smaller of the two holds.
        ucx_address: its UCX worker address.
        challenge: the source's, new on each connection: proofs answer it. Nobody challenges the source.
    """

    protocol: int
    layout_fingerprint: str
    incarnation: Incarnation
    max_part_bytes: Number
    ucx_address: WireBytes
    host: HostFacts
    challenge: WireBytes = b""


@dataclass(frozen=True, slots=True)
class Pull:
    """May I have these pages of your offer?

    Attributes:
        pull: the puller's number for this pull, higher than all before on the connection.
        proof: that the puller has the ticket; see `Claim`.
        want: indexes of pages in the offer; parts are of this list.
    """

    pull: Number
    key: str
    proof: WireBytes
    want: WireIds


@dataclass(frozen=True, slots=True)
class Fetch:
    """May I have what you have of these blocks, from the first one on?

    Attributes:
        pull: a number as that of a pull; what follows is a pull of the pages that are found.
        names: of the blocks, one behind the other.
        proofs: that the puller knows what is in them, one each; see `BlocksClaim`.
    """

    pull: Number
    names: WireBytes
    proofs: WireBytes


@dataclass(frozen=True, slots=True)
class Found:
    """I have the first `num_pages` of the blocks, and send them; none: that is all."""

    pull: Number
    num_pages: Number


@dataclass(frozen=True, slots=True)
class Part:
    """A part is being packed and will be sent when you are ready: layers [first_layer, end_layer) of the pages that
    entries [start, end) of `want` name.

    Attributes:
        index: the parts of a pull are counted from 0.
    """

    pull: Number
    index: Number
    start: Number
    end: Number
    first_layer: Number
    end_layer: Number
    format: WireFormat
    num_bytes: Number


@dataclass(frozen=True, slots=True)
class Refused:
    """No. After a part: no longer."""

    pull: Number
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Ready:
    """I am receiving part `index` of the pull, or probe `pull`, under UCX tag `tag`."""

    pull: Number
    index: Number
    tag: Annotated[int, Field(ge=1, lt=2**64)]


@dataclass(frozen=True, slots=True)
class Confirm:
    """All has arrived: the pages may go."""

    pull: Number


@dataclass(frozen=True, slots=True)
class Released:
    """The pages were held until your confirmation: what you got is good."""

    pull: Number


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The puller no longer wants the pages."""

    pull: Number


@dataclass(frozen=True, slots=True)
class Probe:
    """May I have that many bytes, to see how long they take? Answered by a `Part` of no pages.

    Attributes:
        pull: a number as that of a pull.
    """

    pull: Number
    num_bytes: Annotated[int, Field(ge=1, lt=2**63)]


@dataclass(frozen=True, slots=True)
class Speed:
    """What the puller measured."""

    bytes_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]


ToSource = Knock | Hello | Pull | Fetch | Ready | Confirm | GiveUp | Probe | Speed
ToPuller = Hello | Found | Part | Refused | Released
ControlMessage = ToSource | ToPuller

TO_SOURCE_DECODER: Decoder[ToSource] = Decoder(Knock, Hello, Pull, Fetch, Ready, Confirm, GiveUp, Probe, Speed)
TO_PULLER_DECODER: Decoder[ToPuller] = Decoder(Hello, Found, Part, Refused, Released)

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
        OversizedMessage: the length is over MAX_CONTROL_BYTES.
    """
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    if length > MAX_CONTROL_BYTES:
        raise OversizedMessage(f"a control message of {length} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return await reader.readexactly(length)
