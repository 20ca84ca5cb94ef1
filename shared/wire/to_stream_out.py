"""What stands on `stream-out`: the whole story of each request, in one partition, read by `policy/fold.py` alone."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from shared.request import (
    MAX_CHOICES,
    ChoiceIndex,
    Count,
    Epoch,
    Event,
    FinishReason,
    Incarnation,
    PlacementId,
    RequestId,
    SamplingParams,
    Stamps,
    StopString,
    TokenLogprob,
    UnixSeconds,
    WorkerRef,
)
from shared.wire.codec import Decoder, WireIds
from shared.wire.explanation import Explanation
from shared.wire.to_ingest import LogPosition
from shared.wire.wire_format import WireFormat


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """Why a request failed or was refused, in OpenAI's words."""

    message: str
    type: str
    http_status: Annotated[int, Field(ge=400, le=599)]
    param: str | None = None
    code: str | None = None
    retry_after_s: Annotated[float, Field(ge=0, le=1e6)] | None = None


NOT_ADMITTED = SamplingParams(max_tokens=1)
"""Stands in the view of a request that was refused before its parameters were settled."""


@dataclass(frozen=True, slots=True)
class View:
    """What a reader of the log must know of the request to answer its client.

    Attributes:
        body_hash: of the job's value; another job under the same id with another hash is a conflict.
        chat: answer in the chat shape, else in that of completions.
        num_choices: choices asked for (`n`).
        sampling: of the choice, after admission; tells what of the ids is text and whether logprobs are wanted.
        deadline_s: unix seconds.
        edge: the edge that accepted it for a waiting client; None for jobs that need nobody attached.
        stamps: accepted and admitted.
    """

    tenant: str
    model: str
    body_hash: str
    chat: bool
    num_choices: Annotated[int, Field(ge=1, le=MAX_CHOICES)]
    num_prompt_tokens: Count
    deadline_s: UnixSeconds
    job: LogPosition
    stop_strings: tuple[StopString, ...] = ()
    sampling: SamplingParams = NOT_ADMITTED
    include_usage: bool = False
    edge: Incarnation | None = None
    traceparent: str | None = None
    stamps: Stamps = field(default_factory=dict[Event, float])


@dataclass(frozen=True, slots=True)
class Open:
    """A placement was made: its frames count from here on, if the epoch is current and none is open.

    Attributes:
        view: with epoch 1 only.
        stamps: placed.
        explanation: why these workers; None in a record of an ingest that did not tell.
    """

    request_id: RequestId
    choice: ChoiceIndex
    epoch: Epoch
    placement: PlacementId
    prefill: WorkerRef
    decode: WorkerRef
    view: View | None = None
    stamps: Stamps = field(default_factory=dict[Event, float])
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """New tokens of one placement.

    Attributes:
        index: place in the answer of the first of `ids`.
        finish: the choice ends behind `ids`.
        stop_reason: the stop string or the stop token id that ended it; None for EOS.
        num_cached_tokens: prompt tokens whose KV was found; with the first entry of a prefill.
        wire_format: the most lossy form in which KV of the ids before came; with the first entry of a decode.
        stamps: events that this worker passed since its last entry.
    """

    request_id: RequestId
    choice: ChoiceIndex
    placement: PlacementId
    index: Count
    ids: WireIds
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    error: ErrorBody | None = None
    num_cached_tokens: Count | None = None
    wire_format: WireFormat = WireFormat.NATIVE
    stamps: Stamps = field(default_factory=dict[Event, float])


@dataclass(frozen=True, slots=True)
class Frame:
    """All tokens that one worker's step made for this partition.

    Attributes:
        made_s: end of that step, unix seconds by the worker's clock.
    """

    worker: WorkerRef
    entries: tuple[FrameEntry, ...]
    made_s: UnixSeconds


CutOutcome = Literal[FinishReason.FAILED, FinishReason.REJECTED, FinishReason.CANCELLED, FinishReason.EXPIRED]
"""How a cut may end a choice: only a worker's frame says that it is complete."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Closes the open placement of a choice, if `epoch` is current + 1; with an outcome it ends the choice.

    A cut with an outcome for a request of which no `open` came yet ends the request with all its choices.

    Attributes:
        reason: for people and metrics ("deadline", "client gone", "drain", ...).
        outcome: the end, or None if the choice is to be placed again.
        lost: the worker whose loss closed the placement; None where nobody was lost (a drain, an end).
        view: where a refusal comes before any `open`, what is known of the request.
    """

    request_id: RequestId
    choice: ChoiceIndex
    epoch: Epoch
    reason: str
    outcome: CutOutcome | None = None
    error: ErrorBody | None = None
    view: View | None = None
    lost: WorkerRef | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """A client of this edge follows the request; `stream` tells its connections apart."""

    request_id: RequestId
    edge: Incarnation
    stream: str


@dataclass(frozen=True, slots=True)
class Detach:
    """The client that `Attach` told of is gone."""

    request_id: RequestId
    edge: Incarnation
    stream: str


StreamOutMessage = Open | Frame | Cut | Attach | Detach
STREAM_OUT_DECODER: Decoder[StreamOutMessage] = Decoder(Open, Frame, Cut, Attach, Detach)
