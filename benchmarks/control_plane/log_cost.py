"""What the log itself costs: the bare hop from append to read, and what a load left in it."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.control_plane.samples import Distribution, distribution_ms
from infra.kafka.create_topics import create_topics
from shared.bus.kafka import KafkaBus
from shared.bus.port import Bus, Start
from shared.wire.topics import TOPICS, Topic

HOP_TOPIC = Topic("control-plane-hop", 1)
NUM_HOPS = 500
NUM_WARM_HOPS = 20
HOP_BYTES = 256

READ_TIMEOUT_S = 1.0

GROUP = "control-plane"

Ends = dict[str, dict[int, int]]
"""End offsets by topic and partition."""


async def raw_hop(kafka_address: str, *, num_copies: int = 1) -> dict[str, Distribution | None]:
    """Records sent one after another by one producer and read by one reader, through the bus that services use."""
    await create_topics(kafka_address, [HOP_TOPIC], replication_factor=num_copies)
    bus = KafkaBus(kafka_address, client_id="control-plane")
    acked_s: list[float] = []
    read_s: list[float] = []
    async with bus.producer() as producer, bus.reader(HOP_TOPIC.name, group=GROUP) as reader:
        await reader.assign({0: Start.END})
        for place in range(NUM_WARM_HOPS + NUM_HOPS):
            started_s = time.perf_counter()
            producer.post(HOP_TOPIC.name, 0, bytes(HOP_BYTES))
            while not await reader.read(READ_TIMEOUT_S):
                pass
            if place >= NUM_WARM_HOPS:
                read_s.append(time.perf_counter() - started_s)
        for _ in range(NUM_HOPS):
            started_s = time.perf_counter()
            await producer.send(HOP_TOPIC.name, 0, bytes(HOP_BYTES))
            acked_s.append(time.perf_counter() - started_s)
    return {"append_to_read_ms": distribution_ms(read_s), "append_to_ack_ms": distribution_ms(acked_s)}


async def end_offsets(bus: Bus) -> Ends:
    """Where every topic of the path ends now."""
    ends: Ends = {}
    for topic in TOPICS:
        async with bus.reader(topic.name, group=GROUP) as reader:
            ends[topic.name] = {place: await reader.end_offset(place) for place in range(topic.num_partitions)}
    return ends


@dataclass(frozen=True, slots=True)
class Volume:
    """What was appended to one topic."""

    records: int
    value_bytes: int


async def volumes(bus: Bus, before: Ends, after: Ends) -> dict[str, Volume]:
    """Reads back all that was appended to each topic between two looks at its end."""
    return {topic: await _volume(bus, topic, before[topic], after[topic]) for topic in after}


async def _volume(bus: Bus, topic: str, before: Mapping[int, int], after: Mapping[int, int]) -> Volume:
    positions = {place: before[place] for place in after if after[place] > before[place]}
    records = value_bytes = 0
    if positions:
        async with bus.reader(topic, group=GROUP) as reader:
            await reader.assign(dict(positions))
            while any(position < after[place] for place, position in positions.items()):
                for record in await reader.read(READ_TIMEOUT_S):
                    if record.offset < after[record.partition]:
                        records += 1
                        value_bytes += len(record.value)
                    positions[record.partition] = record.offset + 1
    return Volume(records, value_bytes)


def per_token(found: Mapping[str, Volume], num_tokens: int) -> dict[str, dict[str, float]]:
    """Records and value bytes for each output token, by topic and in all."""
    whole = _sum(found.values())
    return {
        name: {
            "records": volume.records,
            "records_per_token": round(volume.records / num_tokens, 4),
            "bytes_per_token": round(volume.value_bytes / num_tokens, 1),
        }
        for name, volume in {**found, "all": whole}.items()
        if volume.records
    }


def _sum(parts: Iterable[Volume]) -> Volume:
    parts = list(parts)
    return Volume(sum(part.records for part in parts), sum(part.value_bytes for part in parts))
