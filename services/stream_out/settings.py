"""Settings of an edge, from the environment."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from shared.runtime.access import ServerCertificate
from shared.runtime.settings import ServiceSettings
from shared.wire.openai import MAX_BODY_BYTES
from shared.wire.topics import MAX_DEADLINE_S


class Settings(ServiceSettings):
    """BATON_* variables of an edge.

    Attributes:
        max_body_bytes: a larger body is refused without being read to its end.
        body_timeout_s: a body that has not come by then is refused.
        default_timeout_s: deadline of a request that names none.
        first_record_timeout_s: the HTTP status of a stream waits so long for ingest's word.
        accept_timeout_s: a job that the log does not take in this time is answered with 503.
        grace_s: a request whose last client went away is cancelled after this.
        keep_alive_s: silence after which a stream gets a comment.
        max_streams: clients served at once; more are refused with 503.
        max_queue_s: a request that would wait longer for a placement (or for half its time) is refused with 503.
        drain_s: at SIGTERM answers in progress get this long before their connections close.
        tenants: JSON file of tenants, their keys and limits; without it there are neither.
        allow_anonymous: without a tenants file, serve on other addresses than loopback too.
        tls_cert, tls_key: PEM files with which clients are answered over TLS; both, or neither for plain HTTP.
    """

    http_port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=MAX_BODY_BYTES, ge=1, le=MAX_BODY_BYTES)
    body_timeout_s: float = Field(default=30.0, gt=0)
    default_timeout_s: float = Field(default=600.0, gt=0, le=MAX_DEADLINE_S)
    first_record_timeout_s: float = Field(default=5.0, gt=0)
    accept_timeout_s: float = Field(default=5.0, gt=0)
    grace_s: float = Field(default=5.0, ge=0)
    keep_alive_s: float = Field(default=15.0, gt=0)
    max_streams: int = Field(default=2048, ge=1)
    max_queue_s: float = Field(default=30.0, gt=0)
    drain_s: float = Field(default=30.0, ge=0)
    tenants: Path | None = None
    allow_anonymous: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def certificate(self) -> ServerCertificate | None:
        """What clients are shown; None: they are answered in plain text."""
        return ServerCertificate(self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    @model_validator(mode="after")
    def _refuse_half_a_certificate(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("BATON_TLS_CERT and BATON_TLS_KEY go together")
        return self
