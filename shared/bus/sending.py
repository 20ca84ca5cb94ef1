"""Sending in order, whatever the log does: one buffer and one task a partition, for the real log and its twin alike.

A record leaves its buffer when it is acknowledged and not before, so whatever fails is sent again from the first
record without an acknowledgement. At most one append of a partition is under way.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from shared.bus.port import BusUnavailable, Headers, record_bytes
from shared.errors import BatonError
from shared.wire.topics import MAX_RECORD_BYTES

MAX_BATCH_BYTES = 262_144
"""Records that wait are appended together up to this size; a larger record goes alone."""

MAX_BUFFERED_RECORDS = 4096
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""Limits of one partition's buffer; a single record always fits an empty one."""

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
"""Wait before an append is tried again; doubles from the first to the last."""


class AppendFailed(BatonError):
    """An append was refused, or its outcome is not known."""


@dataclass(frozen=True, slots=True)
class Unsent:
    """A record on its way.

    Attributes:
        num_bytes: its `record_bytes`.
        ack: gets the offset; None if nobody waits for it.
    """

    value: bytes
    key: bytes | None
    headers: Headers
    num_bytes: int
    ack: asyncio.Future[int] | None


Append = Callable[[str, int, Sequence[Unsent]], Awaitable[int]]
"""Appends records to (topic, partition) in order and returns the offset of the first. Raises AppendFailed."""


class PartitionSender:
    """The buffer of one partition, and the task that empties it."""

    def __init__(self, append: Callable[[Sequence[Unsent]], Awaitable[int]], on_failure: Callable[[], None]) -> None:
        self._append = append
        self._on_failure = on_failure
        self._buffer: deque[Unsent] = deque()
        self._num_bytes = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def buffered(self) -> Sequence[Unsent]:
        """Records without acknowledgement, oldest first."""
        return tuple(self._buffer)

    def has_room(self, num_bytes: int) -> bool:
        if not self._buffer:
            return True
        return len(self._buffer) < MAX_BUFFERED_RECORDS and self._num_bytes + num_bytes <= MAX_BUFFERED_BYTES

    async def wait_for_room(self, num_bytes: int) -> None:
        while not self.has_room(num_bytes):
            self._room.clear()
            await self._room.wait()

    def put(self, record: Unsent) -> None:
        """Queue a record that there is room for."""
        self._buffer.append(record)
        self._num_bytes += record.num_bytes
        self._empty.clear()
        self._work.set()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()

    def fail(self, error: BusUnavailable) -> None:
        """Give up what is buffered."""
        for record in self._buffer:
            if record.ack is not None and not record.ack.done():
                record.ack.set_exception(error)
        self._buffer.clear()
        self._num_bytes = 0
        self._room.set()
        self._empty.set()

    async def run(self) -> None:
        """Send until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            await self._work.wait()
            batch = self._oldest_batch()
            first_offset = await self._appended(batch)
            if first_offset is None:
                self._on_failure()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            else:
                backoff_s = FIRST_BACKOFF_S
                self._acknowledge(len(batch), first_offset)

    async def _appended(self, batch: Sequence[Unsent]) -> int | None:
        """The offset of the first record; None if they are to be appended again.

        Whatever goes wrong, this task goes on: nobody would empty the buffer any more, and nobody would hear of it.
        """
        task = asyncio.current_task()
        assert task is not None, "only tasks await"
        try:
            return await self._append(batch)
        except AppendFailed:
            return None
        except asyncio.CancelledError as error:  # of a library's inner task, unless it is for this one
            if task.cancelling():
                raise
            unforeseen: BaseException = error
        except Exception as error:  # noqa: BLE001 - a defect: told to the loop, and tried again
            unforeseen = error
        task.get_loop().call_exception_handler(
            {"message": "an append failed in an unforeseen way", "exception": unforeseen, "task": task}
        )
        return None

    def _oldest_batch(self) -> Sequence[Unsent]:
        num_records = num_bytes = 0
        for record in self._buffer:
            num_bytes += record.num_bytes
            if num_records and num_bytes > MAX_BATCH_BYTES:
                break
            num_records += 1
        return tuple(islice(self._buffer, num_records))

    def _acknowledge(self, num_records: int, first_offset: int) -> None:
        for offset in range(first_offset, first_offset + num_records):
            record = self._buffer.popleft()
            self._num_bytes -= record.num_bytes
            if record.ack is not None and not record.ack.done():
                record.ack.set_result(offset)
        self._room.set()
        if not self._buffer:
            self._work.clear()
            self._empty.set()


class SendingProducer:
    """A `Producer` over any `append`. `on_failure` hears of each append that has to be made again."""

    def __init__(self, append: Append, on_failure: Callable[[str, int], None]) -> None:
        self._append = append
        self._on_failure = on_failure
        self._senders: dict[tuple[str, int], PartitionSender] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def send(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        num_bytes = _checked_bytes(value, key, headers)
        sender = self._sender(topic, partition)
        await sender.wait_for_room(num_bytes)
        self._check_open()
        ack: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sender.put(Unsent(value, key, headers, num_bytes, ack))
        return await ack

    def post(
        self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        num_bytes = _checked_bytes(value, key, headers)
        sender = self._sender(topic, partition)
        if not sender.has_room(num_bytes):
            raise asyncio.QueueFull(f"{topic}/{partition}")
        sender.put(Unsent(value, key, headers, num_bytes, None))

    def buffered(self) -> dict[tuple[str, int], Sequence[Unsent]]:
        """Records without acknowledgement by (topic, partition)."""
        return {place: sender.buffered for place, sender in self._senders.items()}

    async def flush(self, timeout_s: float) -> int:
        """Wait until all is acknowledged; the number of records that were not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                for sender in list(self._senders.values()):
                    await sender.wait_until_empty()
        except TimeoutError:
            pass
        return sum(len(records) for records in self.buffered().values())

    async def close(self) -> None:
        """Stop sending; whoever waits for an acknowledgement gets BusUnavailable."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sender in self._senders.values():
            sender.fail(BusUnavailable("the producer was closed before the record was acknowledged"))

    def _sender(self, topic: str, partition: int) -> PartitionSender:
        self._check_open()
        sender = self._senders.get((topic, partition))
        if sender is None:

            async def append(records: Sequence[Unsent]) -> int:
                return await self._append(topic, partition, records)

            sender = PartitionSender(append, lambda: self._on_failure(topic, partition))
            self._senders[topic, partition] = sender
            self._tasks.append(asyncio.create_task(sender.run(), name=f"send {topic}/{partition}"))
        return sender

    def _check_open(self) -> None:
        if self._closed:
            raise BusUnavailable("the producer is closed")


def _checked_bytes(value: bytes, key: bytes | None, headers: Headers) -> int:
    num_bytes = record_bytes(value, key, headers)
    if num_bytes > MAX_RECORD_BYTES:
        raise ValueError(f"record has {num_bytes} bytes, the limit is {MAX_RECORD_BYTES}")
    return num_bytes
