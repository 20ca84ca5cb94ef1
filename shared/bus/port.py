"""The log that connects the services: append to a partition, read a partition from an offset, commit statements.

Delivery is at least once: a record whose acknowledgement got lost is appended again, with everything that this producer
sent behind it to the same partition (a, b, c, b, c). What holds is that the *first* copies of one producer's records
stand in a partition in the order in which they were sent. A second copy may come late: a request that was given up
can reach the broker behind the one that replaced it (a, b, c, d, b, c). Readers must bear that, as they must bear
records of a producer that was thought dead.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from shared.errors import BatonError

Headers = tuple[tuple[str, bytes], ...]

MAX_NOTE_BYTES = 4096
"""Longest note of a commit, as the broker has it by default."""

RECORD_OVERHEAD_BYTES = 128
"""What a record may cost beside its key, value and headers when it is a batch of its own."""

HEADER_OVERHEAD_BYTES = 10
"""What each header costs beside its name and value."""


class BusUnavailable(BatonError):
    """The log did not answer within the call's deadline; whether the call had its effect is not known."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in the log.

    Attributes:
        timestamp_s: unix seconds, by the broker's clock, of its arrival.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    headers: Headers
    timestamp_s: float


@dataclass(frozen=True, slots=True)
class Committed:
    """A statement about everything below `offset`; `note` is the writer's own, up to MAX_NOTE_BYTES of UTF-8."""

    offset: int
    note: str = ""

    def __post_init__(self) -> None:
        num_bytes = len(self.note.encode())
        if num_bytes > MAX_NOTE_BYTES:
            raise ValueError(f"note has {num_bytes} bytes, the limit is {MAX_NOTE_BYTES}")


class Start(Enum):
    """Where reading begins when no offset is named."""

    BEGINNING = auto()
    END = auto()


class Producer(Protocol):
    """Appends records. One sender per partition keeps their order; nothing is dropped while it is open."""

    async def send(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        """Append and return the offset once all in-sync replicas have it (of the copy that was acknowledged).

        Waits while the partition's buffer is full or the log is away. Cancelling does not unsend.

        Raises:
            ValueError: `record_bytes` is over topics.MAX_RECORD_BYTES.
            BusUnavailable: the producer was closed before the record was acknowledged.
        """
        ...

    def post(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        """Queue for appending, in order with `send`.

        Raises:
            asyncio.QueueFull: the partition's buffer is full.
            ValueError, BusUnavailable: as `send`.
        """
        ...


class Reader(Protocol):
    """Reads chosen partitions of one topic, each in order. `assign` and `read` each have one caller at a time."""

    async def assign(self, starts: Mapping[int, int | Start]) -> None:
        """Read exactly these partitions from here on; those read before go on where they are, the value is ignored.

        On return the starts are settled: nothing that is appended later to a partition started at END is missed. An
        offset that is no longer (or not yet) in the log reads from the oldest record kept. Waits while the log is away.
        A reader that is assigned again may get its next records up to 0.5 s late: what must be prompt and what comes
        and goes belong in readers of their own.
        """
        ...

    async def read(self, timeout_s: float) -> Sequence[Record]:
        """The next records of all partitions, as soon as there are any; empty after `timeout_s` or while the log is
        away. Cancelling loses nothing: the records come with the next call."""
        ...

    async def committed(self, partition: int) -> Committed | None:
        """The group's latest commit for the partition, assigned or not. Raises BusUnavailable."""
        ...

    async def commit(self, commits: Mapping[int, Committed]) -> None:
        """Raises ValueError for a partition that is not assigned, BusUnavailable."""
        ...

    async def end_offset(self, partition: int) -> int:
        """Offset that the next record of the partition will get. Raises BusUnavailable."""
        ...

    async def beginning_offset(self, partition: int) -> int:
        """Offset of the oldest record kept. Raises BusUnavailable."""
        ...

    async def offset_since(self, partition: int, unix_s: float) -> int:
        """Offset of the first record that the log took in at `unix_s` or later; of the next one if there is none.
        Raises BusUnavailable."""
        ...


class Bus(Protocol):
    """A connection to the log."""

    def producer(self) -> AbstractAsyncContextManager[Producer]:
        """A producer of its own connection; leaving the context waits (bounded) until all is acknowledged.

        Entering does not wait for the log."""
        ...

    def reader(self, topic: str, *, group: str) -> AbstractAsyncContextManager[Reader]:
        """A reader without partitions yet; `group` names whose commits it reads and writes."""
        ...

    async def reachable(self) -> bool:
        """Whether the log answers now (readiness)."""
        ...

    def silent_s(self) -> float:
        """Seconds since the log last answered for the partition, of all that are read here, that has waited longest.

        0 where nothing is read. An idle log answers twice a second, so more than a few seconds say that it is away, for
        this process at least.
        """
        ...


def record_bytes(value: bytes, key: bytes | None, headers: Headers) -> int:
    """Upper bound of what the record takes in the log; at most topics.MAX_RECORD_BYTES may be sent."""
    header_bytes = sum(len(name.encode()) + len(data) + HEADER_OVERHEAD_BYTES for name, data in headers)
    return len(value) + (len(key) if key is not None else 0) + header_bytes + RECORD_OVERHEAD_BYTES
