"""Commands that documents show are there, and have the options that they are shown with."""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from tests.documents import DOCUMENTS, ROOT, code_spans, fenced_lines

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE))
PROGRAMS = {"up": "infra.local up", "down": "infra.local down", "status": "infra.local status"}
PROGRAMS |= {"faults": "tests.faults.cluster", "sim": "tests.sim"}
"""What takes the ARGS of `make`."""

PYTHON = re.compile(r"\bpython(?:3(?:\.\d+)?)? -m ([\w.]+)'?(.*?)(?= [;&>|]|$)")
MAKE = re.compile(r"^make ([a-z-]+)(?: ARGS=(?:\"([^\"]*)\"|(\S+)))?")


def shown(document: Path) -> Iterator[tuple[str, str]]:
    """(program, arguments) of each command."""
    text = document.read_text()
    for line in (*code_spans(text), *fenced_lines(text)):
        for module, arguments in PYTHON.findall(line):
            yield module, arguments
        if made := MAKE.match(line):
            arguments = made[2] or made[3] or ""
            yield (PROGRAMS[made[1]], arguments) if arguments and made[1] in PROGRAMS else ("make", made[1])


COMMANDS = sorted({command for document in DOCUMENTS for command in shown(document)})


def words(arguments: str) -> list[str]:
    """As a shell would split them; of alternatives, `list|show`, the first."""
    return [word.split("|")[0] for word in shlex.split(arguments, comments=True)]


class Parsed(Exception):
    """The program's arguments are as they should be; it would begin now."""


PARSE_ARGS = argparse.ArgumentParser.parse_args


def parse_and_end(parser):
    PARSE_ARGS(parser)
    raise Parsed


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take them as the program would; paths and addresses may be placeholders."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    if not arguments:
        return
    program = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module)
    if hasattr(program, "argparse"):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        with pytest.raises(Parsed):
            program.main()
    elif hasattr(program, "typer"):
        command = typer.main.get_command(program.app if hasattr(program, "app") else command_of(program.main))
        follow(command, arguments)


def command_of(main) -> typer.Typer:
    app = typer.Typer()
    app.command()(main)
    return app


def follow(command: TyperCommand | TyperGroup, arguments: list[str]) -> None:
    """Down to the subcommand, whose options must exist and take their values."""
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, name
        command = command.commands[name]
    if isinstance(command, TyperGroup) or arguments in ([], ["--help"]):
        return
    try:
        command.make_context(command.name, list(arguments))
    except Exception as error:  # typer's own; it does not export the class
        if "does not exist" not in str(error):
            raise


@pytest.mark.parametrize(("program", "arguments"), COMMANDS, ids=lambda part: part.strip()[:60] or "-")
def test_a_command_that_a_document_shows_is_one(program, arguments, monkeypatch):
    if program == "make":
        assert arguments in TARGETS
    else:
        module, *subcommand = program.split()
        parse(module, [*subcommand, *words(arguments)], monkeypatch)


@pytest.mark.parametrize("arguments", ["plan --nope 3", "replay --speed fast", "nope", "plan --speed"])
def test_a_wrong_command_would_be_found(arguments, monkeypatch):
    with pytest.raises(Exception, match=r"nope|valid number|requires an argument"):
        parse("loadgen", words(arguments), monkeypatch)


def test_commands_were_found():
    programs = {program for program, _ in COMMANDS}
    assert {"make", "loadgen", "benchmarks.policies", "services.ingest", "infra.local up", "tests.sim"} <= programs
