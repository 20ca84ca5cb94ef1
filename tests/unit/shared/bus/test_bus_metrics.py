"""A process's connection to Kafka, as a scrape sees it."""

import asyncio

from prometheus_client import CollectorRegistry

from shared.bus import kafka, kafka_appender, kafka_client
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from tests.unit.shared.bus.brokers import Brokers, answer, news


async def never_answers(*_, **__):
    await asyncio.Event().wait()


async def test_records_on_their_way_and_records_behind_are_counted_by_topic(monkeypatch):
    brokers = Brokers()
    monkeypatch.setattr(kafka_client, "AIOKafkaClient", brokers.client)
    monkeypatch.setattr(kafka_appender, "started_client", never_answers)
    monkeypatch.setattr(kafka, "FLUSH_TIMEOUT_S", 0.01)
    registry = CollectorRegistry()
    bus = KafkaBus("nowhere:1", client_id="test")
    registry.register(BusMetrics(bus))
    value = registry.get_sample_value
    async with bus.producer() as producer, bus.reader("read", group="g") as reader:
        assert value("baton_bus_records_behind", {"topic": "read"}) == 0
        await reader.assign({0: 1, 1: 3, 2: 0})
        _, reply = await brokers.asked()
        reply.set_result(answer(news(0, end=3), news(1, end=3)))
        producer.post("written", 0, b"a")
        producer.post("written", 1, b"b")
        async with asyncio.timeout(5):
            while value("baton_bus_records_behind", {"topic": "read"}) != 2:
                await asyncio.sleep(0.001)
        assert value("baton_bus_records_buffered", {"topic": "written"}) == 2
        bus.counters.num_failed_appends = 7
        assert value("baton_bus_failed_appends_total") == 7
    assert value("baton_bus_records_behind", {"topic": "read"}) is None
    assert value("baton_bus_records_buffered", {"topic": "written"}) is None
