from math import inf

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from benchmarks.control_plane.exposition import added_to, read_histograms


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def ages(registry):
    return Histogram("ages_seconds", "Ages", ["side"], buckets=(0.001, 0.002, 0.004), registry=registry)


def look(registry):
    return read_histograms(generate_latest(registry).decode())


def test_label_sets_are_added_up(registry, ages):
    ages.labels("a").observe(0.0005)
    ages.labels("b").observe(0.0015)
    found = look(registry)["ages_seconds"]
    assert found.at_most == {0.001: 1, 0.002: 2, 0.004: 2, inf: 2}
    assert found.mean == pytest.approx(0.001)


def test_percentiles_are_of_what_came_between_two_looks(registry, ages):
    for _ in range(1000):
        ages.labels("a").observe(0.0005)
    before = look(registry)
    for _ in range(4):
        ages.labels("a").observe(0.0015)
        ages.labels("b").observe(0.003)
    added = added_to(before, look(registry), "ages_seconds")
    assert added is not None
    assert added["count"] == 8
    assert added["mean"] == pytest.approx(0.00225)
    assert added["p50"] == pytest.approx(0.002)  # the fourth of eight ends its bucket
    assert added["p99"] == pytest.approx(0.002 + 0.002 * (7.92 - 4) / 4)


def test_a_percentile_above_the_last_bound_is_not_made_up(registry, ages):
    ages.labels("a").observe(0.0005)
    ages.labels("a").observe(9.0)
    found = look(registry)["ages_seconds"]
    assert found.percentile(50) == pytest.approx(0.001)
    assert found.percentile(99) is None


def test_nothing_new_is_nothing(registry, ages):
    ages.labels("a").observe(0.0005)
    page = look(registry)
    assert added_to(page, page, "ages_seconds") is None
    assert added_to({}, page, "frames_seconds") is None
    assert added_to({}, page, "ages_seconds")["count"] == 1
