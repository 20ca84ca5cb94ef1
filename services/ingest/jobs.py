"""Jobs as they stand on the topic `ingest`."""

import re
from dataclasses import dataclass

from shared.bus.port import Record
from shared.errors import InvalidRequest
from shared.request import REQUEST_ID_PATTERN, Incarnation, Priority, RequestId
from shared.wire.to_ingest import (
    HEADER_DEADLINE,
    HEADER_EDGE,
    HEADER_PRIORITY,
    HEADER_TENANT,
    HEADER_TRACEPARENT,
    NO_PRIORITY,
    TENANT_PATTERN,
    LogPosition,
)
from shared.wire.topics import MAX_DEADLINE_S

DEFAULT_TENANT = "default"
EDGE_PATTERN = REQUEST_ID_PATTERN
TRACEPARENT_PATTERN = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Job:
    """One record of `ingest`.

    Attributes:
        body: an OpenAI request body, not looked at yet.
        accepted_s: unix seconds, by the broker's clock.
        edge: who waits for the answer on behalf of a client, if anybody.
    """

    request_id: RequestId
    position: LogPosition
    body: bytes
    tenant: str
    accepted_s: float
    deadline_s: float
    edge: Incarnation | None
    traceparent: str | None
    priority: Priority = Priority.STANDARD


def request_id_of(record: Record) -> RequestId:
    """The job's id: its key, or one made of its place in the log if the key can be none."""
    key = (record.key or b"").decode("utf-8", "replace")
    if REQUEST_ID_PATTERN.fullmatch(key):
        return RequestId(key)
    return RequestId(f"unnamed-{record.partition}-{record.offset}")


def read_job(record: Record, *, default_deadline_s: float) -> Job:
    """The job in a record. Raises InvalidRequest, naming the key or header that is wrong."""
    request_id = request_id_of(record)
    if record.key is None or request_id.encode() != record.key:
        raise InvalidRequest(
            f"the record's key must be the request id, matching {REQUEST_ID_PATTERN.pattern}", param="key"
        )
    headers = dict(record.headers)
    traceparent = _text(headers, HEADER_TRACEPARENT)
    return Job(
        request_id=request_id,
        position=LogPosition(record.partition, record.offset),
        body=record.value,
        tenant=_tenant(headers),
        accepted_s=record.timestamp_s,
        deadline_s=_deadline_s(headers, record.timestamp_s, default_deadline_s),
        edge=_edge(headers),
        traceparent=traceparent if traceparent and TRACEPARENT_PATTERN.fullmatch(traceparent) else None,
        priority=_priority(headers),
    )


def unreadable_job(record: Record, *, default_deadline_s: float) -> Job:
    """Stands for a record that `read_job` refused, so that it can be answered."""
    return Job(
        request_id=request_id_of(record),
        position=LogPosition(record.partition, record.offset),
        body=record.value,
        tenant=DEFAULT_TENANT,
        accepted_s=record.timestamp_s,
        deadline_s=record.timestamp_s + default_deadline_s,
        edge=None,
        traceparent=None,
    )


def _text(headers: dict[str, bytes], name: str) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("utf-8", "replace")


def _tenant(headers: dict[str, bytes]) -> str:
    tenant = _text(headers, HEADER_TENANT)
    if tenant is None:
        return DEFAULT_TENANT
    if not TENANT_PATTERN.fullmatch(tenant):
        raise InvalidRequest(f"header {HEADER_TENANT} must match {TENANT_PATTERN.pattern}", param=HEADER_TENANT)
    return tenant


def _priority(headers: dict[str, bytes]) -> Priority:
    priority = _text(headers, HEADER_PRIORITY)
    if priority is None:
        return Priority.STANDARD
    try:
        return Priority(priority)
    except ValueError:
        raise InvalidRequest(f"header {HEADER_PRIORITY} {NO_PRIORITY}", param=HEADER_PRIORITY) from None


def _edge(headers: dict[str, bytes]) -> Incarnation | None:
    edge = _text(headers, HEADER_EDGE)
    if edge is None:
        return None
    if not EDGE_PATTERN.fullmatch(edge):
        raise InvalidRequest(f"header {HEADER_EDGE} must match {EDGE_PATTERN.pattern}", param=HEADER_EDGE)
    return Incarnation(edge)


def _deadline_s(headers: dict[str, bytes], accepted_s: float, default_deadline_s: float) -> float:
    text = _text(headers, HEADER_DEADLINE)
    if text is None:
        return accepted_s + default_deadline_s
    if not text.isascii() or not text.isdigit() or len(text) > 16:
        raise InvalidRequest(f"header {HEADER_DEADLINE} must be unix milliseconds", param=HEADER_DEADLINE)
    deadline_s = int(text) / 1000
    if deadline_s > accepted_s + MAX_DEADLINE_S:
        raise InvalidRequest(
            f"header {HEADER_DEADLINE} must be at most {MAX_DEADLINE_S} s after the job", param=HEADER_DEADLINE
        )
    return deadline_s
