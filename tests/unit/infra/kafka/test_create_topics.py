import secrets

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from infra.kafka.create_topics import create_topics
from shared.errors import StartupError
from shared.wire.topics import TOPICS, Topic


async def config_of(address: str, topic: str, key: str) -> str:
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {key: None})])
        (resource,) = response.resources
        return resource[4][0][1]
    finally:
        await admin.close()


async def test_a_record_goes_through_a_new_topic_at_once(kafka_address):
    topic = Topic(f"new-{secrets.token_hex(4)}", 3)
    await create_topics(kafka_address, [topic])
    async with (
        AIOKafkaProducer(bootstrap_servers=kafka_address, acks="all") as producer,
        AIOKafkaConsumer(topic.name, bootstrap_servers=kafka_address, auto_offset_reset="earliest") as consumer,
    ):
        await producer.send_and_wait(topic.name, b"value", partition=2)
        record = await consumer.getone()
    assert (record.partition, record.value, record.timestamp_type) == (2, b"value", 1)


async def test_again_changes_settings_but_not_partitions(kafka_address):
    name = f"again-{secrets.token_hex(4)}"
    await create_topics(kafka_address, [Topic(name, 2, retention_ms=1_000_000)])
    await create_topics(kafka_address, [Topic(name, 2, retention_ms=2_000_000)])
    assert await config_of(kafka_address, name, "retention.ms") == "2000000"
    with pytest.raises(StartupError, match=f"topic {name} has 2 partitions, not 3"):
        await create_topics(kafka_address, [Topic(name, 3)])


async def test_all_topics_of_the_system_can_be_created_twice(kafka_address):
    await create_topics(kafka_address)
    await create_topics(kafka_address)
    assert await config_of(kafka_address, TOPICS[0].name, "message.timestamp.type") == "LogAppendTime"
