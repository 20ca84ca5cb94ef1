"""Who calls, and what may they: tenants by the API keys in a file of the operator's, that holds only their hashes.

    {"acme": {"keys": ["sha256:<hex>"], "models": ["small"], "max_concurrent": 8,
              "requests_per_minute": 600, "tokens_per_minute": 100000,
              "priorities": ["standard", "batch"]}}

All but `keys` may be left out: then all models and priorities, or no limit.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import NotAllowed, NotAuthenticated, StartupError
from shared.observe.log import Logger
from shared.policy.limits import TenantLimits
from shared.request import Priority
from shared.wire.to_ingest import TENANT_PATTERN

KEY_PREFIX = "baton-"

HASH_PREFIX = "sha256:"

_Limit = Annotated[int, Field(ge=1, le=10**9)]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        models: that it may use; None: all.
        priorities: likewise.
        is_proven: by a key. Who has none may see and end every request, for anybody could say its name.
    """

    tenant: str
    models: frozenset[str] | None = None
    limits: TenantLimits = field(default_factory=TenantLimits)
    is_proven: bool = False
    priorities: frozenset[Priority] | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def check_model(self, model: str) -> None:
        """Raises NotAllowed."""
        if not self.may_use(model):
            raise NotAllowed(f"the key does not allow model {model!r}", param="model", code="model_not_allowed")

    def check_priority(self, priority: Priority) -> None:
        """Raises NotAllowed."""
        if self.priorities is not None and priority not in self.priorities:
            raise NotAllowed(
                f"the key does not allow priority {priority}", param="x-baton-priority", code="priority_not_allowed"
            )


class _Tenant(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    keys: list[Annotated[str, Field(pattern=f"^{HASH_PREFIX}[0-9a-f]{{64}}$")]]
    models: list[str] | None = None
    max_concurrent: _Limit | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    priorities: Annotated[list[Annotated[Priority, Field(strict=False)]], Field(min_length=1)] | None = None

    def caller(self, name: str) -> Caller:
        limits = TenantLimits(self.max_concurrent, self.requests_per_minute, self.tokens_per_minute)
        models = None if self.models is None else frozenset(self.models)
        priorities = None if self.priorities is None else frozenset(self.priorities)
        return Caller(name, models, limits, is_proven=True, priorities=priorities)


_READER = TypeAdapter(dict[Annotated[str, Field(pattern=f"^(?:{TENANT_PATTERN.pattern})$")], _Tenant])


def key_hash(key: str) -> str:
    """What the file holds of a key. A key is random and long, so that a plain hash of it tells nothing."""
    return HASH_PREFIX + sha256(key.encode()).hexdigest()


class Tenants:
    """The callers by their key's hash, as the file says now. Raises StartupError where it says nothing sensible.

    Attributes:
        is_outdated: the file has changed since and cannot be read: keys taken out of it still count.
    """

    def __init__(self, path: Path) -> None:
        self.is_outdated = False
        self._path = path
        self._version: object = None
        self._callers: Mapping[bytes, Caller] = {}
        self._read(_version_of(path))

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this `Authorization` header. Takes as long for a wrong key as for a right one."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NotAuthenticated("an API key is needed: Authorization: Bearer <key>")
        wanted = key_hash(key.strip()).encode()
        found: Caller | None = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, wanted):
                found = caller
        if found is None:
            raise NotAuthenticated("the API key is not known here")
        return found

    def refresh(self, logger: Logger) -> None:
        """Read the file again if it changed; what cannot be read changes nothing."""
        version = _version_of(self._path)
        if version == self._version:
            return
        try:
            self._read(version)
        except StartupError as error:
            self._version, self.is_outdated = version, True
            logger.error("tenants stay as they were", error=str(error))  # noqa: TRY400 - the message is all
        else:
            logger.info("tenants read", keys=len(self._callers))

    def _read(self, version: object) -> None:
        try:
            tenants = _READER.validate_json(self._path.read_bytes())
        except OSError as error:
            raise StartupError(f"BATON_TENANTS: {self._path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise StartupError(f"BATON_TENANTS: {self._path}: {problems}") from error
        callers: dict[bytes, Caller] = {}
        for name, tenant in tenants.items():
            for known in tenant.keys:
                if callers.setdefault(known.encode(), tenant.caller(name)).tenant != name:
                    raise StartupError(f"BATON_TENANTS: {self._path}: tenant {name} has a key of another")
        self._callers, self._version, self.is_outdated = callers, version, False


def _version_of(path: Path) -> object:
    """Changes with the file; None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
