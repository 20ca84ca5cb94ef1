"""The log and its twin, as the behaviour suite sees them: connections to it, fresh topics, retention, lost answers."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
from typing import Protocol
from uuid import uuid4

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.produce import ProduceRequest

from infra.kafka.create_topics import create_topics
from shared.bus.kafka import KafkaBus
from shared.bus.memory import Append, Fate, MemoryBus, MemoryLog
from shared.bus.port import Bus
from shared.wire.topics import Topic

NUM_PARTITIONS = 3


class World(Protocol):
    """One log."""

    def bus(self, client_id: str = "test") -> Bus: ...

    def cut_off_bus(self) -> Bus: ...

    async def topic(self) -> str:
        """A new topic with NUM_PARTITIONS partitions."""
        ...

    async def trim(self, topic: str, partition: int, offset: int) -> None:
        """Retention forgets what is below `offset`."""
        ...

    def lose_answers(self, share: float) -> None:
        """From now on this share of the appends lands without the producer hearing of it."""
        ...

    def now_s(self) -> float: ...


class MemoryWorld:
    def __init__(self):
        self.log = MemoryLog(clock=time.time, random=Random(1))

    def bus(self, client_id="test"):
        return MemoryBus(self.log, client_id=client_id)

    def cut_off_bus(self):
        bus = MemoryBus(self.log, client_id="cut off")
        bus.can_read = bus.can_send = False
        return bus

    async def topic(self):
        return uuid4().hex

    async def trim(self, topic, partition, offset):
        self.log.trim(topic, partition, offset)

    def lose_answers(self, share):
        random = Random(2)

        def fate(append: Append) -> Fate:
            return Fate(acked=random.random() >= share)

        self.log.fate = fate

    def now_s(self):
        return time.time()


class KafkaWorld:
    def __init__(self, address: str, monkeypatch: pytest.MonkeyPatch):
        self.address = address
        self._monkeypatch = monkeypatch

    def bus(self, client_id="test"):
        return KafkaBus(self.address, client_id=client_id)

    def cut_off_bus(self):
        return KafkaBus("127.0.0.1:1", client_id="cut off")

    async def topic(self):
        name = f"test-{uuid4().hex}"
        await create_topics(self.address, [Topic(name, NUM_PARTITIONS)])
        return name

    async def trim(self, topic, partition, offset):
        async with self._admin() as admin:
            await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before_offset=offset)})

    def lose_answers(self, share):
        random = Random(2)
        honest = AIOKafkaClient.send

        async def forgetful(client, node_id, request, **options):
            answer = await honest(client, node_id, request, **options)
            if isinstance(request, ProduceRequest) and random.random() < share:
                raise KafkaError("the answer got lost")
            return answer

        self._monkeypatch.setattr(AIOKafkaClient, "send", forgetful)

    def now_s(self):
        return time.time()

    @asynccontextmanager
    async def _admin(self) -> AsyncGenerator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


async def drain(reader, num_records, timeout_s=10.0):
    """The next `num_records` records; fails if they do not come in time, or if more come."""
    deadline = time.monotonic() + timeout_s
    records = []
    while len(records) < num_records and time.monotonic() < deadline:
        records += await reader.read(0.2)
    assert len(records) == num_records
    return records


def values(records, partition=None):
    return [record.value for record in records if partition is None or record.partition == partition]


def first_copies(records):
    """Values in the order in which each stands in the log for the first time."""
    return list(dict.fromkeys(values(records)))
