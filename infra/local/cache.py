"""What is fetched or converted once and kept outside the checkout."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$BATON_CACHE`, by default ~/.cache/baton."""
    return Path(os.environ.get("BATON_CACHE", "~/.cache/baton")).expanduser()


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` in a temporary sibling and then renamed: it is whole or it is not there.

    Of several processes that ask at the same time one makes it and the others wait.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        half_made = folder.parent / f".{folder.name}.half-made"
        shutil.rmtree(half_made, ignore_errors=True)
        half_made.mkdir()
        make(half_made)
        half_made.rename(folder)
    return folder
