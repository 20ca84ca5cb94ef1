"""What a process's connection to Kafka looks like from outside, read only when somebody asks for it."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.bus.kafka import KafkaBus


class BusMetrics(Collector):
    """To be registered with a process's registry; nothing of it costs anything between two scrapes."""

    def __init__(self, bus: KafkaBus) -> None:
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        """The state of the connection now."""
        counters = self._bus.counters
        yield CounterMetricFamily(
            "baton_bus_failed_appends", "Appends that were made again", counters.num_failed_appends
        )
        yield CounterMetricFamily(
            "baton_bus_producers_replaced",
            "Kafka producers given up after a failure",
            counters.num_producers_replaced,
        )
        yield CounterMetricFamily(
            "baton_bus_consumers_replaced",
            "Kafka consumers given up because they failed or stood still",
            counters.num_consumers_replaced,
        )
        yield _by_topic("baton_bus_records_buffered", "Records without acknowledgement", self._buffered())
        yield _by_topic(
            "baton_bus_records_behind", "Records that the broker told of and that were not read yet", self._behind()
        )

    def _buffered(self) -> Counter[str]:
        buffered: Counter[str] = Counter()
        for producer in self._bus.open_producers:
            for (topic, _), records in producer.buffered().items():
                buffered[topic] += len(records)
        return buffered

    def _behind(self) -> Counter[str]:
        behind: Counter[str] = Counter()
        for reader in self._bus.open_readers:
            behind[reader.topic] += reader.num_behind()
        return behind


def _by_topic(name: str, text: str, num_records: Counter[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["topic"])
    for topic, number in sorted(num_records.items()):
        family.add_metric([topic], number)
    return family
