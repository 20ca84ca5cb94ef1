"""What one client saw of one request: the other side of the log's story, for `history` to compare."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path


class Manner(StrEnum):
    """How a client asks."""

    STREAM = "stream"
    WHOLE = "whole"
    JOB = "job"
    """A record on `ingest`, without an edge."""


class Outcome(StrEnum):
    """How it went, as the client sees it."""

    OPEN = "open"
    """It has not ended yet."""
    DONE = "done"
    """The whole answer came: [DONE] at the end of a stream, or status 200."""
    ERROR = "error"
    """The answer is an error: in the stream's last event, or as `status` and `answer`."""
    REFUSED = "refused"
    """429 or 503: nothing was accepted."""
    UNKNOWN = "unknown"
    """404 for a request whose id the client had been told."""
    LEFT = "left"
    """The client hung up for good in mid-stream."""
    LOST_TRACK = "lost track"
    """The connection broke before the client could know the request's id, and it has no key to ask by."""
    NO_END = "no end"
    """The client waited far beyond the deadline, asking again and again."""
    SENT = "sent"
    """A job that the log acknowledged."""


@dataclass(frozen=True, slots=True)
class Received:
    """One event of a stream, as it came; `data` is its JSON text."""

    at_s: float
    id: str
    data: str


@dataclass(slots=True)
class Attempt:
    """One connection, or one write of a job.

    Attributes:
        what: "post", "resume", "delete" or "job".
        status: of the answer; None if none came.
        until_s: when it was over.
    """

    at_s: float
    what: str
    edge: str
    status: int | None = None
    until_s: float | None = None


@dataclass(slots=True)
class Capture:
    """One request of one client. All times are unix seconds by the client's clock.

    Attributes:
        name: stands in the body as `user`, so that a job is known as this client's though it never learnt the id.
        timeout_s: the deadline, counted from the job's acceptance or from `sent_s` if that is earlier.
        silences: stretches of over a second without a byte (keep-alives count as heard) while the client wanted the
            stream, (from, to).
        delete_asked_s: when it first asked to cancel the request.
        left_s: when it hung up for good.
        ended_s: when it had its outcome.
        answer: the body of the answer that was no stream.
    """

    name: str
    manner: Manner
    sent_s: float
    timeout_s: float
    tenant: str = "default"
    key: str | None = None
    request_id: str | None = None
    events: list[Received] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    silences: list[tuple[float, float]] = field(default_factory=list)
    num_resumes: int = 0
    delete_asked_s: float | None = None
    left_s: float | None = None
    ended_s: float | None = None
    outcome: Outcome = Outcome.OPEN
    status: int | None = None
    retry_after_s: float | None = None
    answer: str = ""


def write_captures(path: Path, captures: Iterable[Capture]) -> None:
    """One a line."""
    with path.open("w") as out:
        out.writelines(json.dumps(asdict(capture)) + "\n" for capture in captures)


def read_captures(path: Path) -> list[Capture]:
    """What `write_captures` wrote."""
    with path.open() as lines:
        return [_read(json.loads(line)) for line in lines]


def _read(fields: dict) -> Capture:
    fields["manner"], fields["outcome"] = Manner(fields["manner"]), Outcome(fields["outcome"])
    fields["events"] = [Received(**event) for event in fields["events"]]
    fields["attempts"] = [Attempt(**attempt) for attempt in fields["attempts"]]
    fields["silences"] = [tuple(silence) for silence in fields["silences"]]
    return Capture(**fields)
