"""The log that connects the services: append to a partition, read a partition from an offset, commit statements.

Order holds within one producer and partition. Delivery is at least once: a record whose acknowledgement got lost
is appended again, with everything that this producer sent behind it to the same partition (a, b, c, b, c). Readers
must bear that, as they must bear records of a producer that was thought dead.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

Headers = tuple[tuple[str, bytes], ...]


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
    """A statement about everything below `offset`; `note` is the writer's own."""

    offset: int
    note: str = ""


class Start(Enum):
    """Where reading begins when no offset is named."""

    BEGINNING = auto()
    END = auto()


class Producer(Protocol):
    """Appends records. One sender per partition keeps their order; nothing is dropped while it is open."""

    async def send(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        """Append and return the offset once all in-sync replicas have it (the last one, if it had to be sent again).

        Waits while the partition's buffer is full or the log is away. Cancelling does not unsend.
        """
        ...

    def post(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        """Queue for appending, in order with `send`; raises asyncio.QueueFull when the partition's buffer is full."""
        ...


class Reader(Protocol):
    """Reads chosen partitions of one topic, each in order."""

    def assign(self, starts: Mapping[int, int | Start]) -> None:
        """Read exactly these partitions from here on; those read before go on where they are, the value is ignored."""
        ...

    async def read(self, timeout_s: float) -> Sequence[Record]:
        """The next records of all partitions, as soon as there are any; empty after `timeout_s`. One caller at a time."""
        ...

    async def committed(self, partition: int) -> Committed | None: ...

    async def commit(self, commits: Mapping[int, Committed]) -> None: ...

    async def end_offset(self, partition: int) -> int:
        """Offset that the next record of the partition will get."""
        ...

    async def beginning_offset(self, partition: int) -> int:
        """Offset of the oldest record kept."""
        ...


class Bus(Protocol):
    """A connection to the log."""

    def producer(self) -> AbstractAsyncContextManager[Producer]:
        """A producer of its own connection; leaving the context waits (bounded) until all is acknowledged."""
        ...

    def reader(self, topic: str, *, group: str) -> AbstractAsyncContextManager[Reader]:
        """A reader without partitions yet; `group` names whose commits it reads and writes."""
        ...

    async def reachable(self) -> bool:
        """Whether the log answers now (readiness)."""
        ...
