"""What a scrape says of a connection to the real Kafka."""

import asyncio

from prometheus_client import CollectorRegistry

from shared.bus.metrics import BusMetrics
from tests.contract.bus_worlds import KafkaWorld, drain


async def test_records_are_behind_from_when_the_broker_tells_of_them_until_they_are_read(kafka_address, monkeypatch):
    world = KafkaWorld(kafka_address, monkeypatch)
    topic = await world.topic()
    bus, registry = world.bus(), CollectorRegistry()
    registry.register(BusMetrics(bus))

    def of_topic(name):
        return registry.get_sample_value(name, {"topic": topic})

    async with bus.producer() as producer, bus.reader(topic, group="g") as reader:
        for partition in (0, 0, 1):
            await producer.send(topic, partition, b"value")
        assert of_topic("baton_bus_records_buffered") == 0
        await reader.assign({0: 1, 1: 0})
        async with asyncio.timeout(10):
            while of_topic("baton_bus_records_behind") != 2:
                await asyncio.sleep(0.01)
        await drain(reader, 2)
        assert of_topic("baton_bus_records_behind") == 0
