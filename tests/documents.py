"""The documents of the repository, and what of them is code."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

DOCUMENTS = sorted(
    path
    for folder in ("", "docs", "docs/decisions", "benchmarks", "loadgen/data")
    for path in (ROOT / folder).glob("*.md")
)

FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Without blocks of code."""
    return FENCED.sub("", text)


def code_spans(text: str) -> Iterator[str]:
    """Code within sentences, each on one line."""
    for span in re.findall(r"`([^`]+)`", prose(text)):
        yield " ".join(span.split())


def fenced_lines(text: str) -> Iterator[str]:
    """Lines of blocks of code; one that ends in a backslash goes on."""
    for block in FENCED.findall(text):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
