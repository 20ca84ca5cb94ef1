"""What applications read: the one end of every request (`results`), and jobs nobody could serve (`dead-letter`)."""

from dataclasses import dataclass, field
from typing import Any

from shared.request import Event, RequestId
from shared.wire.codec import Decoder
from shared.wire.to_stream_out import ErrorBody

HEADER_ERROR = "error"
HEADER_SOURCE_TOPIC = "source-topic"
HEADER_SOURCE_PARTITION = "source-partition"
HEADER_SOURCE_OFFSET = "source-offset"
HEADER_SOURCE_BYTES = "source-bytes"
"""Size of the original: more than the letter's, if it did not fit beside the headers."""

HEADER_STORY_OFFSET = "story-offset"
"""On a result: offset of the first record about the request in its partition of `stream-out`."""

HEADER_HISTORY = "history"
"""JSON list of the workers that were lost with the job: epoch, slot, incarnation."""


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a request, a pure function of the log: written twice it is the same byte for byte.

    Attributes:
        status: "completed" if every choice ended by stop or length, else the first other finish reason.
        response: the answer in OpenAI's shape, absent if nothing was generated.
        error: why, unless completed.
        timings: unix seconds by event; of several choices the last.
    """

    request_id: RequestId
    status: str
    tenant: str = ""
    body_hash: str = ""
    response: dict[str, Any] | None = None
    error: ErrorBody | None = None
    timings: dict[Event, float] = field(default_factory=dict[Event, float])


RESULT_DECODER: Decoder[Result] = Decoder(Result)
