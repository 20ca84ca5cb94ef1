"""The log on Kafka, by aiokafka.

What the client does not promise is settled here: order through failures (`sending`), fetches that are never answered
(`kafka_reader`), calls that never return while brokers are away (every one has a deadline).
"""
# pyright: reportMissingTypeStubs=false

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiokafka.errors import KafkaError

from shared.bus.kafka_appender import KafkaAppender
from shared.bus.kafka_client import CALL_TIMEOUT_S, BusCounters, check_access, closed, started_client
from shared.bus.kafka_reader import KafkaReader
from shared.bus.port import Producer, Reader
from shared.bus.sending import SendingProducer
from shared.observe.log import logger
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess

FLUSH_TIMEOUT_S = 10.0


class KafkaBus:
    """A connection to Kafka; each producer and reader has sockets of its own.

    `address` is "host:port", or several with commas between.
    """

    def __init__(self, address: str, *, client_id: str, access: KafkaAccess = PLAIN_KAFKA) -> None:
        self.counters = BusCounters()
        self.open_producers: set[SendingProducer] = set()
        self.open_readers: set[KafkaReader] = set()
        self._address = address
        self._client_id = client_id
        self._access = access
        self._log = logger("bus", client_id=client_id)

    @asynccontextmanager
    async def producer(self) -> AsyncGenerator[Producer]:
        connection = KafkaAppender(self._address, self._client_id, self._log, self.counters, self._access)
        producer = SendingProducer(connection.append, connection.note_failure)
        self.open_producers.add(producer)
        try:
            yield producer
        finally:
            self.open_producers.discard(producer)
            num_left = await producer.flush(FLUSH_TIMEOUT_S)
            if num_left:
                self._log.error("records given up at close", num_records=num_left)
            await producer.close()
            await connection.close()

    @asynccontextmanager
    async def reader(self, topic: str, *, group: str) -> AsyncGenerator[Reader]:
        reader = KafkaReader(self._address, self._client_id, topic, group, self._log, self.counters, self._access)
        reading = asyncio.create_task(reader.run(), name=f"read {topic}")
        self.open_readers.add(reader)
        try:
            yield reader
        finally:
            self.open_readers.discard(reader)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def check_access(self) -> None:
        """Raise StartupError if the brokers refuse us or are not those we trust; brokers that are away are no error."""
        await check_access(self._address, self._client_id, self._access)

    def silent_s(self) -> float:
        return max((reader.silent_s() for reader in self.open_readers), default=0.0)

    async def reachable(self) -> bool:
        try:
            client = await started_client(
                self._address,
                self._client_id,
                request_timeout_ms=int(1000 * CALL_TIMEOUT_S),
                log=self._log,
                access=self._access,
            )
        except (KafkaError, OSError, TimeoutError):
            return False
        found = bool(client.cluster.brokers())
        await closed(client.close(), self._log)
        return found
