"""Makes the secrets of a composition that are not there yet: `python -m infra.docker.make_secrets FOLDER`.

redis-password  of Redis' user baton; only Baton's own user reads it
users.acl       the users of Redis, with the hash of that password, which tells nothing about so random a one
cache-salt      of the hashes of KV blocks; only Baton's own user reads it
"""

import os
import secrets
import sys
from hashlib import sha256
from pathlib import Path

USERS = Path(__file__).parents[1] / "redis" / "users.acl"
SECRET_BYTES = 32
ONLY_OURS, FOR_ALL = 0o400, 0o444


def make_secrets(folder: Path) -> None:
    """Leaves alone what is there, but for the users, which follow their template and the password."""
    for name in ("redis-password", "cache-salt"):
        if not (folder / name).exists():
            _write(folder / name, secrets.token_urlsafe(SECRET_BYTES), ONLY_OURS)
    digest = sha256((folder / "redis-password").read_bytes()).hexdigest()
    _write(folder / "users.acl", USERS.read_text().replace("@PASSWORD_SHA256@", digest), FOR_ALL)


def _write(path: Path, text: str, mode: int) -> None:
    """Whole or not at all, and never readable by others meanwhile."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, ONLY_OURS | 0o200), "w") as file:
        file.write(text)
    new.chmod(mode)
    new.rename(path)


if __name__ == "__main__":
    make_secrets(Path(sys.argv[1]))
