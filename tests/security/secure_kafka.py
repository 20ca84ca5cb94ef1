"""A real Kafka as infra/kafka/secure.properties describes it, with certificates and users of its own."""

import random
import secrets
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from infra.kafka.create_topics import create_topics
from infra.kafka.grant import grant
from infra.local.kafka import BASE_CONFIG, CLUSTER_ID, FOLDER, HOST, java_program, jvm_options, kafka_jars
from infra.local.ports import PortPicker
from infra.local.process import ProcessSpec, running
from shared.runtime.access import KafkaAccess
from shared.runtime.settings import KafkaSettings
from tests.security.certificates import Authority

SERVICES_PASSWORD, ADMIN_PASSWORD, APPLICATION_PASSWORD = (secrets.token_urlsafe(24) for _ in range(3))


@dataclass(frozen=True)
class SecureKafka:
    """A running broker.

    Attributes:
        address: where users prove by a password who they are.
        certified_address: where they do by a certificate.
        folder: for files.
    """

    address: str
    certified_address: str
    authority: Authority
    folder: Path

    def settings(self, user: str, password: str, *, mechanism: str = "SCRAM-SHA-512", **changes: object):
        """As a process of `user` reads them."""
        file = self.folder / f"{user}-{secrets.token_hex(4)}.password"
        file.write_text(password + "\n")
        given = {
            "kafka_security": "tls",
            "kafka_ca": self.authority.cert,
            "kafka_sasl_mechanism": mechanism,
            "kafka_sasl_user": user,
            "kafka_sasl_password_file": file,
        }
        return KafkaSettings(**(given | changes))

    @property
    def admin(self) -> KafkaAccess:
        return self.settings("admin", ADMIN_PASSWORD).kafka_access()

    @property
    def services(self) -> KafkaAccess:
        return self.settings("baton", SERVICES_PASSWORD).kafka_access()

    @property
    def application(self) -> KafkaAccess:
        return self.settings("application", APPLICATION_PASSWORD, mechanism="PLAIN").kafka_access()

    def certified(self, name: str) -> KafkaAccess:
        """`name` proves itself by a certificate, at `certified_address`."""
        signed = self.authority.sign(name)
        return KafkaSettings(
            kafka_security="tls", kafka_ca=self.authority.cert, kafka_cert=signed.cert, kafka_key=signed.key
        ).kafka_access()


@asynccontextmanager
async def secure_kafka(folder: Path) -> AsyncGenerator[SecureKafka]:
    """The broker, with Baton's topics and the rights of its users."""
    ports = PortPicker(random.Random())
    clients_port, certified_port, controller_port = (ports.pick() for _ in range(3))
    authority = Authority(folder / "secrets")
    broker = authority.sign("broker")
    (authority.folder / "broker.pem").write_text(broker.key.read_text() + broker.cert.read_text())
    text = (FOLDER / "secure.properties").read_text()
    for name, value in {
        "HOST": HOST,
        "CLIENTS_PORT": clients_port,
        "CERTIFIED_PORT": certified_port,
        "CONTROLLER_PORT": controller_port,
        "SECRETS": authority.folder,
        "APPLICATION_PASSWORD": APPLICATION_PASSWORD,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    config = folder / "server.properties"
    config.write_text(f"{BASE_CONFIG.read_text()}\n{text}\nlog.dirs={folder / 'log'}\n")
    kafka = SecureKafka(f"{HOST}:{clients_port}", f"{HOST}:{certified_port}", authority, folder)
    java = (java_program(), *jvm_options(), "-cp", f"{kafka_jars()}/*")
    users = [
        argument
        for user, password in (("admin", ADMIN_PASSWORD), ("baton", SERVICES_PASSWORD))
        for argument in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password}]")
    ]
    formatting = [*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(config), *users]
    done = subprocess.run(formatting, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout

    async def is_ready() -> bool:
        client = AIOKafkaClient(bootstrap_servers=kafka.address, **kafka.admin.client_options())
        try:
            await client.bootstrap()
            return bool(client.cluster.brokers())
        except (KafkaError, OSError):
            return False
        finally:
            await client.close()

    spec = ProcessSpec(
        name="kafka",
        command=(*java, "kafka.Kafka", str(config)),
        address=kafka.address,
        is_ready=is_ready,
        ready_within_s=90,
        stop_within_s=20,
    )
    async with running(spec, folder / "kafka.log"):
        await grant(kafka.address, "deploy", "User:deploy", kafka.admin)
        await grant(kafka.address, "services", "User:baton", kafka.admin)
        await grant(kafka.address, "application", "User:application", kafka.admin)
        await create_topics(kafka.address, access=kafka.admin)
        yield kafka
