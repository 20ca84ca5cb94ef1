"""Every key in Redis and how long it lives. Everything here can be written again by whoever owns it."""

from shared.request import Incarnation, RequestId

PREFIX = "baton"

BEAT_INTERVAL_S = 0.5
"""Leases are renewed this often..."""

LEASE_MS = 2000
"""...and lost after this long without."""

BLOCK_FEED_LENGTH = 4096
"""Entries kept of each worker's stream of stored and evicted blocks."""


def slot(slot_number: int) -> str:
    """String: the card (JSON) of the worker that holds the slot; expires with its lease."""
    return f"{PREFIX}:slot:{slot_number}"


def load(incarnation: Incarnation) -> str:
    """String: what the worker last said of its load (JSON); expires with its lease."""
    return f"{PREFIX}:load:{incarnation}"


def credits_taken(incarnation: Incarnation) -> str:
    """Hash: placement -> pages taken on that worker; expires a while after the worker."""
    return f"{PREFIX}:credits:{incarnation}"


def block_feed(incarnation: Incarnation) -> str:
    """Stream: blocks stored and evicted by that worker, numbered without gaps."""
    return f"{PREFIX}:blocks:{incarnation}"


def partition_lease(group: str, partition: int) -> str:
    """String: the member that holds the partition for the group."""
    return f"{PREFIX}:partition:{group}:{partition}"


def members(group: str) -> str:
    """Sorted set: member -> server time (ms) at which its membership ends."""
    return f"{PREFIX}:members:{group}"


def placement(request_id: RequestId, choice: int, epoch: int) -> str:
    """String: the placement (JSON) made under this operation; asked again it is returned, not made again."""
    return f"{PREFIX}:placement:{request_id}:{choice}:{epoch}"


def request(request_id: RequestId) -> str:
    """String: where the request's story begins on `stream-out` (JSON), a hint for edges that do not own it."""
    return f"{PREFIX}:request:{request_id}"
