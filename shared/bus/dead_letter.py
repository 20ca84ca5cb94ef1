"""Letters to operators: a job that nobody could serve, as it came, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from shared.bus.port import Headers, record_bytes
from shared.policy.fold import Loss
from shared.request import RequestId
from shared.wire.results import (
    HEADER_ERROR,
    HEADER_HISTORY,
    HEADER_SOURCE_BYTES,
    HEADER_SOURCE_OFFSET,
    HEADER_SOURCE_PARTITION,
    HEADER_SOURCE_TOPIC,
)
from shared.wire.to_ingest import HEADER_TENANT, LogPosition
from shared.wire.topics import MAX_RECORD_BYTES

MAX_ERROR_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Letter:
    """A record of `dead-letter`; it goes to the partition that its job came from."""

    partition: int
    key: bytes
    headers: Headers
    value: bytes


def dead_letter(
    request_id: RequestId,
    body: bytes,
    *,
    topic: str,
    position: LogPosition,
    tenant: str,
    error: str,
    history: Sequence[Loss] = (),
) -> Letter:
    """The letter about a job: its bytes unchanged, as far as they fit beside the headers.

    Args:
        topic, position: where the job stands.
        history: the workers that were lost with it.
    """
    key = request_id.encode()
    losses = [
        {"epoch": loss.epoch, "slot": loss.worker.slot, "incarnation": loss.worker.incarnation} for loss in history
    ]
    headers = (
        (HEADER_ERROR, error.encode()[:MAX_ERROR_BYTES]),
        (HEADER_TENANT, tenant.encode()),
        (HEADER_SOURCE_TOPIC, topic.encode()),
        (HEADER_SOURCE_PARTITION, str(position.partition).encode()),
        (HEADER_SOURCE_OFFSET, str(position.offset).encode()),
        (HEADER_SOURCE_BYTES, str(len(body)).encode()),
        *(((HEADER_HISTORY, orjson.dumps(losses)),) if losses else ()),
    )
    room = MAX_RECORD_BYTES - record_bytes(b"", key, headers)
    return Letter(position.partition, key, headers, body[:room])
