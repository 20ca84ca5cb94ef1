"""A real Redis with the users of infra/redis/users.acl, spoken to over TLS with certificates on both sides.

The server speaks TLS itself where it can (infra/redis/secure.conf); the packaged Valkey cannot, and gets a relay before
it that does, as many a Redis has in production.
"""

import asyncio
import random
import secrets
import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from infra.local.ports import PortPicker
from infra.local.probes import accepts_connections
from infra.local.process import ProcessSpec, running
from infra.local.redis import CONFIG, HOST, server_program
from shared.runtime.access import RedisAccess
from shared.runtime.settings import ServiceSettings
from tests.security.certificates import Authority

PASSWORD, OPERATOR_PASSWORD = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
OPERATOR = f"user operator on >{OPERATOR_PASSWORD} ~* &* +@all\n"


@dataclass(frozen=True)
class SecureRedis:
    """A running server."""

    url: str
    authority: Authority

    def access(self, user: str = "baton", password: str = PASSWORD, **changes: object) -> RedisAccess:
        """As a process of `user` reads it."""
        file = self.authority.folder / f"{secrets.token_hex(4)}.password"
        file.write_text(password + "\n")
        signed = self.authority.sign(user)
        given = {
            "model": Path("unused"),
            "redis": self.url,
            "redis_user": user,
            "redis_password_file": file,
            "redis_ca": self.authority.cert,
            "redis_cert": signed.cert,
            "redis_key": signed.key,
        }
        return ServiceSettings(**(given | changes)).redis_access()

    @property
    def operator(self) -> RedisAccess:
        return self.access("operator", OPERATOR_PASSWORD)


@asynccontextmanager
async def secure_redis(folder: Path) -> AsyncGenerator[SecureRedis]:
    """The server, empty."""
    ports = PortPicker(random.Random())
    port, inner_port = ports.pick(), ports.pick()
    authority = Authority(folder / "secrets")
    authority.sign("redis")
    users = (CONFIG.parent / "users.acl").read_text()
    digest = sha256(PASSWORD.encode()).hexdigest()
    (authority.folder / "users.acl").write_text(users.replace("@PASSWORD_SHA256@", digest) + OPERATOR)
    secure = (CONFIG.parent / "secure.conf").read_text()
    secure = secure.replace("@PORT@", str(port)).replace("@SECRETS@", str(authority.folder))
    has_tls = speaks_tls(authority)
    if not has_tls:
        secure = "\n".join(line for line in secure.splitlines() if not line.startswith(("tls-", "port ")))
        secure += f"\nport {inner_port}\n"
    config = folder / "redis.conf"
    config.write_text(f"{CONFIG.read_text()}\n{secure}\ndir {folder}\n")
    listening = port if has_tls else inner_port
    spec = ProcessSpec(
        name="redis",
        command=(server_program(), str(config)),
        address=f"{HOST}:{listening}",
        is_ready=lambda: accepts_connections(HOST, listening),
        ready_within_s=30,
    )
    async with running(spec, folder / "redis.log"):
        redis = SecureRedis(f"rediss://{HOST}:{port}/0", authority)
        if has_tls:
            yield redis
            return
        async with await asyncio.start_server(relay_to(inner_port), HOST, port, ssl=server_context(authority)):
            yield redis


def speaks_tls(authority: Authority) -> bool:
    """Whether the server program was built with TLS: one without ends at once."""
    files = [f"--tls-{name}-file" for name in ("cert", "key", "ca-cert")]
    paths = [authority.folder / "redis.crt", authority.folder / "redis.key", authority.cert]
    options = [str(part) for pair in zip(files, paths, strict=True) for part in pair]
    command = [server_program(), "--port", "0", "--tls-port", str(PortPicker(random.Random()).pick()), *options]
    try:
        return subprocess.run(command, capture_output=True, timeout=1, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return True


def server_context(authority: Authority) -> ssl.SSLContext:
    """As `secure.conf` has it: no stranger's certificate will do."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.cert)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(authority.folder / "redis.crt", authority.folder / "redis.key")
    return context


def relay_to(port: int):
    """Handler of connections that are passed on to a port of this host."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection(HOST, port)
        await asyncio.gather(copy(reader, their_writer), copy(their_reader, writer))

    return relay
