"""A worker's links and what it refused, read only when somebody asks for it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.transfer.port import Refusal
from shared.worker.peers import PeerLink


class LinkMetrics(Collector):
    """To be registered with a process's registry. A link that is gone leaves no series behind."""

    def __init__(
        self,
        links: Callable[[], Sequence[PeerLink]],
        num_missing: Callable[[], int],
        refusals: Callable[[], Counter[Refusal]],
    ) -> None:
        self._links = links
        self._num_missing = num_missing
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        """The links as they are now."""
        rate = _by_link("baton_kv_link_bytes_per_second", "Speed of a link to a worker that KV is pulled from")
        latency = _by_link("baton_kv_link_latency_seconds", "Time of a message of few bytes over that link")
        below_floor = _by_link("baton_kv_link_below_floor", "1 where that link is below the floor set")
        for link in self._links():
            report = link.report
            if report.speed is not None:
                labels = (link.peer, report.address, report.transport)
                rate.add_metric(labels, report.speed.bytes_per_s)
                latency.add_metric(labels, report.speed.latency_s)
                below_floor.add_metric(labels, link.below_floor)
        yield from (rate, latency, below_floor)
        yield GaugeMetricFamily(
            "baton_kv_links_missing", "Workers that KV may be pulled from without a measured link", self._num_missing()
        )
        refusals = CounterMetricFamily("baton_kv_refusals", "Pulls that this worker did not serve", labels=["reason"])
        counted = self._refusals()
        for reason in Refusal:
            refusals.add_metric([reason.name.lower()], counted[reason])
        yield refusals


def _by_link(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=["peer", "address", "transport"])
