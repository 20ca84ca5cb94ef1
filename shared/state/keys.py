"""Every key in Redis and how long it lives. Everything here can be written again by whoever owns it.

All keys carry one hash tag, so that a script may touch several of them on a Redis cluster too.
"""

from shared.request import Incarnation, RequestId

PREFIX = "{baton}"

BEAT_INTERVAL_S = 0.5
"""Leases are renewed this often..."""

LEASE_MS = 2000
"""...and lost after this long without."""

LEASE_S = LEASE_MS / 1000

WORKER_TRACES_MS = 60_000
"""How long a worker's credits and block feed outlast its last beat."""

BLOCK_FEED_LENGTH = 512
"""Entries kept of each worker's stream of stored and evicted blocks: minutes of them, or half a million blocks of a
full list. Of at most 16 KiB each, so 8 MiB a worker at the very most."""


def up() -> str:
    """String "since last" (server ms): the store has been written to without a gap since `since`, lastly at `last`."""
    return f"{PREFIX}:up"


def slot(slot_number: int) -> str:
    """String: the incarnation that holds the slot; expires with its lease."""
    return f"{PREFIX}:slot:{slot_number}"


def worker(incarnation: Incarnation) -> str:
    """Hash: card, load, speeds (JSON), version (of card and speeds), takes_work (0, 1), num_pages, max_running; expires
    with the slot's lease."""
    return f"{PREFIX}:worker:{incarnation}"


def worker_credits(incarnation: Incarnation) -> str:
    """Hash: placement -> "pages ends_ms work_us" taken on that worker; `total` and `work`: the sums of pages and of
    microseconds. Outlasts the worker for a while."""
    return f"{PREFIX}:credits:{incarnation}"


def block_feed(incarnation: Incarnation) -> str:
    """Stream: blocks stored and evicted by that worker; entry n has the id "n+1-0"; outlasts the worker by a while."""
    return f"{PREFIX}:blocks:{incarnation}"


def blocks_wanted(incarnation: Incarnation) -> str:
    """String: somebody asks the worker for the full list of its blocks; there until it announces one."""
    return f"{PREFIX}:blocks-wanted:{incarnation}"


def members(group: str) -> str:
    """Sorted set: member -> server time (ms) at which its membership ends."""
    return f"{PREFIX}:members:{group}"


def partitions(group: str) -> str:
    """Hash: partition -> the member that holds it, for as long as its membership stands."""
    return f"{PREFIX}:partitions:{group}"


def placement(request_id: RequestId, choice: int, epoch: int) -> str:
    """String: the placement (JSON) made under this operation; asked again it is returned, not made again."""
    return f"{PREFIX}:placement:{request_id}:{choice}:{epoch}"


def request(request_id: RequestId) -> str:
    """String "partition offset": where the request's story begins, a hint for edges that do not own it."""
    return f"{PREFIX}:request:{request_id}"


def backlogs() -> str:
    """Hash: ingest -> "at_ms report" (JSON), as each said at its last beat; older ones are passed over."""
    return f"{PREFIX}:backlogs"


def place_of(request_id: RequestId) -> str:
    """String "cost tenant": an edge accepted the request for the tenant and guessed its cost in tokens."""
    return f"{PREFIX}:place:{request_id}"


def places(tenant: str) -> str:
    """Sorted set: request that has not ended -> server time (ms) at which its place ends in any case."""
    return f"{PREFIX}:places:{tenant}"


def budgets(tenant: str) -> str:
    """Hash: `requests` and `tokens` left, in units of 1/60000, and `at_ms`, up to when they have grown."""
    return f"{PREFIX}:budgets:{tenant}"
