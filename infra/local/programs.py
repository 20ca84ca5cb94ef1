"""Programs that the local stack needs from the machine: found, installed, or named in a clear message."""

import os
import shutil
import subprocess

from shared.errors import StartupError


def require_program(name: str, *, package: str, purpose: str) -> str:
    """Path of the program `name`; root on a Debian-like machine gets its `package` by apt-get.

    Raises:
        StartupError: it is missing and could not be installed; names the package and the command.
    """
    path = shutil.which(name)
    if path is not None:
        return path
    mend = f"{name} is missing ({purpose}); install it with: apt-get install {package}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise StartupError(mend)
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", package]):
        done = subprocess.run(
            [command[0], "-qq", *command[1:]],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StartupError(f"{mend} ({' '.join(command)} failed here: {done.stderr.strip()[-500:]})")
    path = shutil.which(name)
    if path is None:
        raise StartupError(f"{mend} (installed, yet not on PATH)")
    return path
