"""Which packages of `requirements.lock` a host needs, for one Python and with what it has already left out.

The lock says of each package who asks for it (`# via`), so that no registry is asked.
"""

import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared.errors import StartupError

PROJECT = "baton"

_PINNED = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)(?: ; (?P<marker>[^\\]+))?")


@dataclass(frozen=True, slots=True)
class Locked:
    """One package of the lock.

    Attributes:
        hashes: `--hash=...` options, one for each of its files.
        asked_for_by: names of the packages that need it, `PROJECT` for our own.
    """

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]
    asked_for_by: frozenset[str]

    def line(self) -> str:
        """It as pip reads it."""
        return " \\\n    ".join((f"{self.name}=={self.version}", *self.hashes)) + "\n"


def read_lock(text: str) -> list[Locked]:
    """The packages of a lock file as `make lock` writes it."""
    packages: list[Locked] = []
    for entry in re.split(r"\n(?=\S)", text.strip("\n")):
        head, *rest = entry.splitlines()
        match = _PINNED.match(head)
        if match is None:
            raise StartupError(f"the lock has a line that pins no package: {head!r}")
        options = [line.strip(" \\") for line in rest]
        asked_for_by = [line.removeprefix("#").strip().removeprefix("via ") for line in options if line[:1] == "#"]
        packages.append(
            Locked(
                name=match["name"],
                version=match["version"],
                marker=(match["marker"] or "").strip(),
                hashes=tuple(option for option in options if option.startswith("--hash=")),
                asked_for_by=frozenset(name.split(" ")[0] for name in asked_for_by if name != "via"),
            )
        )
    return packages


def direct_names(pyproject: str, extras: Collection[str]) -> set[str]:
    """Names that `pyproject.toml` asks for itself, with those extras. Raises StartupError for an unknown extra."""
    project = tomllib.loads(pyproject)["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    unknown = sorted(set(extras) - optional.keys())
    if unknown:
        raise StartupError(f"no such extra: {', '.join(unknown)}; there are {', '.join(optional)}")
    wanted: list[str] = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    return {canonicalize_name(Requirement(each).name) for each in wanted}


def select(packages: Sequence[Locked], direct: Collection[str], provided: Collection[str], python: str) -> list[Locked]:
    """What a Linux host on x86-64 with this version of Python ("3.12") needs beside what is `provided`.

    What only provided packages ask for is left out with them. Raises StartupError for a provided package that the
    lock does not have.
    """
    unknown = sorted(set(provided) - {package.name for package in packages})
    if unknown:
        raise StartupError(f"the lock has no package {', '.join(unknown)}")
    environment = default_environment() | {  # of the host, which is not this machine
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    fitting = [
        package
        for package in packages
        if package.name not in provided
        and (not package.marker or Marker(package.marker).evaluate({k: str(v) for k, v in environment.items()}))
    ]
    needed: set[str] = set()
    while True:
        more = {
            package.name
            for package in fitting
            if (PROJECT in package.asked_for_by and package.name in direct) or package.asked_for_by & needed
        }
        if more <= needed:
            return [package for package in fitting if package.name in needed]
        needed |= more
