"""Counters whose labels are few are there from the start: `increase()` does not see a series that begins above 0."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from shared.observe.metrics import HOLD_OUTCOMES, IngestMetrics, WorkerMetrics, process_registry
from shared.transfer.port import Outcome
from shared.wire.wire_format import WireFormat


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


def test_pulls_are_counted_by_form_from_0(registry):
    metrics = WorkerMetrics(registry, "m")
    metrics.observe_pull(WireFormat.INT8, seconds=0.1, kv_bytes=100, wire_bytes=52)
    for wire_format, count, num_bytes in ((WireFormat.NATIVE, 0, 0), (WireFormat.INT8, 1, 52), (WireFormat.INT4, 0, 0)):
        labels = {"model_name": "m", "format": wire_format}
        assert registry.get_sample_value("baton_kv_transfers_total", labels) == count
        assert registry.get_sample_value("baton_kv_wire_bytes_total", labels) == num_bytes
    assert registry.get_sample_value("baton_kv_pull_bytes_total", {"model_name": "m"}) == 100


async def test_a_process_tells_how_many_tasks_its_loop_has():
    registry = process_registry()
    before = registry.get_sample_value("baton_asyncio_tasks")
    task = asyncio.create_task(asyncio.sleep(60))
    assert registry.get_sample_value("baton_asyncio_tasks") == before + 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert registry.get_sample_value("baton_asyncio_tasks") == before


def test_outside_of_a_loop_there_are_no_tasks():
    assert process_registry().get_sample_value("baton_asyncio_tasks") == 0
