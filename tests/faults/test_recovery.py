"""Recovery times of a history made by hand."""

from types import SimpleNamespace

import pytest

from tests.faults.cluster.recovery import recoveries
from tests.faults.stories import read_stories
from tests.faults.tape import BEGIN_S, resumed

CLUSTER = SimpleNamespace(
    seats={"decode-0": SimpleNamespace(role="decode"), "prefill-0": SimpleNamespace(role="prefill")}
)


def took_s(incarnation, at_s):
    """Of a request that lost its decode worker d1 at 0.4 by the log, and had its next token at 0.6."""
    target = "decode-0" if incarnation.startswith("d") else "prefill-0"
    fault = SimpleNamespace(kind="kill", target=target, incarnation=incarnation, at_s=BEGIN_S + at_s, until_s=None)
    stories, _ = read_stories(resumed().story)
    return [recovery.took_s for recovery in recoveries([fault], stories, [], CLUSTER)]


def test_what_was_on_its_way_is_no_recovery():
    # Hit at 0.25, a frame of its own is accepted at 0.3: the next token is that of the next placement.
    assert took_s("d1", 0.25) == [pytest.approx(0.35)]


def test_who_was_not_needed_any_more_was_not_met():
    assert took_s("p1", 0.15) != []
    assert took_s("p1", 0.35) == []
    assert took_s("d2", 0.35) == []
