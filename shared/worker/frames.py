"""Writes what a worker made to `stream-out`: one record a step and partition."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable

from shared.bus.port import Producer
from shared.request import WorkerRef, partition_of
from shared.wire.codec import encode
from shared.wire.to_stream_out import Frame, FrameEntry
from shared.wire.topics import STREAM_OUT

BUFFER_FULL_RETRY_S = 0.02


class FrameWriter:
    """Groups entries by partition; the producer keeps their order."""

    def __init__(self, producer: Producer, worker: WorkerRef) -> None:
        self._producer = producer
        self._worker = worker

    async def send(self, entry: FrameEntry, made_s: float) -> None:
        """Append one entry, made at `made_s` (unix seconds), and wait until it stands in the log."""
        frame = Frame(self._worker, (entry,), made_s)
        await self._producer.send(STREAM_OUT.name, partition_of(entry.request_id), encode(frame))

    async def post(self, entries: Iterable[FrameEntry], made_s: float) -> None:
        """Queue the entries of one step, made at `made_s`; waits only while the log cannot take more."""
        by_partition: defaultdict[int, list[FrameEntry]] = defaultdict(list)
        for entry in entries:
            by_partition[partition_of(entry.request_id)].append(entry)
        for partition, group in by_partition.items():
            await self._post_when_room(partition, encode(Frame(self._worker, tuple(group), made_s)))

    async def _post_when_room(self, partition: int, value: bytes) -> None:
        while True:
            try:
                self._producer.post(STREAM_OUT.name, partition, value)
            except asyncio.QueueFull:
                await asyncio.sleep(BUFFER_FULL_RETRY_S)
            else:
                return
