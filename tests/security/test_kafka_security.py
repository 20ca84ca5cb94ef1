"""Kafka over TLS with users: who is let in, who is not and says why, and what an application may do."""

import asyncio
import os
import sys
from dataclasses import replace
from uuid import uuid4

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import TopicAuthorizationFailedError
from pydantic import SecretStr

from infra.kafka.create_topics import create_topics
from infra.kafka.grant import ROLES, grant
from loadgen.kafka_client import open_kafka
from shared.bus.kafka import KafkaBus
from shared.bus.port import Committed
from shared.errors import StartupError
from shared.runtime.access import PLAIN_KAFKA
from shared.wire.topics import INGEST, RESULTS, STREAM_OUT, TOPICS
from tests.contract.bus_worlds import drain, values
from tests.security.certificates import Authority
from tests.security.secure_kafka import SERVICES_PASSWORD, SecureKafka, secure_kafka

pytestmark = pytest.mark.asyncio(loop_scope="session")

TIMEOUT_S = 30


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kafka(tmp_path_factory):
    async with secure_kafka(tmp_path_factory.mktemp("secure-kafka")) as running:
        yield running


def bus(kafka: SecureKafka, access, address: str | None = None) -> KafkaBus:
    return KafkaBus(address or kafka.address, client_id="test", access=access)


async def write_and_read(bus: KafkaBus, topic: str, value: bytes) -> None:
    """What the bus writes it reads, and its offsets are kept."""
    async with bus.reader(topic, group="security") as reader, bus.producer() as producer, asyncio.timeout(TIMEOUT_S):
        end = await reader.end_offset(3)
        await reader.assign({3: end})
        assert await producer.send(topic, 3, value) == end
        assert values(await drain(reader, 1)) == [value]
        await reader.commit({3: Committed(end + 1)})
        assert await reader.committed(3) == Committed(end + 1)


async def test_services_are_let_in_by_their_password(kafka):
    services = bus(kafka, kafka.services)
    await services.check_access()
    assert await services.reachable()
    await write_and_read(services, STREAM_OUT.name, b"in secret")


async def test_a_certificate_does_as_well(kafka):
    access = kafka.certified("worker")
    await grant(kafka.address, "services", "User:CN=worker", kafka.admin)
    certified = bus(kafka, access, kafka.certified_address)
    await certified.check_access()
    await write_and_read(certified, STREAM_OUT.name, b"signed")


async def test_topics_are_made_by_who_may_no_more_than_that(kafka):
    access = kafka.certified("deploy")
    await grant(kafka.address, "deploy", "User:CN=deploy", kafka.admin)
    await create_topics(kafka.certified_address, access=access)
    options = {"bootstrap_servers": kafka.certified_address, **access.client_options()}
    async with AIOKafkaProducer(**options) as producer:
        with pytest.raises(TopicAuthorizationFailedError):
            await producer.send_and_wait(INGEST.name, b"{}", partition=0)


async def test_brokers_that_somebody_else_signed_are_not_spoken_to(kafka, tmp_path):
    settings = kafka.settings("baton", SERVICES_PASSWORD, kafka_ca=Authority(tmp_path, "somebody else").cert)
    access = settings.kafka_access()
    with pytest.raises(StartupError, match="certificate verify failed"):
        await bus(kafka, access).check_access()
    assert not await bus(kafka, access).reachable()


async def test_brokers_of_another_name_are_not_spoken_to(kafka):
    elsewhere = kafka.address.replace("127.0.0.1", "127.0.0.2")
    proxy = await asyncio.start_server(relay_to(kafka.address), *elsewhere.split(":"))
    async with proxy:
        with pytest.raises(StartupError, match="IP address mismatch"):
            await bus(kafka, kafka.services, elsewhere).check_access()


def relay_to(address):
    """Somebody in between, who has no certificate of his own and passes on what he gets."""

    async def copy(reader, writer):
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def relay(reader, writer):
        host, port = address.split(":")
        their_reader, their_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, their_writer), copy(their_reader, writer), return_exceptions=True)

    return relay


@pytest.mark.parametrize(
    ("user", "password", "mechanism"),
    [
        ("baton", "a guess", "SCRAM-SHA-512"),
        ("nobody", SERVICES_PASSWORD, "SCRAM-SHA-512"),
        ("application", "a guess", "PLAIN"),
        ("baton", SERVICES_PASSWORD, "SCRAM-SHA-256"),  # not spoken by this broker
    ],
)
async def test_a_wrong_password_is_refused_and_not_shown(kafka, user, password, mechanism):
    access = kafka.settings(user, password, mechanism=mechanism).kafka_access()
    with pytest.raises(StartupError) as refused:
        await bus(kafka, access).check_access()
    assert any(word in str(refused.value) for word in ("Authentication", "sasl mechanism", "SaslMechanism"))
    assert password not in str(refused.value)
    assert not await bus(kafka, access).reachable()


async def test_who_speaks_in_plain_text_gets_nothing(kafka):
    assert not await bus(kafka, PLAIN_KAFKA).reachable()


async def test_who_has_no_certificate_gets_nothing_where_one_is_asked_for(kafka):
    access = replace(kafka.services, credentials=None)
    assert not await bus(kafka, access, kafka.certified_address).reachable()


async def test_a_broker_that_is_away_is_waited_for(kafka):
    await bus(kafka, kafka.services, "127.0.0.1:1").check_access()


async def test_a_service_that_is_refused_ends_with_one_line_that_says_why(kafka, tmp_path):
    """And its password stands nowhere in what it says."""
    password = tmp_path / "password"
    password.write_text("swordfish-of-baton")
    env = {
        "BATON_KAFKA": kafka.address,
        "BATON_KAFKA_SECURITY": "tls",
        "BATON_KAFKA_CA": str(kafka.authority.cert),
        "BATON_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "BATON_KAFKA_SASL_USER": "baton",
        "BATON_KAFKA_SASL_PASSWORD_FILE": str(password),
        "BATON_MODEL": str(tmp_path),
        "BATON_LOG_LEVEL": "debug",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.ingest"),
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert "do not come together" in output
    assert "Authentication" in output
    assert "Traceback" not in output
    assert "swordfish" not in output


async def test_an_application_may_write_jobs_and_read_results_and_nothing_else(kafka):
    options = {"bootstrap_servers": kafka.address, **kafka.application.client_options()}
    async with AIOKafkaProducer(**options, acks="all") as producer, asyncio.timeout(TIMEOUT_S):
        await producer.send_and_wait(INGEST.name, b"{}", key=uuid4().hex.encode(), partition=0)
        for topic in set(TOPICS) - {INGEST}:
            with pytest.raises(TopicAuthorizationFailedError):
                await producer.send_and_wait(topic.name, b"forged", partition=0)
    async with AIOKafkaConsumer(**options, auto_offset_reset="earliest") as consumer, asyncio.timeout(TIMEOUT_S):
        assert await consumer.topics() == {INGEST.name, RESULTS.name}
        consumer.assign([TopicPartition(RESULTS.name, 0)])
        assert await consumer.getmany(timeout_ms=500) == {}
        consumer.assign([TopicPartition(INGEST.name, 0)])  # other applications' prompts
        with pytest.raises(TopicAuthorizationFailedError):
            await consumer.getmany(timeout_ms=10_000)


async def test_loadgen_is_an_application(kafka):
    async with open_kafka(kafka.address, {}, asyncio.get_running_loop().time, kafka.application) as transport:
        assert transport is not None


async def test_rights_are_given_to_roles(kafka):
    for wrong in (("king", "User:baton"), ("services", "baton")):
        with pytest.raises(StartupError, match=r"deploy, services, application.*User:name"):
            await grant(kafka.address, *wrong, kafka.admin)
    assert {right.operation.name for right in ROLES["application"]} == {"WRITE", "READ"}


async def test_nothing_that_holds_a_password_shows_it(kafka):
    access = kafka.services
    assert isinstance(access.credentials.password, SecretStr)
    shown = f"{access!r} {access} {bus(kafka, access)!r} {kafka.settings('baton', SERVICES_PASSWORD)!r}"
    assert SERVICES_PASSWORD not in shown
