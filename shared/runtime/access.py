"""How this process proves to Kafka and Redis who it is, and knows them for who they are.

Everything is read from files once, at the start: renewed certificates and passwords count from the next start on.
A password never shows: not in a repr, an error, a log or at `/health`.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from shared.errors import StartupError

OLDEST_TLS = ssl.TLSVersion.TLSv1_2


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files.

    Attributes:
        ca: who may have signed the other side's certificate; None: the authorities that this machine trusts.
        cert, key: our own certificate with its chain, and its key; both or neither.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __bool__(self) -> bool:
        return any((self.ca, self.cert, self.key))

    def context(self) -> ssl.SSLContext:
        """For a client that checks the server's certificate and its name. Raises StartupError."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = OLDEST_TLS
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ValueError) as error:
            raise StartupError(f"certificates {_named(self)}: {error}") from error
        return context


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and how it proves that it is."""

    user: str
    password: SecretStr


@dataclass(frozen=True, slots=True)
class KafkaAccess:
    """How the brokers are spoken to.

    Attributes:
        tls: None: in plain text, for a network that nobody else is in.
        mechanism: of SASL, where there are credentials.
    """

    tls: ssl.SSLContext | None = None
    mechanism: str = ""
    credentials: Credentials | None = None

    def client_options(self) -> dict[str, Any]:
        """Arguments of every client of aiokafka."""
        if self.tls is None:
            return {}
        if self.credentials is None:
            return {"security_protocol": "SSL", "ssl_context": self.tls}
        return {
            "security_protocol": "SASL_SSL",
            "ssl_context": self.tls,
            "sasl_mechanism": self.mechanism,
            "sasl_plain_username": self.credentials.user,
            "sasl_plain_password": self.credentials.password.get_secret_value(),
        }


PLAIN_KAFKA = KafkaAccess()


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """What goes with the URL; TLS is spoken if that begins with rediss."""

    certificates: Certificates = Certificates()
    credentials: Credentials | None = None


OPEN_REDIS = RedisAccess()


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """PEM files of a server: its certificate with its chain, and its key."""

    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Raises StartupError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = OLDEST_TLS
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ValueError) as error:
            raise StartupError(f"certificate {self.cert}, {self.key}: {error}") from error
        return context


def read_secret(path: Path) -> SecretStr:
    """The file's text without the line end that editors put behind it. Raises StartupError, which never shows it."""
    try:
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"secret file {path}: {type(error).__name__}") from None
    if not secret:
        raise StartupError(f"secret file {path} is empty")
    return SecretStr(secret)


def _no_password() -> str:
    """Asked for by an encrypted key; without this OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted: give one that is not, in a file that only this user reads")


def _named(certificates: Certificates) -> str:
    return ", ".join(str(path) for path in (certificates.ca, certificates.cert, certificates.key) if path is not None)
