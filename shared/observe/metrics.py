"""Metrics of the workers, of ingest and of every process, unit in the name; `vllm:*` where it means the same as there.

A metrics object belongs to one service in one process; its registry is passed in, so several may live side by side.
No label is a request id.
"""

import asyncio
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from shared.errors import BodyTooLarge, ContextTooLong, InvalidRequest, ModelNotFound, RequestError, RequestFailed
from shared.request import Priority
from shared.wire.wire_format import WireFormat

LATENCY_BUCKETS_S = tuple(
    round(mantissa * 10.0**exponent, 6) for exponent in range(-4, 2) for mantissa in (1, 1.5, 2, 3, 5, 7)
)
"""From 0.1 ms to 70 s, each at most 1.7 times the one before: so far may a quantile be off that lies between two."""

TOKEN_BUCKETS = tuple(float(2**n) for n in range(18))

# Labels that are counted from the start at 0: otherwise the first of a kind would not count as an increase.
REFUSALS: tuple[type[RequestError], ...] = (InvalidRequest, ContextTooLong, ModelNotFound, BodyTooLarge, RequestFailed)


class LocalPrefill(StrEnum):
    """Why a prompt is computed on the decode worker."""

    CHOSEN = "chosen"
    PULL_FAILED = "pull failed"


class PrefixFetch(StrEnum):
    """What became of a ticket to fetch a prompt's first pages from a peer."""

    WHOLE = "whole"
    """All that was lacking came."""
    PART = "part"
    """The peer had only the first of them."""
    GONE = "gone"
    """The peer had none of them any more, or it is this worker itself."""
    FAILED = "failed"
    """It broke off, was refused, or took longer than computing would."""
    NO_ROOM = "no room"
    """There were no pages to fetch into."""
    NEEDLESS = "needless"
    """Nothing was lacking that was not on its way."""


TOLD_QUANTILES = (0.5, 0.75, 0.9)
"""Of answers' predicted lengths: it is told how many answers they cover. Room is kept for the one in the middle."""

NO_SLOT = -1

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
            "baton_jobs_ended_before_total",
            "Jobs, and choices in line, that were not placed because their request had its result",
            registry=registry,
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
        backlog = Gauge(
            "baton_backlog_requests", "Choices admitted and not placed yet", ["priority"], registry=registry
        )
        self.backlog = {priority: backlog.labels(priority) for priority in Priority}
        self.parked = Gauge(
            "baton_batch_jobs_parked",
            "Batch jobs beyond those in the backlog, known by their place in the log only",
            registry=registry,
        )
        self.overtaken = Counter(
            "baton_backlog_overtakings_total",
            "Placements that went before the first in line, for which there was no room",
            registry=registry,
        )
        self.answers_learnt = Counter(
            "baton_answers_learnt_total", "Answers whose lengths predictions are made from", registry=registry
        )
        within = Counter(
            "baton_answers_within_prediction_total",
            "Answers learnt from that were no longer than a quantile of what was predicted of them before",
            ["quantile"],
            registry=registry,
        )
        self.answers_within = {quantile: within.labels(quantile) for quantile in TOLD_QUANTILES}
        self.results_passed_over = Counter(
            "baton_results_passed_over_total",
            "Results that nothing was learnt from: no answer, too long to read, or a stranger's",
            registry=registry,
        )
        self.place_seconds = Histogram(
            "baton_place_seconds",
            "From admission to the placement's open",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.local_threshold = Gauge(
            "baton_local_prefill_threshold_tokens",
            "Uncached prompt tokens below which the least loaded decode worker had better compute a prompt itself",
            registry=registry,
        )
        self.feed_gaps = Counter(
            "baton_block_feed_gaps_total", "Gaps in workers' block feeds; their overlap is forgotten", registry=registry
        )
        self.block_list_requests = Counter(
            "baton_block_list_requests_total",
            "Full lists of blocks asked of workers: after a gap, or of whom nothing was announced",
            registry=registry,
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

        self.slot = gauge("baton_worker_slot", "Slot that the worker holds, by which placements name it; -1: none")
        self.slot.set(NO_SLOT)
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
        self.host_pages = gauge("baton_host_cache_pages", "KV pages that have a copy in host memory")
        self.host_hits = counter("baton_host_cache_hits", "Tokens whose KV was brought back from host memory")
        self.saved_bytes = counter("baton_host_cache_saved_bytes", "KV bytes copied to host memory")
        self.restored_bytes = counter("baton_host_cache_restored_bytes", "KV bytes copied back from host memory")
        self.lost_blocks = counter(
            "baton_kv_lost_blocks", "Cached blocks whose page was given to another and that are not in host memory"
        )
        self.held_requests = gauge("baton_kv_held_requests", "Requests whose KV waits for its decode worker")
        # Set by the engine's runner when asked. Each must stay 0: all running requests wait for such work.
        self.late_compiles = gauge("baton_late_compiles", "Kernels compiled since the worker was ready; must stay 0")
        self.late_captures = gauge("baton_late_captures", "Graphs captured since the worker was ready; must stay 0")
        self.late_allocations = gauge(
            "baton_late_allocations", "Times memory was asked of the GPU since the worker was ready; must stay 0"
        )
        self.speeds = {
            "base": gauge(
                "baton_speed_base_seconds", "Measured time of any step; 0, as of all speeds: not measured yet"
            ),
            "row": gauge("baton_speed_row_seconds", "Measured time of a step for each decode row"),
            "context": gauge(
                "baton_speed_context_seconds", "Measured time of a step for each position that a decode row reads"
            ),
            "token": gauge("baton_speed_token_seconds", "Measured time of a step for each prompt token"),
            "pair": gauge(
                "baton_speed_pair_seconds",
                "Measured time of a step for each pair of a prompt token and a position that it attends to",
            ),
        }
        self.speed_error = gauge(
            "baton_speed_error_ratio", "How far off the measured speeds are for the middle one of all sizes of steps"
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
        self.local_prefills = Counter(
            "baton_local_prefills",
            "Prompts computed on the decode worker: as ingest chose, or because their KV could not be pulled",
            ["model_name", "cause"],
            registry=registry,
        )
        for cause in LocalPrefill:
            self.local_prefills.labels(model_name, cause)
        self.holds_ended = Counter(
            "baton_kv_holds_total", "How offers of KV ended", ["model_name", "outcome"], registry=registry
        )
        for outcome in HOLD_OUTCOMES:
            self.holds_ended.labels(model_name, outcome)
        self.prefix_fetches = Counter(
            "baton_prefix_fetches",
            "Prompts whose first pages were to come from a peer, by what became of it; what did not come was computed",
            ["model_name", "outcome"],
            registry=registry,
        )
        for outcome in PrefixFetch:
            self.prefix_fetches.labels(model_name, outcome)
        self.prefix_fetch_seconds = histogram(
            "baton_prefix_fetch_seconds",
            "From asking a peer for a prompt's first pages to having or giving them up",
            LATENCY_BUCKETS_S,
        )
        self.prefix_fetch_bytes = counter("baton_prefix_fetch_bytes", "KV bytes fetched, as they lie in pages")
        self.lent_pages = counter("baton_kv_lent_pages", "KV pages kept for peers that fetched them")
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

    def observe_fetch(self, outcome: PrefixFetch, *, seconds: float | None = None, kv_bytes: int = 0) -> None:
        """Count what became of a ticket; `seconds` from asking the peer on, if it was asked."""
        self.prefix_fetches.labels(self.model_name, outcome).inc()
        self.prefix_fetch_bytes.inc(kv_bytes)
        if seconds is not None:
            self.prefix_fetch_seconds.observe(seconds)

    def count_local_prefill(self, cause: LocalPrefill) -> None:
        """A prompt is computed on the decode worker."""
        self.local_prefills.labels(self.model_name, cause).inc()

    def ignore(self, reason: str) -> None:
        """Count a record that means nothing here."""
        self.ignored.labels(self.model_name, reason).inc()
