"""What ingest reads: jobs, in OpenAI's shape with headers (public), and requests to place again (private)."""

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from pydantic import Field

from shared.request import MAX_INT32, NUM_REQUEST_PARTITIONS, ChoiceIndex, Epoch, Priority, RequestId
from shared.wire.codec import Decoder, WireIds

HEADER_TENANT = "tenant"
HEADER_PRIORITY = "priority"
"""One of `Priority`, else the job is standard."""
HEADER_DEADLINE = "deadline-unix-ms"
HEADER_IDEMPOTENCY_KEY = "idempotency-key"
HEADER_TRACEPARENT = "traceparent"
HEADER_EDGE = "edge-incarnation"
"""Set by an edge on behalf of a waiting client: the request is cancelled when no edge is attached any more."""

TENANT_PATTERN = re.compile(r"[A-Za-z0-9_.\-]{1,64}")

MAX_IDEMPOTENCY_KEY_CHARS = 256

NO_PRIORITY = f"must be one of {', '.join(Priority)}"
"""What is wrong with another one."""

Headers = tuple[tuple[str, bytes], ...]


def body_hash(job: bytes) -> str:
    """Tells jobs under one id apart: hex sha256 of the record's value."""
    return sha256(job).hexdigest()


@dataclass(frozen=True, slots=True)
class LogPosition:
    """Where a record stands."""

    partition: Annotated[int, Field(ge=0, lt=NUM_REQUEST_PARTITIONS)]
    offset: Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True)
class Resume:
    """A choice whose placement was closed by a cut: place it again and go on behind the accepted tokens.

    Attributes:
        job: where the job stands on `ingest`.
        epoch: the epoch to open.
        max_tokens: as it was admitted with.
        accepted_ids: the answer so far.
    """

    request_id: RequestId
    choice: ChoiceIndex
    epoch: Epoch
    job: LogPosition
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)]
    accepted_ids: WireIds


RESUME_DECODER: Decoder[Resume] = Decoder(Resume)
