"""The placement that docs/placement.md shows is one, and the fields that it explains are those that there are."""

import json
import re

from shared.wire.explanation import MAX_CANDIDATES, Candidate, Explanation
from tests.documents import ROOT

DOCUMENT = (ROOT / "docs/placement.md").read_text()
EXAMPLE = json.loads(DOCUMENT.split("```json\n")[1].split("```")[0])


def test_the_example_has_the_fields_that_an_answer_has():
    (placement,) = EXAMPLE["placements"]
    told = placement["explanation"]
    candidates = tuple(Candidate(**each) for each in told["candidates"])
    assert Explanation(told["reason"], told["num_considered"], candidates).members() == told
    assert len(candidates) <= MAX_CANDIDATES
    assert (placement["prefill"], placement["decode"]) == (candidates[0].prefill, candidates[0].decode)
    assert [each.cost_s for each in candidates] == sorted(each.cost_s for each in candidates)


def test_every_field_is_explained():
    section = DOCUMENT.split("\n## Why there?\n")[1].split("\n## ")[0]
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    (placement,) = EXAMPLE["placements"]
    told = placement["explanation"]
    assert explained >= (placement.keys() | told.keys() | told["candidates"][0].keys()) - {"explanation"}
