"""What a client of the log that fails in an unforeseen way costs: one try, not the sender."""

from types import SimpleNamespace

import pytest
import structlog

from shared.bus import kafka_client
from shared.bus.kafka import KafkaAppender
from shared.bus.kafka_client import BusCounters
from shared.bus.sending import AppendFailed

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


async def nothing():
    pass


async def fail():
    raise AssertionError("inside the library")


def a_broken_client(**_):
    return SimpleNamespace(bootstrap=fail, close=nothing)


async def test_an_append_whose_connection_fails_is_an_append_that_failed(monkeypatch):
    monkeypatch.setattr(kafka_client, "AIOKafkaClient", a_broken_client)
    appender = KafkaAppender("nowhere:1", "test", SILENT, BusCounters())
    with pytest.raises(AppendFailed, match="inside the library"):
        await appender.append("topic", 0, ())
