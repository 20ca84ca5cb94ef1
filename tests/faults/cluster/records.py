"""All that stands on the topics, read when a run is over."""

import asyncio

from shared.bus.kafka import KafkaBus
from shared.bus.port import Start
from shared.wire.topics import DEAD_LETTER, INGEST, INGEST_RESUME, RESULTS, STREAM_OUT

READ_WITHIN_S = 60.0
TOPICS = (INGEST, INGEST_RESUME, STREAM_OUT, RESULTS, DEAD_LETTER)


async def read_topics(address, topics=TOPICS):
    """By the topic's name its records, each partition in its order."""
    bus = KafkaBus(address, client_id="history")
    return {topic.name: await _read_topic(bus, topic) for topic in topics}


async def _read_topic(bus, topic):
    partitions = range(topic.num_partitions)
    async with asyncio.timeout(READ_WITHIN_S), bus.reader(topic.name, group="history") as reader:
        ends = {partition: await reader.end_offset(partition) for partition in partitions}
        await reader.assign(dict.fromkeys(partitions, Start.BEGINNING))
        behind = {partition for partition, end in ends.items() if end > 0}
        records = []
        while behind:
            for record in await reader.read(1.0):
                if record.offset < ends[record.partition]:
                    records.append(record)
                if record.offset + 1 >= ends[record.partition]:
                    behind.discard(record.partition)
        return records
