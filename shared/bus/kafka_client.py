"""What the writing and the reading side of the log on Kafka share: an aiokafka client and its end."""
# pyright: reportMissingTypeStubs=false

import asyncio
import ssl
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition, conn
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from shared.errors import StartupError
from shared.observe.log import Logger
from shared.runtime.access import PLAIN_KAFKA, KafkaAccess

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
RETRY_BACKOFF_MS = 50

REFUSED = (
    ssl.SSLError,
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
"""What another try with the same settings does not mend."""


@dataclass(slots=True)
class BusCounters:
    """What went wrong with the log and was mended, since the start of the process."""

    num_failed_appends: int = 0
    num_producers_replaced: int = 0
    num_consumers_replaced: int = 0


async def check_access(address: str, client_id: str, access: KafkaAccess) -> None:
    """Return if a broker of `address` lets us in, or if none answers: that may change.

    Raises StartupError if one does not trust us, or we do not trust it.
    """
    untyped: Any = conn
    for host, port, _ in untyped.collect_hosts(address):
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection: Any = await untyped.create_conn(host, port, client_id=client_id, **access.client_options())
        except REFUSED as error:
            raise StartupError(f"Kafka at {host}:{port} and this process do not come together: {error!r}") from error
        except (KafkaError, OSError, TimeoutError):
            continue
        connection.close()
        return


async def started_client(
    address: str, client_id: str, *, request_timeout_ms: int, log: Logger, access: KafkaAccess = PLAIN_KAFKA
) -> Any:
    """A client that has found the brokers. Raises what aiokafka raises, which may be anything: it also asserts."""
    client: Any = AIOKafkaClient(
        bootstrap_servers=address,
        client_id=client_id,
        request_timeout_ms=request_timeout_ms,
        retry_backoff_ms=RETRY_BACKOFF_MS,
        **access.client_options(),
    )
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.bootstrap()
    except BaseException:
        await closed(client.close(), log)
        raise
    return client


async def leader_of(client: Any, place: TopicPartition) -> int:
    """The broker that takes appends to the partition; asked for until it is known."""
    leader: int | None = client.cluster.leader_for_partition(place)
    if leader is None or leader < 0:
        client.add_topic(place.topic)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while (leader := client.cluster.leader_for_partition(place)) is None or leader < 0:
                await client.force_metadata_update()
                await asyncio.sleep(RETRY_BACKOFF_MS / 1000)
    return leader


async def closed(closing: Coroutine[Any, Any, None], log: Logger) -> None:
    """Wait for the end of something that may be broken already, in bounds.

    In a task of its own, because aiokafka's stop() can end in the CancelledError of one of its inner tasks, which must
    not pass for ours.
    """
    task = asyncio.create_task(closing)
    done, _ = await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    error = task.exception() if task.done() and not task.cancelled() else None
    if error is not None or not done:
        log.warning("not closed cleanly", what=repr(closing), in_time=bool(done), error=repr(error))
