"""Settings that every service shares, read from the environment (`BATON_*`)."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import StartupError
from shared.runtime.access import Certificates, Credentials, KafkaAccess, RedisAccess, read_secret


class EnvironmentSettings(BaseSettings):
    """BATON_* variables; an empty one counts as not set."""

    model_config = SettingsConfigDict(
        env_prefix="BATON_",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    @classmethod
    def read(cls) -> Self:
        """Read the environment. Raises StartupError, naming the variable that is missing or wrong."""
        try:
            return cls()  # the environment gives the rest
        except ValidationError as error:
            raise StartupError("; ".join(_problem(each["loc"], each["msg"]) for each in error.errors())) from None


class KafkaSettings(EnvironmentSettings):
    """How Kafka is spoken to, by services and tools alike.

    Attributes:
        kafka_security: "plaintext", or "tls".
        kafka_ca: PEM file of the authorities that sign the brokers' certificates; this machine's own if not set.
        kafka_cert, kafka_key: PEM files with which this process proves who it is, where brokers ask for that.
        kafka_sasl_mechanism, kafka_sasl_user, kafka_sasl_password_file: the same by a password, over TLS only.
    """

    kafka_security: Literal["plaintext", "tls"] = "plaintext"
    kafka_ca: Path | None = None
    kafka_cert: Path | None = None
    kafka_key: Path | None = None
    kafka_sasl_mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] | None = None
    kafka_sasl_user: str | None = None
    kafka_sasl_password_file: Path | None = None

    def kafka_access(self) -> KafkaAccess:
        """Read the files. Raises StartupError."""
        if self.kafka_security == "plaintext":
            return KafkaAccess()
        tls = self._kafka_certificates.context()
        if self.kafka_sasl_mechanism is None or self.kafka_sasl_user is None or self.kafka_sasl_password_file is None:
            return KafkaAccess(tls)
        credentials = Credentials(self.kafka_sasl_user, read_secret(self.kafka_sasl_password_file))
        return KafkaAccess(tls, self.kafka_sasl_mechanism, credentials)

    @property
    def _kafka_certificates(self) -> Certificates:
        return Certificates(self.kafka_ca, self.kafka_cert, self.kafka_key)

    @model_validator(mode="after")
    def _refuse_half_a_way_to_kafka(self) -> Self:
        sasl = (self.kafka_sasl_mechanism, self.kafka_sasl_user, self.kafka_sasl_password_file)
        _both_or_neither("KAFKA", self.kafka_cert, self.kafka_key)
        if any(each is not None for each in sasl) and None in sasl:
            raise ValueError("BATON_KAFKA_SASL_MECHANISM, _USER and _PASSWORD_FILE go together")
        if self.kafka_security == "plaintext" and (self._kafka_certificates or sasl[0] is not None):
            raise ValueError("certificates and passwords for Kafka need BATON_KAFKA_SECURITY=tls")
        return self


class ServiceSettings(KafkaSettings):
    """Where the outside systems are, and where this process answers.

    Attributes:
        kafka: bootstrap address, "host:port", or several with commas between.
        redis: URL, "redis://host:port/database"; with "rediss" TLS is spoken.
        redis_user, redis_password_file: of an ACL user; the password alone is that of the default user.
        redis_ca, redis_cert, redis_key: PEM files, as those for Kafka.
        model: the model's folder (Hugging Face layout).
        model_name: what clients call it; the folder's name if not set.
        http_host, http_port: health and metrics, for the edge also the API.
    """

    kafka: str = "127.0.0.1:9092"
    redis: str = "redis://127.0.0.1:6379"
    redis_user: str | None = None
    redis_password_file: Path | None = None
    redis_ca: Path | None = None
    redis_cert: Path | None = None
    redis_key: Path | None = None
    model: Path
    model_name: str = ""
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    @property
    def served_model(self) -> str:
        return self.model_name or self.model.resolve().name

    def redis_access(self) -> RedisAccess:
        """Read the files. Raises StartupError."""
        certificates = Certificates(self.redis_ca, self.redis_cert, self.redis_key)
        if self.redis.startswith("rediss:"):
            certificates.context()  # what is wrong with a file is said now, not at each connection
        if self.redis_password_file is None:
            return RedisAccess(certificates)
        return RedisAccess(
            certificates, Credentials(self.redis_user or "default", read_secret(self.redis_password_file))
        )

    @field_validator("redis")
    @classmethod
    def _address_and_nothing_more(cls, url: str) -> str:
        """A URL is logged and shown, and what may stand behind a question mark can turn the checks of TLS off."""
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError("it is redis://host:port/database, or rediss:// for TLS")
        if "@" in parts.netloc or parts.query:
            raise ValueError("no user, password or options in the URL; see BATON_REDIS_USER and _PASSWORD_FILE")
        return url

    @model_validator(mode="after")
    def _refuse_half_a_way_to_redis(self) -> Self:
        _both_or_neither("REDIS", self.redis_cert, self.redis_key)
        if self.redis_user is not None and self.redis_password_file is None:
            raise ValueError("BATON_REDIS_USER needs BATON_REDIS_PASSWORD_FILE")
        if Certificates(self.redis_ca, self.redis_cert, self.redis_key) and not self.redis.startswith("rediss:"):
            raise ValueError("certificates for Redis need a BATON_REDIS that begins with rediss://")
        return self


def _both_or_neither(system: str, cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise ValueError(f"BATON_{system}_CERT and BATON_{system}_KEY go together")


def _problem(location: tuple[int | str, ...], message: str) -> str:
    """What is wrong with one variable, or (no location) with several together, which the message names."""
    return f"BATON_{'_'.join(map(str, location)).upper()}: {message}" if location else message
