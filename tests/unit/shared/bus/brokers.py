"""Brokers that a test answers for."""

import asyncio
import struct
from types import SimpleNamespace

from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.fetch import FetchRequest_v11
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from shared.bus.kafka_reader import SessionFetch

TOPIC = "topic"
SESSION = 77


def batch(first_offset, *values):
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=0,
        batch_size=1_000_000,
    )
    for number, value in enumerate(values):
        builder.append(number, timestamp=2500, key=b"key", value=value, headers=[("name", b"header")])
    return struct.pack(">q", first_offset) + bytes(builder.build())[8:]


def news(partition, batches=b"", *, end=0, error=None):
    return (partition, error.errno if error else 0, end, end, 0, None, -1, batches)


def answer(*of_partitions, session_id=SESSION, error_code=0):
    topics = [(TOPIC, list(of_partitions))] if of_partitions else []
    return SimpleNamespace(error_code=error_code, session_id=session_id, topics=topics)


def asked_for(request):
    sent = request.build(FetchRequest_v11)
    return {partition: position for _, asked in sent.topics for partition, _, position, _, _ in asked}


class Brokers:
    """Leads partition p from broker p % num_brokers; fetches wait until the test answers them."""

    def __init__(self, num_brokers=1):
        self.cluster = SimpleNamespace(leader_for_partition=lambda place: place.partition % num_brokers)
        self.fetches = [asyncio.Queue() for _ in range(num_brokers)]
        self.beginning = 0
        self.coordinator_says = []
        self.num_lookups = 0
        self.num_clients = 0

    def client(self, **_):
        self.num_clients += 1
        names = ("cluster", "bootstrap", "close", "get_random_node", "send")
        return SimpleNamespace(**{name: getattr(self, name) for name in names})

    async def bootstrap(self):
        pass

    async def close(self):
        pass

    def get_random_node(self):
        return 0

    async def send(self, node, request, *, group=None):
        if isinstance(request, SessionFetch):
            reply = asyncio.get_running_loop().create_future()
            self.fetches[node].put_nowait((asked_for(request), reply))
            return await reply
        if isinstance(request, OffsetRequest):
            ((_, asked),) = request._topics
            return SimpleNamespace(topics=[(TOPIC, [(partition, 0, -1, self.beginning) for partition, _ in asked])])
        if isinstance(request, FindCoordinatorRequest):
            self.num_lookups += 1
            return SimpleNamespace(error_code=0, coordinator_id=0)
        error = self.coordinator_says.pop(0) if self.coordinator_says else None
        error_code = error.errno if error else 0
        if isinstance(request, OffsetCommitRequest):
            return SimpleNamespace(topics=[(TOPIC, [(0, error_code)])])
        assert isinstance(request, OffsetFetchRequest)
        return SimpleNamespace(error_code=0, topics=[(TOPIC, [(0, 7, "note", error_code)])])

    async def asked(self, broker=0):
        """Positions of the broker's next fetch, and the future that answers it."""
        async with asyncio.timeout(5):
            return await self.fetches[broker].get()
