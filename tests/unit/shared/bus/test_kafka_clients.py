"""What a client of the log that fails in an unforeseen way costs: one try, not the sender or the reader."""

import asyncio
from types import SimpleNamespace

import pytest
import structlog

from shared.bus import kafka_appender, kafka_reader
from shared.bus.kafka import KafkaAppender
from shared.bus.kafka_client import BusCounters
from shared.bus.kafka_reader import KafkaReader
from shared.bus.sending import AppendFailed

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


async def nothing():
    pass


async def fail():
    raise AssertionError("inside the library")


def a_broken_client(**_):
    return SimpleNamespace(bootstrap=fail, close=nothing)


async def test_an_append_whose_connection_fails_is_an_append_that_failed(monkeypatch):
    monkeypatch.setattr(kafka_appender, "AIOKafkaClient", a_broken_client)
    appender = KafkaAppender("nowhere:1", "test", SILENT, BusCounters())
    with pytest.raises(AppendFailed, match="inside the library"):
        await appender.append("topic", 0, ())


async def test_a_reader_whose_connection_fails_tries_again(monkeypatch):
    num_tries = 0

    def a_broken_consumer(**_):
        nonlocal num_tries
        num_tries += 1
        return SimpleNamespace(start=fail, stop=nothing, _client=SimpleNamespace(close=nothing))

    monkeypatch.setattr(kafka_reader, "AIOKafkaConsumer", a_broken_consumer)
    monkeypatch.setattr(kafka_reader, "RECONNECT_BACKOFF_S", 0.001)
    reader = KafkaReader("nowhere:1", "test", "topic", "group", SILENT, BusCounters())
    keeper = asyncio.create_task(reader.keep_connected())
    async with asyncio.timeout(5):
        while num_tries < 3:
            await asyncio.sleep(0.001)
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
