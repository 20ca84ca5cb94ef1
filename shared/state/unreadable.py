"""What others say of themselves in the store and this process cannot read: they are of another version."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.observe.log import Logger

KINDS = ("worker", "backlog", "feed")


class Unreadable(Collector):
    """Passed over, told of once, and counted; to be registered with a process's registry."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._noted: dict[str, Mapping[str, str]] = {kind: {} for kind in KINDS}

    def note(self, kind: str, noted: Mapping[str, str]) -> None:
        """Args:
        noted: by whom it was said, what is wrong with it; all of this kind, as of now.
        """
        for who in noted.keys() - self._noted[kind].keys():
            self._log.warning(f"{kind} passed over: it is of another version", incarnation=who, error=noted[who])
        self._noted[kind] = noted

    def collect(self) -> Iterator[Metric]:
        """Those of the last look."""
        family = GaugeMetricFamily(
            "baton_unreadable_reports",
            "Workers and ingests of which this process cannot read what they say: another version's",
            labels=["kind"],
        )
        for kind, noted in self._noted.items():
            family.add_metric([kind], len(noted))
        yield family
