"""Lays a pack of `python -m infra.offline pack` out on a host without network, with nothing but Python's own library.

    python3 FOLDER/install.py --into ~/baton       # unpack the source there
    python3 FOLDER/install.py --checkout .         # or set up a checkout that is there, of the same lock

Afterwards `make demo` and `make up` run there. Everything else goes to $BATON_CACHE, by default ~/.cache/baton.
"""

from __future__ import annotations  # a Python that is too old gets as far as the message that says so

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT = 1
"""Of the pack; raised when `pack.py` writes something that an older installer would misread."""

INSTALLER = "install.py"
MANIFEST = "manifest.json"
REQUIREMENTS = "requirements.txt"
SOURCE = "baton.tar"

READ_BYTES = 2**20


class InstallError(Exception):
    """Something that whoever installs must know and mend."""


def lock_digest(checkout: Path) -> str:
    """Names what a checkout needs: equal where a pack fits."""
    return sha256((checkout / "requirements.lock").read_bytes()).hexdigest()


class JoinedParts(io.RawIOBase):
    """The parts of a pack, read as the one file that they were."""

    def __init__(self, parts: list[Path]) -> None:
        self._parts = iter(parts)
        self._file = next(self._parts).open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self._file.readinto(buffer)):
            part = next(self._parts, None)
            if part is None:
                return 0
            self._file.close()
            self._file = part.open("rb")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def join_parts(pack: Path) -> None:
    """Puts a pack that came in parts together, in its folder; the parts go. Raises InstallError if one is missing."""
    parts = sorted(pack.glob("part-*-of-*"))
    if not parts:
        return
    count = int(parts[0].name.rpartition("-")[2])
    wanted = [pack / f"part-{number:02}-of-{count:02}" for number in range(1, count + 1)]
    if set(parts) != set(wanted):
        odd = sorted(part.name for part in set(parts) ^ set(wanted))
        raise InstallError(f"{pack} should hold parts 1 to {count}; missing or of another pack: {', '.join(odd)}")
    try:
        with (
            io.BufferedReader(JoinedParts(wanted), READ_BYTES) as joined,
            tarfile.open(fileobj=joined, mode="r|") as archive,
        ):
            _extract(archive, pack)
    except tarfile.ReadError as error:
        raise InstallError(f"the parts in {pack} do not make a whole; copy them again: {error}") from error
    for part in parts:
        part.unlink()


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    # Python 3.11 has this protection since 3.11.4, and the systems this is for may have an older one.
    if hasattr(tarfile, "data_filter"):
        archive.extraction_filter = tarfile.data_filter
    archive.extractall(folder)  # noqa: S202 (with that filter)


def read_manifest(pack: Path) -> dict[str, Any]:
    """What the pack says of itself. Raises InstallError."""
    try:
        manifest = json.loads((pack / MANIFEST).read_text())
    except FileNotFoundError:
        raise InstallError(f"{pack} is no pack: it has no {MANIFEST}") from None
    except ValueError as error:
        raise InstallError(f"{pack / MANIFEST} was changed on the way; copy it again: {error}") from None
    if manifest["format"] != FORMAT:
        raise InstallError(f"the pack has format {manifest['format']} and this installer reads {FORMAT}")
    return manifest


def verify(pack: Path, manifest: dict[str, Any]) -> None:
    """Raises InstallError unless all files are those that were packed."""
    wrong = [entry["path"] for entry in manifest["files"] if not _is_as_packed(pack / entry["path"], entry)]
    if wrong:
        raise InstallError(f"missing or changed on the way: {', '.join(wrong)}")


def _is_as_packed(path: Path, entry: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest() == entry["sha256"]


def check_host(manifest: dict[str, Any]) -> list[str]:
    """Remarks on provided packages of another version. Raises InstallError if this is not the host the pack is for."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != manifest["python"]:
        raise InstallError(f"the pack is for Python {manifest['python']} and this is {here}: {sys.executable}")
    remarks: list[str] = []
    missing: list[str] = []
    for name, locked in manifest["provided"].items():
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != locked:
            remarks.append(f"the host provides {name} {found}; {locked} is locked")
    if missing:
        raise InstallError(f"the host was to provide these and {sys.executable} does not: {', '.join(missing)}")
    return remarks


def lay_out_source(pack: Path, folder: Path) -> None:
    """Unpacks the source. Raises InstallError if `folder` holds something else already."""
    if folder.exists() and any(folder.iterdir()):
        raise InstallError(f"{folder} is not empty; --checkout {folder} sets up the checkout that it holds")
    with tarfile.open(pack / SOURCE) as archive:
        _extract(archive, folder)


def fill_cache(pack: Path, cache: Path) -> None:
    """Copies what is not there yet, each folder whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    for source in sorted((pack / "cache").iterdir()):
        if (cache / source.name).exists():
            continue
        half_made = cache / f".{source.name}.half-made"
        shutil.rmtree(half_made, ignore_errors=True)
        shutil.copytree(source, half_made)
        half_made.rename(cache / source.name)


def make_environment(pack: Path, folder: Path, *, sees_host: bool) -> None:
    """The Python environment `folder` from the pack's wheels; its last written file is `whole`, as `in_env.sh` wants.

    With `sees_host` it finds, behind its own, the packages of the Python that runs this.
    """
    if (folder / "whole").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)  # without pip: not every host has `ensurepip`
    python = folder / "bin" / "python"
    (pip,) = (pack / "wheels").glob("pip-*.whl")
    _run(
        *(str(python), str(pip / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"),
        *("--no-index", "--no-deps", "--no-compile", f"--find-links={pack / 'wheels'}"),
        *("--require-hashes", "-r", str(pack / REQUIREMENTS)),
    )
    if sees_host:
        # This Python may be an environment itself, of which a new one with --system-site-packages would see nothing.
        (packages,) = (folder / "lib").glob("python3.*/site-packages")
        lines = (f"import site; site.addsitedir({path!r})" for path in host_packages())
        (packages / "provided.pth").write_text("\n".join(lines) + "\n")
    _run(str(python), "-m", "compileall", "-q", "-j", "0", str(folder / "lib"))
    (folder / "whole").touch()


def host_packages() -> list[str]:
    """Folders from which the Python that runs this imports installed packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InstallError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def install(pack: Path, checkout: Path, *, unpack_source: bool) -> None:
    """All steps, each told on the standard output. Raises InstallError."""
    began_s = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began_s:6.1f} s  {text}\n")
        sys.stdout.flush()

    join_parts(pack)
    manifest = read_manifest(pack)
    remarks = check_host(manifest)
    verify(pack, manifest)
    say(f"verified {len(manifest['files'])} files of the pack")
    for remark in remarks:
        say(remark)
    if unpack_source:
        lay_out_source(pack, checkout)
        say(f"source in {checkout}")
    elif lock_digest(checkout) != manifest["lock"]:
        raise InstallError(f"the pack was made of another requirements.lock than that of {checkout}")
    cache = Path(os.environ.get("BATON_CACHE", "~/.cache/baton")).expanduser().resolve()
    fill_cache(pack, cache)
    in_env = str(checkout / "infra" / "local" / "in_env.sh")
    environment = Path(_run(in_env, "--where", manifest["python"]).strip())
    make_environment(pack, environment, sees_host=bool(manifest["provided"]))
    say(f"environment in {environment}")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pack / "wheels"), "COLUMNS": "200"}
    told = _run(in_env, "python", "-m", "infra.local", "setup", **offline)
    say("all is there:\n" + told.strip())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, nargs="?", default=Path(__file__).parent, help="by default where this lies")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--into", type=Path, help="folder for the source")
    where.add_argument("--checkout", type=Path, help="a checkout that is there already")
    arguments = parser.parse_args()
    checkout = (arguments.into or arguments.checkout).expanduser().resolve()
    try:
        install(arguments.pack.expanduser().resolve(), checkout, unpack_source=arguments.into is not None)
    except InstallError as error:
        sys.stderr.write(f"baton: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
