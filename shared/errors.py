"""Every error Baton raises on purpose, and what follows from it.

BatonError
├── RequestError              the request is wrong or unwanted: tell its client, once, and forget it
│   ├── InvalidRequest        400  names the field and the limit
│   │   └── ContextTooLong    400  code context_length_exceeded
│   ├── NotAuthenticated      401
│   ├── NotAllowed            403
│   ├── BodyTooSlow           408
│   ├── BodyTooLarge          413
│   ├── UnsupportedBody       415
│   ├── ModelNotFound         404
│   ├── RequestNotFound       404
│   ├── IdempotencyConflict   409
│   ├── RequestFailed         500  a defect of ours met it: this request ends, the service goes on
│   ├── RateLimited           429  Retry-After
│   └── Overloaded            503  Retry-After
│       └── EdgeDraining      503
├── KvTransferFailed          the pull did not happen: the puller prefills locally and counts it
│   └── LayoutMismatch        the peer's pages do not fit ours: no pull from it can ever succeed
├── LeaseLost                 this process no longer owns what it works on: drop all, come back as a new incarnation
│   └── StepHangs             or gives it up, because its device does not come back from a step
├── UnsupportedCheckpoint     refused at load, naming the field of the checkpoint's config
└── StartupError              what this process needs is missing: say what and how to mend it, exit
"""

from collections.abc import Mapping
from typing import ClassVar


class BatonError(Exception):
    """Base of all errors raised on purpose."""


class RequestError(BatonError):
    """The client's request cannot be served.

    Attributes:
        http_status: status of the HTTP answer.
        type: the OpenAI error type.
        code: the OpenAI error code, or None.
        param: the request's field that is wrong, or None.
        dead_letter: whether a job that came by Kafka is also written to `dead-letter`.
        retry_after_s: seconds after which trying again makes sense, or None.
    """

    http_status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    default_code: ClassVar[str | None] = None
    dead_letter: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type, out of range or not supported."""


class ContextTooLong(InvalidRequest):
    """Prompt and answer do not fit the model's context or any worker's pages."""

    default_code = "context_length_exceeded"


class NotAuthenticated(RequestError):
    """The API key is missing or nobody's."""

    http_status = 401
    default_code = "invalid_api_key"


class NotAllowed(RequestError):
    """The API key is good, but not for this."""

    http_status = 403
    type = "permission_error"
    default_code = "not_allowed"


class BodyTooLarge(RequestError):
    """The request's body is over the size limit."""

    http_status = 413
    default_code = "request_too_large"


class BodyTooSlow(RequestError):
    """The request's body did not come in time."""

    http_status = 408
    default_code = "request_timeout"


class UnsupportedBody(RequestError):
    """The body is sent in another form than as plain JSON in UTF-8."""

    http_status = 415
    default_code = "unsupported_media_type"


class ModelNotFound(RequestError):
    """No worker serves the model that the request names."""

    http_status = 404
    default_code = "model_not_found"


class RequestNotFound(RequestError):
    """Nothing is known of the request id."""

    http_status = 404
    default_code = "request_not_found"


class IdempotencyConflict(RequestError):
    """The idempotency key was used before with another body."""

    http_status = 409
    default_code = "idempotency_conflict"


class RequestFailed(RequestError):
    """The request cannot be served through no fault of its own."""

    http_status = 500
    type = "server_error"
    default_code = "internal_error"


class RateLimited(RequestError):
    """The tenant has reached one of its limits.

    Attributes:
        headers: of the HTTP answer, that tell where the tenant stands.
    """

    http_status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    dead_letter = False

    def __init__(self, message: str, *, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = headers


class Overloaded(RequestError):
    """The system cannot take the request now."""

    http_status = 503
    type = "server_error"
    default_code = "overloaded"
    dead_letter = False


class EdgeDraining(Overloaded):
    """This edge is about to end; the others serve."""

    default_code = "edge_draining"


class KvTransferFailed(BatonError):
    """KV pages could not be pulled from a peer."""


class LayoutMismatch(KvTransferFailed):
    """The peer's KV layout fingerprint differs from ours."""


class LeaseLost(BatonError):
    """A slot or partition lease ran out while its holder worked."""


class StepHangs(LeaseLost):
    """An engine step does not end; whoever waits for its thread waits for ever."""


class UnsupportedCheckpoint(BatonError):
    """A checkpoint asks for something the engine does not do."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"checkpoint not supported: {field}: {reason}")
        self.field = field


class StartupError(BatonError):
    """The process cannot start; the message says what is missing and how to mend it."""
