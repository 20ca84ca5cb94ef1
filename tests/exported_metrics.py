"""The names of all metrics that the services export, as Prometheus stores them, from registries built as theirs are."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.stream_out.metrics import EdgeMetrics
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.observe.log import logger
from shared.observe.metrics import IngestMetrics, WorkerMetrics, process_registry
from shared.state.unreadable import Unreadable
from shared.worker.link_metrics import LinkMetrics


def _worker_metrics(registry):
    WorkerMetrics(registry, "m")
    registry.register(LinkMetrics(tuple, lambda: 0, Counter))


SERVICES = {
    "ingest": IngestMetrics,
    "edge": EdgeMetrics,
    "worker": _worker_metrics,
}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

AGGREGATIONS = {"sum", "max", "by"}
FUNCTIONS = {"rate", "increase", "deriv", "histogram_quantile", "time", "min_over_time", "max_over_time", "absent"}
KEYWORDS = AGGREGATIONS | FUNCTIONS | {"and", "or"}


@cache
def exported() -> dict[str, str]:
    """Each series' name, and the metric that it belongs to: a histogram has three, and counters end in `_total`."""
    found: dict[str, str] = {}
    for family in families():
        metric = f"{family.name}_total" if family.type == "counter" else family.name
        found |= {f"{family.name}{suffix}": metric for suffix in SUFFIXES[family.type]}
    return found


def families() -> Iterator[Metric]:
    """All that is exported, by all services."""
    for make_metrics in SERVICES.values():
        registry = process_registry()
        make_metrics(registry)
        registry.register(BusMetrics(KafkaBus("nowhere:1", client_id="test")))
        registry.register(Unreadable(logger("test")))
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            if not family.name.endswith("_created"):
                yield family


def asked_for(expr: str) -> set[str]:
    """Names of the series in a PromQL expression."""
    bare = re.sub(r'"[^"]*"|\'[^\']*\'|{[^}]*}|\[[^\]]*\]|(by|ignoring|group_left) \([^)]*\)', "", expr)
    return set(re.findall(r"[A-Za-z_:][\w:]*", bare)) - KEYWORDS
