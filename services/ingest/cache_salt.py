"""What keeps one tenant's prompts out of another's cache, and out of the sight of those who read block hashes."""

import hmac
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from shared.errors import StartupError
from shared.runtime.access import read_secret

MIN_SECRET_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class CacheSalt:
    """Salts of block hashes, one for each tenant.

    Attributes:
        secret: the deployment's; all of its ingest processes have the same, or they find only their own prefixes. None:
            the tenant's name is its salt. That keeps tenants apart, but whoever reads the workers' announcements in
            Redis and knows the name can tell whether a prompt that he guesses was computed.
    """

    secret: SecretStr | None = None

    @classmethod
    def read(cls, path: Path | None) -> "CacheSalt":
        """Raises StartupError for a file that holds no good secret."""
        if path is None:
            return cls()
        secret = read_secret(path)
        if len(secret.get_secret_value()) < MIN_SECRET_CHARACTERS:
            raise StartupError(f"secret file {path} holds fewer than {MIN_SECRET_CHARACTERS} characters")
        return cls(secret)

    def of(self, tenant: str) -> str:
        if self.secret is None:
            return tenant
        return hmac.digest(self.secret.get_secret_value().encode(), tenant.encode(), "sha256").hex()


NAMES_ALONE = CacheSalt()
