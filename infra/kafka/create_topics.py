"""Creates the topics at deploy: `python -m infra.kafka.create_topics HOST:PORT [REPLICATION]`. Safe to repeat.

With three copies an append is acknowledged when two brokers have it: one may be lost, and nothing stops meanwhile.

BATON_KAFKA_* variables say how the brokers are spoken to, as for the services.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaTimeoutError, TopicAlreadyExistsError, for_code

from shared.errors import StartupError
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess
from shared.runtime.settings import KafkaSettings
from shared.wire.topics import TOPICS, Topic

LEADERS_WITHIN_S = 60.0
LOOK_INTERVAL_S = 0.1


async def create_topics(
    address: str,
    topics: Sequence[Topic] = TOPICS,
    *,
    replication_factor: int = 1,
    access: KafkaAccess = PLAIN_KAFKA,
) -> None:
    """Creates what is missing, sets the settings of all, returns when every partition has a leader that serves it.

    Raises:
        StartupError: a topic exists with another number of partitions, or a partition is not served in time.
        aiokafka.errors.KafkaError: the broker refused.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=address, **access.client_options())
    await admin.start()
    try:
        await _create(admin, topics, replication_factor)
        await _until_led(admin, topics)
        await _apply_settings(admin, topics)
    finally:
        await admin.close()
    await _until_served(address, topics, access)


async def _create(admin: AIOKafkaAdminClient, topics: Sequence[Topic], replication_factor: int) -> None:
    existing = set(await admin.list_topics())
    missing = [topic for topic in topics if topic.name not in existing]
    response: Any = await admin.create_topics(
        [
            NewTopic(topic.name, topic.num_partitions, replication_factor, topic_configs=topic.config)
            for topic in missing
        ]
    )
    for name, code, reason in response.topic_errors:
        if code not in (0, TopicAlreadyExistsError.errno):
            raise for_code(code)(f"topic {name}: {reason}")


async def _apply_settings(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> None:
    described = {found["topic"]: found for found in await admin.describe_topics([topic.name for topic in topics])}
    resources = [
        ConfigResource(
            ConfigResourceType.TOPIC,
            topic.name,
            topic.config | {"min.insync.replicas": str(_min_in_sync(described[topic.name]))},
        )
        for topic in topics
    ]
    responses: list[Any] = await admin.alter_configs(resources)
    for code, reason, _, name in responses[0].resources:
        if code != 0:
            raise for_code(code)(f"settings of topic {name}: {reason}")


def _min_in_sync(described: dict[str, Any]) -> int:
    """All copies of the topic, as it was created, but one."""
    num_copies = min((len(partition["replicas"]) for partition in described["partitions"]), default=1)
    return max(1, num_copies - 1)


async def _until_led(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> None:
    deadline = time.monotonic() + LEADERS_WITHIN_S
    while leaderless := await _leaderless(admin, topics):
        if time.monotonic() > deadline:
            raise StartupError(f"partitions without a leader after {LEADERS_WITHIN_S:g} s: {', '.join(leaderless)}")
        await asyncio.sleep(LOOK_INTERVAL_S)


async def _leaderless(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> list[str]:
    described = {found["topic"]: found for found in await admin.describe_topics([topic.name for topic in topics])}
    leaderless: list[str] = []
    for topic in topics:
        found = described[topic.name]
        partitions = found["partitions"]
        if found["error_code"] != 0 or not partitions:
            leaderless.append(topic.name)
        elif len(partitions) != topic.num_partitions:
            raise StartupError(f"topic {topic.name} has {len(partitions)} partitions, not {topic.num_partitions}")
        else:
            leaderless += [f"{topic.name}-{p['partition']}" for p in partitions if p["leader"] < 0 or p["error_code"]]
    return leaderless


async def _until_served(address: str, topics: Sequence[Topic], access: KafkaAccess) -> None:
    """Returns when every leader knows that it leads; for a moment after a creation only the controller does."""
    partitions = [TopicPartition(topic.name, n) for topic in topics for n in range(topic.num_partitions)]
    async with AIOKafkaConsumer(bootstrap_servers=address, **access.client_options()) as consumer:
        try:
            async with asyncio.timeout(LEADERS_WITHIN_S):
                await consumer.end_offsets(partitions)
        except (TimeoutError, KafkaTimeoutError) as error:
            raise StartupError(f"some partitions are not served after {LEADERS_WITHIN_S:g} s") from error


def main() -> None:
    """Command line."""
    address, *rest = sys.argv[1:]
    access = KafkaSettings.read().kafka_access()
    asyncio.run(create_topics(address, replication_factor=int(rest[0]) if rest else 1, access=access))


if __name__ == "__main__":
    main()
