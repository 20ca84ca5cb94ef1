"""Counters whose labels are few are there from the start: `increase()` does not see a series that begins above 0."""

import pytest
from prometheus_client import CollectorRegistry

from shared.observe.metrics import HOLD_OUTCOMES, IngestMetrics, WorkerMetrics
from shared.transfer.port import Outcome


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_every_outcome_of_a_hold_begins_at_0(registry):
    WorkerMetrics(registry, "m")
    assert set(HOLD_OUTCOMES) == set(Outcome)
    for outcome in Outcome:
        assert registry.get_sample_value("baton_kv_holds_total", {"model_name": "m", "outcome": outcome}) == 0


def test_reasons_to_ignore_and_to_refuse_begin_at_0(registry):
    WorkerMetrics(registry, "m")
    IngestMetrics(registry)
    ignored = {"model_name": "m", "reason": "other incarnation"}
    assert registry.get_sample_value("baton_ignored_records_total", ignored) == 0
    for code in ("invalid_request_error", "context_length_exceeded", "model_not_found", "internal_error"):
        assert registry.get_sample_value("baton_rejected_total", {"code": code}) == 0
