"""Tests that documents name, as `path::test` between backticks; a path that is a whole suite stands alone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def named_tests(text: str) -> list[tuple[str, str]]:
    """(path, test) of each; the test is "" for a whole suite."""
    return re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)


def missing_tests(text: str) -> list[str]:
    """Of those named, the ones that are not there."""
    return [f"{path}::{test}" for path, test in named_tests(text) if not _is_there(ROOT / path, test)]


def _is_there(path: Path, test: str) -> bool:
    if not path.exists():
        return False
    return not test or re.search(rf"^(async )?def {test}\b", path.read_text(), re.MULTILINE) is not None
