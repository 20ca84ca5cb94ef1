"""What a worker reads from its slot's partitions: `prefill[slot]` and `decode[slot]`.

Every message names the incarnation it is meant for; a worker ignores those for another.
"""

from dataclasses import dataclass, field

from shared.request import (
    ChoiceIndex,
    Count,
    Epoch,
    Incarnation,
    PlacementId,
    RequestId,
    SamplingParams,
    StopString,
    TokenId,
    UnixSeconds,
    WorkerRef,
)
from shared.wire.codec import Decoder, WireBytes, WireIds
from shared.wire.wire_format import WireFormat


@dataclass(frozen=True, slots=True)
class Assignment:
    """What both workers of a placement must know of the choice they run.

    Attributes:
        deadline_s: unix seconds after which nobody wants the answer.
        stop_strings: the worker ends the choice where its text holds one of these.
        cache_salt: pages are shared only among requests of one salt.
        max_wire_loss: the most lossy form in which the operator lets its KV travel.
    """

    request_id: RequestId
    choice: ChoiceIndex
    epoch: Epoch
    placement: PlacementId
    prompt_len: Count
    sampling: SamplingParams
    deadline_s: UnixSeconds
    stop_strings: tuple[StopString, ...] = ()
    cache_salt: str = ""
    max_wire_loss: WireFormat = WireFormat.NATIVE


@dataclass(frozen=True, slots=True)
class FetchTicket:
    """Get those of the first `num_pages` pages of the ids that are lacking from `source`, which is said to have them.

    A hint: what the source does not send is computed. It is no right either: who fetches shows that it knows the ids.

    Attributes:
        address: the source's listener, "host:port".
    """

    source: WorkerRef
    address: str
    num_pages: Count


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Compute KV of `ids` and the token behind them, then hand both to `decode`.

    Attributes:
        ids: prompt and accepted tokens.
        target: the prefill worker this is for.
        decode: the decode worker that goes on.
        fetch: what to get rather than compute.
    """

    assignment: Assignment
    ids: WireIds
    target: WorkerRef
    decode: WorkerRef
    fetch: FetchTicket | None = None


@dataclass(frozen=True, slots=True)
class KvTicket:
    """The right to pull the KV of one placement, once.

    Attributes:
        address: the source's listener, "host:port".
        secret: proves that the puller was given this ticket; never logged.
        num_tokens: KV of positions [0, num_tokens) is on offer.
        layout_fingerprint: of the pages on offer.
        max_loss: the most lossy form in which the pages may travel.
    """

    key: str
    address: str
    source: Incarnation
    secret: WireBytes = field(repr=False)
    num_tokens: Count
    layout_fingerprint: str
    max_loss: WireFormat = WireFormat.NATIVE


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Pull the KV of `ids`, which prefill is computing, and wait for the token behind them: it comes as `FirstToken`.

    Attributes:
        ids: prompt and accepted tokens, as in `PrefillWork`.
        target: the decode worker this is for.
    """

    assignment: Assignment
    ids: WireIds
    target: WorkerRef
    ticket: KvTicket


@dataclass(frozen=True, slots=True)
class LocalWork:
    """Compute KV of `ids` on the decode worker itself and go on behind them: no other worker has a part in it.

    Attributes:
        ids: prompt and accepted tokens.
        target: the decode worker this is for.
        fetch: what to get rather than compute.
    """

    assignment: Assignment
    ids: WireIds
    target: WorkerRef
    fetch: FetchTicket | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token behind the ids of a `DecodeWork` stands in the log: go on behind it.

    Attributes:
        target: the decode worker this is for.
    """

    placement: PlacementId
    target: WorkerRef
    token_id: TokenId


@dataclass(frozen=True, slots=True)
class Stop:
    """Nobody wants this placement any more: forget it and free what it has."""

    placement: PlacementId
    target: WorkerRef


ToPrefill = PrefillWork | Stop
ToDecode = DecodeWork | LocalWork | FirstToken | Stop

TO_PREFILL_DECODER: Decoder[ToPrefill] = Decoder(PrefillWork, Stop)
TO_DECODE_DECODER: Decoder[ToDecode] = Decoder(DecodeWork, LocalWork, FirstToken, Stop)
