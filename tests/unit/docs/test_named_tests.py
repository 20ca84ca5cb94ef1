"""Documents name no test that is not there, and each row of the failure matrix names one."""

import re

import pytest

from tests.named_tests import ROOT, missing_tests, named_tests

RUNBOOK = (ROOT / "docs/runbook.md").read_text()
MATRIX = RUNBOOK.split("\n## Failure matrix\n")[1].split("\n## ")[0]
ROWS = [line for line in MATRIX.splitlines() if re.match(r"\| (?!what fails)[^-|]", line)]


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_tests_that_a_document_names_are_there(document):
    assert missing_tests(document.read_text()) == []


def test_the_matrix_has_rows():
    assert len(ROWS) >= 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_row_of_the_failure_matrix_names_a_test(row):
    assert named_tests(row.rstrip().removesuffix("|").rpartition("|")[2])
