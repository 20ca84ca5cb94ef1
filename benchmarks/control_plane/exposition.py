"""Reads histograms of `/metrics` and what was added to them between two looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Histogram:
    """All label sets of one histogram together.

    Attributes:
        at_most: how many values were at most so large, by upper bound; ascending, the last bound is infinity.
    """

    at_most: Mapping[float, float]
    total: float

    @property
    def count(self) -> float:
        return self.at_most.get(inf, 0.0)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def since(self, before: "Histogram | None") -> "Histogram":
        """What came after `before`."""
        if before is None:
            return self
        at_most = {bound: count - before.at_most.get(bound, 0.0) for bound, count in self.at_most.items()}
        return Histogram(at_most, self.total - before.total)

    def percentile(self, percent: float) -> float | None:
        """By linear interpolation in its bucket; None of nothing, or where it lies above the last finite bound."""
        wanted = self.count * percent / 100
        low_bound = low_count = 0.0
        for bound, count in self.at_most.items():
            if count >= wanted and count > low_count:
                return (
                    None
                    if bound == inf
                    else low_bound + (bound - low_bound) * (wanted - low_count) / (count - low_count)
                )
            low_bound, low_count = bound, count
        return None


def read_histograms(text: str) -> dict[str, Histogram]:
    """Every histogram of a page in Prometheus' text format, by name."""
    found: dict[str, Histogram] = {}
    for family in text_string_to_metric_families(text):
        if family.type != "histogram":
            continue
        at_most: dict[float, float] = {}
        total = 0.0
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                at_most[bound] = at_most.get(bound, 0.0) + sample.value
            elif sample.name.endswith("_sum"):
                total += sample.value
        found[family.name] = Histogram(dict(sorted(at_most.items())), total)
    return found


def added_to(
    before: Mapping[str, Histogram], after: Mapping[str, Histogram], name: str
) -> dict[str, float | None] | None:
    """Count, mean, p50 and p99 of the values that came between two looks; None where there were none."""
    if name not in after:
        return None
    new = after[name].since(before.get(name))
    if not new.count:
        return None
    return {"count": new.count, "mean": new.mean, "p50": new.percentile(50), "p99": new.percentile(99)}
