"""Gives a user of Kafka the rights of its role: `python -m infra.kafka.grant HOST:PORT ROLE PRINCIPAL`.

Safe to repeat. It is run by a super user of the broker, and only where the broker has an authorizer: see
`infra/kafka/secure.properties`. BATON_KAFKA_* variables say how the brokers are spoken to.

Roles: deploy creates topics; services is Baton's own processes; application writes jobs and reads results.
"""
# pyright: reportMissingTypeStubs=false

import asyncio
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import CreateAclsRequest

from shared.errors import StartupError
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess
from shared.runtime.settings import KafkaSettings
from shared.wire.topics import INGEST, RESULTS, TOPICS


class Resource(IntEnum):
    """Numbers of Kafka's protocol."""

    TOPIC = 2
    GROUP = 3
    CLUSTER = 4


class Operation(IntEnum):
    """Numbers of Kafka's protocol. Whoever may read or write a topic may also see where its leaders are."""

    READ = 3
    WRITE = 4
    CREATE = 5
    DESCRIBE = 8
    DESCRIBE_CONFIGS = 10
    ALTER_CONFIGS = 11


LITERAL, ALLOW, ANY_HOST, ANY_NAME, CLUSTER_NAME = 3, 3, "*", "*", "kafka-cluster"


@dataclass(frozen=True, slots=True)
class Right:
    """What may be done to what."""

    resource: Resource
    name: str
    operation: Operation


ROLES: dict[str, tuple[Right, ...]] = {
    "deploy": (
        Right(Resource.CLUSTER, CLUSTER_NAME, Operation.CREATE),
        *(
            Right(Resource.TOPIC, topic.name, operation)
            for topic in TOPICS
            for operation in (Operation.DESCRIBE, Operation.DESCRIBE_CONFIGS, Operation.ALTER_CONFIGS)
        ),
    ),
    "services": (
        Right(Resource.GROUP, ANY_NAME, Operation.READ),  # of the groups under which they keep their offsets
        *(
            Right(Resource.TOPIC, topic.name, operation)
            for topic in TOPICS
            for operation in (Operation.READ, Operation.WRITE)
        ),
    ),
    "application": (
        Right(Resource.TOPIC, INGEST.name, Operation.WRITE),
        Right(Resource.TOPIC, RESULTS.name, Operation.READ),
    ),
}


async def grant(address: str, role: str, principal: str, access: KafkaAccess = PLAIN_KAFKA) -> None:
    """Give `principal` ("User:name") the rights of `role`.

    Raises:
        StartupError: there is no such role, or no such kind of principal.
        aiokafka.errors.KafkaError: the broker refused.
    """
    if role not in ROLES or not principal.startswith("User:"):
        raise StartupError(f"grant to one of {', '.join(ROLES)}, and to a principal as User:name")
    client: Any = AIOKafkaClient(bootstrap_servers=address, **access.client_options())
    try:
        await client.bootstrap()
        for right in ROLES[role]:
            await _create(client, right, principal)
    finally:
        await client.close()


async def _create(client: Any, right: Right, principal: str) -> None:
    request = CreateAclsRequest(right.resource, right.name, LITERAL, principal, ANY_HOST, right.operation, ALLOW)
    response = await client.send(client.get_random_node(), request)  # any broker hands it to the controller
    for code, reason in response.creation_responses:
        if code != 0:
            raise for_code(code)(f"{right}: {reason}")


def main() -> None:
    """Command line."""
    try:
        address, role, principal = sys.argv[1:]
    except ValueError:
        raise SystemExit(__doc__) from None
    asyncio.run(grant(address, role, principal, KafkaSettings.read().kafka_access()))


if __name__ == "__main__":
    main()
