"""Metrics of the workers, of ingest and of every process, unit in the name; `vllm:*` where it means the same as there.

A metrics object belongs to one service in one process; its registry is passed in, so several may live side by side.
No label is a request id.
"""

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from shared.errors import BodyTooLarge, ContextTooLong, InvalidRequest, ModelNotFound, RequestError, RequestFailed
from shared.wire.wire_format import WireFormat

LATENCY_BUCKETS_S = tuple(
    round(mantissa * 10.0**exponent, 6) for exponent in range(-4, 2) for mantissa in (1, 1.5, 2, 3, 5, 7)
)
"""From 0.1 ms to 70 s, each at most 1.7 times the one before: so far may a quantile be off that lies between two."""

TOKEN_BUCKETS = tuple(float(2**n) for n in range(18))

# Labels that are counted from the start at 0: otherwise the first of a kind would not count as an increase.
REFUSALS: tuple[type[RequestError], ...] = (InvalidRequest, ContextTooLong, ModelNotFound, BodyTooLarge, RequestFailed)
HOLD_OUTCOMES = ("pulled", "failed", "expired", "withdrawn")
IGNORED_REASONS = ("undecodable", "other incarnation", "no such placement")


def process_registry() -> CollectorRegistry:
    """A registry for one process, which tells of the process itself already: CPU time, memory, open files, tasks."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Gauge("baton_asyncio_tasks", "Tasks of the event loop", registry=registry).set_function(_num_tasks)
    return registry


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no loop runs in the thread that asks
        return 0


class IngestMetrics:
    """What ingest counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.jobs = Counter("baton_jobs_total", "Jobs read from the topic ingest", registry=registry)
        self.jobs_ended_before = Counter(
            "baton_jobs_ended_before_total", "Jobs read again that had their result", registry=registry
        )
        self.rejected = Counter("baton_rejected_total", "Jobs refused", ["code"], registry=registry)
        for refusal in REFUSALS:
            self.rejected.labels(refusal.default_code or refusal.type)
        self.unknown_fields = Counter(
            "baton_unknown_fields_total",
            "Request fields that were ignored because nothing knows them",
            registry=registry,
        )
        self.undecodable = Counter(
            "baton_undecodable_records_total", "Records of ingest-resume that were skipped", registry=registry
        )
        self.placed = Counter("baton_placements_total", "Placements made", registry=registry)
        self.backlog = Gauge("baton_backlog_requests", "Choices admitted and not placed yet", registry=registry)
        self.place_seconds = Histogram(
            "baton_place_seconds",
            "From admission to the placement's open",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.feed_gaps = Counter(
            "baton_block_feed_gaps_total", "Gaps in workers' block feeds; their overlap is forgotten", registry=registry
        )


class WorkerMetrics:
    """What a worker counts; gauges are set at each beat from the engine's own statistics."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=registry).labels(model_name)

        self.num_running = gauge("vllm:num_requests_running", "Requests in the running batch")
        self.num_waiting = gauge("vllm:num_requests_waiting", "Requests waiting for a batch")
        self.kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.preemptions = counter("vllm:num_preemptions", "Requests that lost their pages and were computed again")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens, computed or found in the prefix cache")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self.free_pages = gauge("baton_kv_pages_free", "KV pages that a new request could take")
        self.total_pages = gauge("baton_kv_pages", "KV pages of the worker")
        self.held_requests = gauge("baton_kv_held_requests", "Requests whose KV waits for its decode worker")
        # Set by the engine's runner when asked. Each must stay 0: all running requests wait for such work.
        self.late_compiles = gauge("baton_late_compiles", "Kernels compiled since the worker was ready; must stay 0")
        self.late_captures = gauge("baton_late_captures", "Graphs captured since the worker was ready; must stay 0")
        self.late_allocations = gauge(
            "baton_late_allocations", "Times memory was asked of the GPU since the worker was ready; must stay 0"
        )
        self.step_seconds = histogram("baton_step_seconds", "Duration of one engine step", LATENCY_BUCKETS_S)
        self.step_tokens = histogram("baton_step_tokens", "Token rows of one engine step", TOKEN_BUCKETS)
        self.transfer_seconds = histogram(
            "baton_kv_pull_seconds",
            "From pull to usable pages, with what the prefill worker had still to compute",
            LATENCY_BUCKETS_S,
        )
        self.transfer_bytes = counter("baton_kv_pull_bytes", "KV bytes pulled from peers, as they lie in pages")
        self.transfers = Counter(
            "baton_kv_transfers_total",
            "Prompts whose KV was pulled, by the most lossy form in which any page came",
            ["model_name", "format"],
            registry=registry,
        )
        self.wire_bytes = Counter(
            "baton_kv_wire_bytes_total",
            "Bytes in which pulled KV travelled, by the most lossy form of its prompt",
            ["model_name", "format"],
            registry=registry,
        )
        for wire_format in WireFormat:
            self.transfers.labels(model_name, wire_format)
            self.wire_bytes.labels(model_name, wire_format)
        self.local_prefills = counter(
            "baton_local_prefills", "Prompts computed on the decode worker because the KV could not be pulled"
        )
        self.holds_ended = Counter(
            "baton_kv_holds_total", "How offers of KV ended", ["model_name", "outcome"], registry=registry
        )
        for outcome in HOLD_OUTCOMES:
            self.holds_ended.labels(model_name, outcome)
        self.ignored = Counter(
            "baton_ignored_records_total", "Slot records ignored", ["model_name", "reason"], registry=registry
        )
        for reason in IGNORED_REASONS:
            self.ignored.labels(model_name, reason)
        self.model_name = model_name

    def observe_pull(self, wire_format: WireFormat, *, seconds: float, kv_bytes: int, wire_bytes: int) -> None:
        """Count a pull that succeeded; `kv_bytes` as they lie in pages, `wire_bytes` as they travelled."""
        self.transfer_seconds.observe(seconds)
        self.transfer_bytes.inc(kv_bytes)
        self.transfers.labels(self.model_name, wire_format).inc()
        self.wire_bytes.labels(self.model_name, wire_format).inc(wire_bytes)

    def ignore(self, reason: str) -> None:
        """Count a record that means nothing here."""
        self.ignored.labels(self.model_name, reason).inc()
