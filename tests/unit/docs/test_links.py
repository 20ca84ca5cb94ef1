"""What documents point at is there: files, headings, and paths that stand in a sentence as code."""

import re
import unicodedata
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, code_spans, prose

LINK = re.compile(r"(?:\]\(|src=\")([^)\"\s]+)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FOLDERS = ("benchmarks", "docs", "infra", "loadgen", "services", "shared", "tests")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:acl|conf|json|jsonl|lua|md|properties|py|sh|txt|yml)")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(document: Path) -> set[str]:
    """Of its headings, as they are made on GitHub and elsewhere."""
    return {anchor(heading) for heading in HEADING.findall(prose(document.read_text()))}


def anchor(heading: str) -> str:
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower()
    kept = (char for char in plain if char in " -_" or unicodedata.category(char)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def broken(document: Path) -> list[str]:
    """Links that lead nowhere."""
    found = []
    for target in LINK.findall(prose(document.read_text())):
        path, _, heading = target.partition("#")
        if re.match(r"https?:", path):
            continue
        file = (document.parent / path) if path else document
        if not file.exists() or (heading and heading not in anchors(file)):
            found.append(target)
    return found


@each_document
def test_links_lead_somewhere(document):
    assert broken(document) == []


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_paths_that_it_names_are_there(document):
    named = {span for span in code_spans(document.read_text()) if PATH.fullmatch(span)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_a_wrong_link_would_be_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, `with` code\n")
    document = tmp_path / "one.md"
    document.write_text("[a](there.md#a-heading-with-code) [b](there.md#none) [c](gone.md) [d](#own)\n## Own\n")
    assert broken(document) == ["there.md#none", "gone.md"]
