"""All that stands on the topics, read when a run is over."""

import asyncio

from shared.bus.kafka import KafkaBus
from shared.wire.topics import DEAD_LETTER, INGEST, INGEST_RESUME, RESULTS, STREAM_OUT
from tests.faults.topics import read_topic

READ_WITHIN_S = 60.0
TOPICS = (INGEST, INGEST_RESUME, STREAM_OUT, RESULTS, DEAD_LETTER)


async def read_topics(address, topics=TOPICS):
    """By the topic's name its records, each partition in its order."""
    bus = KafkaBus(address, client_id="history")
    async with asyncio.timeout(READ_WITHIN_S * len(topics)):
        return {topic.name: await read_topic(bus, topic) for topic in topics}
