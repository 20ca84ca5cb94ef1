"""Writes Grafana's dashboard: `python -m infra.grafana.dashboard` makes `dashboards/baton.json` from the rows below.

A panel is what it asks Prometheus, in which unit, and a sentence on how to read it. The JSON around that is the same
for all of its kind, so it is made here and not kept by hand.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from shared.request import Event

FILE = Path(__file__).parent / "dashboards" / "baton.json"

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA_VERSION = 39
"""Of Grafana 11; later ones read it."""

GRID_COLUMNS = 24
BRIDGED_GAP_MS = 60_000
"""Quantiles have no value while nothing happens; over gaps up to this the line goes on."""

WORKER = "{{role}} {{instance}}"
LIVE = 'up{job="baton"}'
"""All processes; the job's name is from `infra/prometheus/prometheus.yml`."""


class Kind(StrEnum):
    """Grafana's names of its panels."""

    LINES = "timeseries"
    NUMBERS = "stat"
    BARS = "bargauge"
    HEATMAP = "heatmap"


class Unit(StrEnum):
    """Grafana's names of its units."""

    COUNT = "short"
    SECONDS = "s"
    BYTES = "bytes"
    BYTES_PER_S = "binBps"
    REQUESTS_PER_S = "reqps"
    TOKENS_PER_S = "si:tok/s"
    PER_S = "cps"
    SHARE = "percentunit"


LEAST_TOP = {Unit.COUNT: 1, Unit.PER_S: 0.1, Unit.REQUESTS_PER_S: 0.1}
"""An axis reaches at least so far; Grafana's own choice for what is always 0 is 100, as if much were expected."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        description: how to read it, for somebody who did not build this.
        width: of 24 columns.
        stacked: the series add up.
        most: upper end of the axis.
        bad_from: numbers from here on are red.
        empty: what is said when there is nothing to show.
        now: only the end of the time shown is asked for. What was and is no more would pass for what is.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: Unit = Unit.COUNT
    kind: Kind = Kind.LINES
    width: int = 8
    height: int = 7
    stacked: bool = False
    most: float | None = None
    bad_from: float | None = None
    empty: str = ""
    now: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, *by: str, window: str = "$__rate_interval") -> str:
    """Per second, added up over all but the labels `by`."""
    return f"{_sum(by)} (rate({metric}[{window}]))"


def quantile(share: float, metric: str, *by: str, window: str = "$__rate_interval", **where: str) -> str:
    """Of a histogram, over all but the labels `by`, where labels are as `where` says."""
    labels = ", ".join(f'{name}="{value}"' for name, value in where.items())
    chosen = f"{metric}_bucket{{{labels}}}" if labels else f"{metric}_bucket"
    return f"histogram_quantile({share}, {_sum(('le', *by))} (rate({chosen}[{window}])))"


def stages(share: float) -> list[Query]:
    """A quantile of each stage of a request's life, in the order of the life, as they are to be stacked."""
    passed = [*pairwise(Event), (Event.FIRST_TOKEN, Event.FINISHED)]
    return [
        Query(quantile(share, "baton_stage_seconds", stage=f"{before}_{after}"), f"{before} → {after}")
        for before, after in passed
    ]


def mean(metric: str, *by: str) -> str:
    """Of a histogram, over all but the labels `by`."""
    return f"{rate(f'{metric}_sum', *by)} / {rate(f'{metric}_count', *by)}"


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)})" if by else "sum"


def quantiles(metric: str, *by: str, shares: Sequence[float] = (0.5, 0.95, 0.99), legend: str = "") -> list[Query]:
    """One query for each of `shares`, called p50 and so on."""
    return [Query(quantile(share, metric, *by), f"p{share * 100:.0f} {legend}".strip()) for share in shares]


def lately(metric: str) -> list[Query]:
    """Median and p95 over the last minute; nothing, rather than NaN, if nothing happened in it."""
    return [Query(f"{quantile(share, metric, window='1m')} >= 0", f"p{share * 100:.0f}") for share in (0.5, 0.95)]


GLANCE = Row(
    "At a glance",
    [
        Panel(
            title="Alerts",
            description="What Prometheus holds to be wrong now, by infra/prometheus/rules.yml; each says what to look"
            " at.",
            queries=[Query('sum by (alertname) (ALERTS{alertstate="firing"})', "{{alertname}}")],
            kind=Kind.NUMBERS,
            width=4,
            height=5,
            bad_from=1,
            empty="none",
            now=True,
        ),
        Panel(
            title="Requests",
            description="Requests that ended, however they ended, per second over the last minute.",
            queries=[Query(rate("baton_requests_finished_total", window="1m"), "requests")],
            unit=Unit.REQUESTS_PER_S,
            kind=Kind.NUMBERS,
            width=3,
            height=5,
        ),
        Panel(
            title="Tokens made",
            description="Tokens generated by all workers, per second over the last minute.",
            queries=[Query(rate("vllm:generation_tokens_total", window="1m"), "tokens")],
            unit=Unit.TOKENS_PER_S,
            kind=Kind.NUMBERS,
            width=3,
            height=5,
        ),
        Panel(
            title="Time to first token",
            description="From the broker's acceptance of a request to its first token, of requests that ended in the "
            "last minute.",
            queries=lately("vllm:time_to_first_token_seconds"),
            unit=Unit.SECONDS,
            kind=Kind.NUMBERS,
            width=4,
            height=5,
            empty="no request",
            now=True,
        ),
        Panel(
            title="Time per token",
            description="Mean time per token behind the first, of answers that ended in the last minute.",
            queries=lately("vllm:request_time_per_output_token_seconds"),
            unit=Unit.SECONDS,
            kind=Kind.NUMBERS,
            width=4,
            height=5,
            empty="no request",
            now=True,
        ),
        Panel(
            title="Failed",
            description="Requests that failed for a reason of ours in the time shown. What clients cancelled, what "
            "was refused and what passed its deadline is under 'Requests by end'.",
            queries=[Query('sum(increase(baton_requests_finished_total{status="failed"}[$__range]))', "failed")],
            kind=Kind.NUMBERS,
            width=2,
            height=5,
            bad_from=0.5,
            now=True,
        ),
        Panel(
            title="Processes that answer",
            description="By role. A role without a number has nobody left.",
            queries=[Query(f"sum by (role) ({LIVE})", "{{role}}")],
            kind=Kind.NUMBERS,
            width=4,
            height=5,
            now=True,
        ),
        Panel(
            title="Requests by end",
            description="completed: stop, length. rejected: refused before they ran. expired: not done by their "
            "deadline. cancelled: by the client, or nobody was attached any more. failed: ours.",
            queries=[Query(rate("baton_requests_finished_total", "status"), "{{status}}")],
            unit=Unit.REQUESTS_PER_S,
            stacked=True,
        ),
        Panel(
            title="Tokens",
            description="Prompt tokens taken in (computed or found in a prefix cache) and tokens generated, by pool.",
            queries=[
                Query(rate("vllm:prompt_tokens_total", "role"), "prompt, {{role}}"),
                Query(rate("vllm:generation_tokens_total", "role"), "generated, {{role}}"),
            ],
            unit=Unit.TOKENS_PER_S,
        ),
        Panel(
            title="Answers by reason",
            description="Choices that ended well: stop is an end token or a stop string, length is max_tokens.",
            queries=[Query(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
            unit=Unit.REQUESTS_PER_S,
            stacked=True,
        ),
        Panel(
            title="Time to first token",
            description="From acceptance by the broker to the first token. Row Hops says where it goes.",
            queries=quantiles("vllm:time_to_first_token_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Time per token behind the first",
            description="Each answer's mean. It holds the hand-off from prefill to decode, which short answers feel "
            "most.",
            queries=quantiles("vllm:request_time_per_output_token_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Whole answer",
            description="From acceptance by the broker to the last token.",
            queries=quantiles("vllm:e2e_request_latency_seconds"),
            unit=Unit.SECONDS,
        ),
    ],
)

POOLS = Row(
    "Pools",
    [
        Panel(
            title="Slots",
            description="Which worker has which slot now: the numbers in a request's placement, and in the logs of "
            "ingest and edges. -1: none yet, or none any more.",
            queries=[Query("baton_worker_slot", WORKER)],
            kind=Kind.NUMBERS,
            width=24,
            height=4,
            now=True,
        ),
        Panel(
            title="Running",
            description="Requests in each worker's batch, as of its last beat (0.5 s).",
            queries=[Query("vllm:num_requests_running", WORKER)],
        ),
        Panel(
            title="Waiting",
            description="Requests that a worker has and that are not in its batch: no pages or no place. Lasting "
            "numbers in one pool say which pool is too small.",
            queries=[Query("vllm:num_requests_waiting", WORKER)],
        ),
        Panel(
            title="Engine busy",
            description="Share of the time in which the engine computes. Near 1: this worker can do no more.",
            queries=[Query(rate("baton_step_seconds_sum", "role", "instance"), WORKER)],
            unit=Unit.SHARE,
            most=1,
        ),
        Panel(
            title="Step time",
            description="One engine step. On a decode worker it is the time between two tokens of each running "
            "request.",
            queries=quantiles("baton_step_seconds", "role", "instance", shares=(0.5, 0.99), legend=WORKER),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Tokens per step",
            description="Mean number of token rows in a step: prompt tokens on prefill, running requests on decode.",
            queries=[Query(mean("baton_step_tokens", "role", "instance"), WORKER)],
        ),
        Panel(
            title="Computed again",
            description="Requests that lost their pages to others and start over, per second. Anything lasting here "
            "means too few pages.",
            queries=[Query(rate("vllm:num_preemptions_total", "role", "instance"), WORKER)],
            unit=Unit.PER_S,
        ),
        Panel(
            title="A step, as measured",
            description="What a worker's step takes at the least, and what a hundred prompt tokens and a hundred rows "
            "add, learnt from its own steps. Placements go by these speeds.",
            queries=[
                Query("baton_speed_base_seconds", f"{WORKER}: any step"),
                Query("100 * baton_speed_token_seconds", f"{WORKER}: 100 prompt tokens"),
                Query("100 * baton_speed_row_seconds", f"{WORKER}: 100 rows"),
            ],
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Attention, as measured",
            description="What 100,000 positions add to a step that rows read, and a million pairs of a prompt token "
            "and a position before it.",
            queries=[
                Query("100000 * baton_speed_context_seconds", f"{WORKER}: 100,000 positions"),
                Query("1000000 * baton_speed_pair_seconds", f"{WORKER}: a million pairs"),
            ],
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Error of the speeds",
            description="How far off the measured speeds are for the middle one of all sizes of steps that the worker "
            "has had. Much above 0.2: do not expect much of predicted times.",
            queries=[Query("baton_speed_error_ratio", WORKER)],
            unit=Unit.SHARE,
        ),
    ],
)

PLACEMENT = Row(
    "Placement",
    [
        Panel(
            title="Line, by class",
            description="Choices that ingest has admitted and could not place yet, as no worker has room. If "
            "interactive or standard grows, requests come faster than they are served. Batch waits there until "
            "workers are idle; what is beyond the first thousand of it is parked in the log.",
            queries=[
                Query("sum by (priority) (baton_backlog_requests)", "{{priority}}"),
                Query("sum (baton_batch_jobs_parked)", "batch, parked"),
            ],
        ),
        Panel(
            title="Time to place",
            description="From admission to the placement's record on stream-out: waiting in the backlog, one call to "
            "Redis, two appends to Kafka.",
            queries=quantiles("baton_place_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Overtakings and lengths learnt",
            description="Choices placed before the first in line, for which there was no room; answers whose lengths "
            "ingest learnt from, and results that told it of none. Each ingest learns from all.",
            queries=[
                Query(rate("baton_backlog_overtakings_total"), "overtakings"),
                Query(rate("baton_answers_learnt_total"), "answers learnt"),
                Query(rate("baton_results_passed_over_total"), "results passed over"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Time to first token over its prediction",
            description="From the placement on, of choices that ran where they were placed first. 1: as predicted. The "
            "hops of Kafka are not predicted: with a small model they make it larger. Placements take it that a third "
            "of all times is off by more than a factor of 1.35, one way or the other.",
            queries=quantiles("baton_ttft_prediction_ratio", shares=(0.1, 0.5, 0.9)),
        ),
        Panel(
            title="Time per token over its prediction",
            description="The same for the mean time of a choice's later tokens. Lasting medians far from 1: see 'Error "
            "of the speeds', and whether workers share their GPUs or cores with others.",
            queries=quantiles("baton_tpot_prediction_ratio", shares=(0.1, 0.5, 0.9)),
        ),
        Panel(
            title="Answers within their prediction",
            description="Share of answers no longer than a quantile of the lengths predicted for their like: 50, 75 "
            "and 90% if the predictions are right. Limits that cut answers raise them. Room is kept for the 75% "
            "quantile: far below it, workers run out of pages; see 'Computed again'.",
            queries=[
                Query(
                    f"{rate('baton_answers_within_prediction_total', 'quantile', window='5m')}"
                    f" / ignoring (quantile) group_left () {rate('baton_answers_learnt_total', window='5m')}",
                    "within the {{quantile}} quantile",
                )
            ],
            unit=Unit.SHARE,
            most=1,
        ),
        Panel(
            title="Computed on the decode worker",
            description="Prompts that the decode worker computed, by cause. chosen: the policy expected the first "
            "token sooner that way. pull failed should be nothing: such answers are right and late.",
            queries=[Query(rate('baton_local_prefills_total{role="decode"}', "cause"), "{{cause}}")],
            unit=Unit.PER_S,
            stacked=True,
        ),
        Panel(
            title="Computed there up to",
            description="Uncached prompt tokens below which the least loaded decode worker had better compute a prompt "
            "itself than leave it to the least loaded prefill worker. Each placement weighs its own.",
            queries=[Query("baton_local_prefill_threshold_tokens", "{{instance}}")],
        ),
        Panel(
            title="Prefixes to fetch",
            description="Prompts whose first pages were to come from a peer, by what became of it. What did not come "
            "was computed. gone and part: the peer had evicted them, and ingest had not heard of it.",
            queries=[Query(rate("baton_prefix_fetches_total", "outcome"), "{{outcome}}")],
            unit=Unit.PER_S,
            stacked=True,
        ),
    ],
)

QUEUES = Row(
    "Queues",
    [
        Panel(
            title="Through ingest",
            description="Jobs read, choices placed, and jobs refused by reason, per second.",
            queries=[
                Query(rate("baton_jobs_total"), "jobs read"),
                Query(rate("baton_placements_total"), "choices placed"),
                Query(rate("baton_rejected_total", "code"), "refused: {{code}}"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Records buffered",
            description="Records that a process has and Kafka has not acknowledged. More than a few for more than a "
            "moment: the broker is slow or away. Nothing is lost while there is room: 4096 records or 64 "
            "MiB a partition.",
            queries=[Query("sum by (role, topic) (baton_bus_records_buffered)", "{{role}} → {{topic}}")],
        ),
        Panel(
            title="Records behind",
            description="Records that Kafka has and their reader has not handled: the lag, counted by the reader "
            "itself. If it lasts, the reader's event loop is too busy.",
            queries=[Query("sum by (role, topic) (baton_bus_records_behind)", "{{topic}} → {{role}}")],
        ),
        Panel(
            title="Skipped",
            description="What was read and not acted on. ignored: for a worker that was there before, after a "
            "restart. Feed gaps: ingest missed news of a worker's cached blocks and places without them, until the "
            "full list comes that it asks for.",
            queries=[
                Query(rate("baton_ignored_records_total", "role", "reason"), "ignored by {{role}}: {{reason}}"),
                Query(rate("baton_undecodable_records_total", "role"), "undecodable, {{role}}"),
                Query(rate("baton_block_feed_gaps_total"), "feed gaps"),
                Query(rate("baton_block_list_requests_total"), "full lists asked for"),
            ],
            unit=Unit.PER_S,
        ),
    ],
)

HOPS = Row(
    "Hops",
    [
        Panel(
            title="Stages of a request, p50",
            description="From one event of a completed request's life to the next (docs/request_life.md). Stacked to "
            "compare them: the sum of medians is not the median of the sum.",
            queries=stages(0.5),
            unit=Unit.SECONDS,
            stacked=True,
            width=12,
            height=9,
        ),
        Panel(
            title="Stages of a request, p99",
            description="The same for the slowest in a hundred. placed → prefilling: waiting for the prefill worker. "
            "first_token → transferring: the token on its way to the decode worker. transferring → decoding: what is "
            "left of the KV, and the first step there.",
            queries=stages(0.99),
            unit=Unit.SECONDS,
            stacked=True,
            width=12,
            height=9,
        ),
        Panel(
            title="Frame age at the edge",
            description="How old a worker's frame of tokens is when an edge reads it: worker's buffer, broker, edge's"
            " loop. With clocks of two hosts it holds their skew.",
            queries=quantiles("baton_frame_age_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Hand-off gap",
            description="From a request's first token, by the prefill worker, to the first by its decode worker: what"
            " a client sees between tokens 1 and 2.",
            queries=quantiles("baton_handoff_gap_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Hand-off gap, all requests",
            description="How many hand-offs took how long. Two bands: two kinds of requests, or one worker that "
            "differs.",
            queries=[Query("sum by (le) (increase(baton_handoff_gap_seconds_bucket[$__rate_interval]))", "{{le}}")],
            unit=Unit.SECONDS,
            kind=Kind.HEATMAP,
        ),
    ],
)

KV = Row(
    "KV",
    [
        Panel(
            title="KV pulled",
            description="Bytes of KV per second that each decode worker pulls from prefill workers over UCX.",
            queries=[Query(rate('baton_kv_pull_bytes_total{role="decode"}', "role", "instance"), WORKER)],
            unit=Unit.BYTES_PER_S,
        ),
        Panel(
            title="KV on the wire",
            description="The same as it travelled, by the most lossy form in which a prompt's pages came. int8 and "
            "int4 appear only where BATON_MAX_WIRE_LOSS allows them and the link is slow.",
            queries=[Query(rate("baton_kv_wire_bytes_total", "format"), "{{format}}")],
            unit=Unit.BYTES_PER_S,
            stacked=True,
        ),
        Panel(
            title="Prompts pulled",
            description="Prompts whose KV was pulled, by that form. Answers to native ones are exact.",
            queries=[Query(rate("baton_kv_transfers_total", "format"), "{{format}}")],
            unit=Unit.PER_S,
            stacked=True,
        ),
        Panel(
            title="Pull time",
            description="From the pull to pages that can be used, for one request: most of it passes while prefill "
            "computes. What clients wait for is the stage transferring → decoding.",
            queries=quantiles("baton_kv_pull_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Link speed",
            description="What the self-test of each link to a prefill worker measured, and by which transport its bytes"
            " go. cuda_ipc is NVLink or PCIe between GPUs; tcp between GPUs of one host is a fault (docs/links.md).",
            queries=[Query("baton_kv_link_bytes_per_second", f"{WORKER} ← {{{{peer}}}} by {{{{transport}}}}")],
            unit=Unit.BYTES_PER_S,
        ),
        Panel(
            title="Link latency",
            description="Time of a message of few bytes over each link: each part of a pull costs it beside its bytes.",
            queries=[Query("baton_kv_link_latency_seconds", f"{WORKER} ← {{{{peer}}}} by {{{{transport}}}}")],
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Links amiss",
            description="Links below the floor that the operator set, and prefill workers that a decode worker has no "
            "link to. Both should be nothing; the worker's /health names the cause.",
            queries=[
                Query("sum by (role, instance) (baton_kv_link_below_floor)", f"below the floor, {WORKER}"),
                Query('baton_kv_links_missing{role="decode"}', f"missing, {WORKER}"),
            ],
        ),
        Panel(
            title="Pulls refused",
            description="Pulls and fetches that a worker did not serve, by reason. wrong_secret, wrong_puller, "
            "unproven_blocks, oversized and protocol come from no worker of ours; the others follow expired or "
            "withdrawn offers.",
            queries=[Query(rate("baton_kv_refusals_total", "reason"), "{{reason}}")],
            unit=Unit.PER_S,
            stacked=True,
        ),
        Panel(
            title="Fetch time",
            description="From asking a peer for a prompt's first pages to having them or giving them up. Computing "
            "them would have taken longer, or ingest was wrong about the link.",
            queries=quantiles("baton_prefix_fetch_seconds"),
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Prefixes fetched and lent",
            description="Bytes of KV per second that workers fetched from peers, and pages that each kept for them "
            "meanwhile.",
            queries=[
                Query(rate("baton_prefix_fetch_bytes_total", "role", "instance"), f"{WORKER} bytes"),
                Query(rate("baton_kv_lent_pages_total", "role", "instance"), f"{WORKER} pages lent"),
            ],
        ),
        Panel(
            title="Pages in use now",
            description="Share of each worker's KV pages that running and held requests have. Pages that only cache "
            "count as free.",
            queries=[Query("vllm:kv_cache_usage_perc", WORKER)],
            unit=Unit.SHARE,
            kind=Kind.BARS,
            most=1,
            bad_from=0.95,
            now=True,
        ),
        Panel(
            title="Pages free",
            description="KV pages that a new request could take, and how many there are in all, by worker.",
            queries=[
                Query("baton_kv_pages_free", f"free, {WORKER}"),
                Query("max by (role) (baton_kv_pages)", "all of one {{role}}"),
            ],
        ),
        Panel(
            title="Prefix cache hits",
            description="Share of prompt tokens whose KV the worker had already. On decode: tokens that need not be "
            "pulled.",
            queries=[
                Query(
                    f"{rate('vllm:prefix_cache_hits_total', 'role')}"
                    f" / {rate('vllm:prefix_cache_queries_total', 'role')}",
                    "{{role}}",
                )
            ],
            unit=Unit.SHARE,
            most=1,
        ),
        Panel(
            title="Cached blocks that left the GPU",
            description="Tokens brought back from host memory, which nobody had to compute again, and cached tokens "
            "that are gone: their page was given to others, and host memory has no copy.",
            queries=[
                Query(rate("baton_host_cache_hits_total", "role"), "brought back, {{role}}"),
                Query(f"64 * {rate('baton_kv_lost_blocks_total', 'role')}", "gone, {{role}}"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Host memory",
            description="KV pages that have a copy in host memory, by worker (BATON_HOST_CACHE_GB).",
            queries=[Query("baton_host_cache_pages", WORKER)],
        ),
        Panel(
            title="Copies to and from host memory",
            description="They run beside the steps, over PCIe, which carries about 55 GB/s each way.",
            queries=[
                Query(rate("baton_host_cache_saved_bytes_total", "role"), "to the host, {{role}}"),
                Query(rate("baton_host_cache_restored_bytes_total", "role"), "from the host, {{role}}"),
            ],
            unit=Unit.BYTES_PER_S,
        ),
        Panel(
            title="Held for decode",
            description="Requests whose KV waits on its prefill worker to be pulled. If it only grows, nobody pulls.",
            queries=[Query('baton_kv_held_requests{role="prefill"}', WORKER)],
        ),
        Panel(
            title="How holds ended",
            description="pulled: the decode worker has it. Everything else (expired, failed, withdrawn) means that KV"
            " was made in vain.",
            queries=[Query(rate("baton_kv_holds_total", "outcome"), "{{outcome}}")],
            unit=Unit.PER_S,
            stacked=True,
        ),
        Panel(
            title="Prompt tokens not computed",
            description="Of prompt tokens of finished requests, the share that no worker had to compute: the prefix "
            "caches' worth over all.",
            queries=[
                Query(f"{rate('baton_cached_prompt_tokens_total')} / {rate('baton_prompt_tokens_total')}", "cached"),
            ],
            unit=Unit.SHARE,
            most=1,
        ),
    ],
)

EDGES = Row(
    "Edges and recovery",
    [
        Panel(
            title="Streams open",
            description="Answers being streamed to clients now, by edge.",
            queries=[Query("baton_streams_open", WORKER)],
        ),
        Panel(
            title="HTTP answers",
            description="By status, over all routes. 4xx: the client's. 429 and 503: too much now. 500: ours.",
            queries=[Query(rate("baton_http_answers_total", "status"), "{{status}}")],
            unit=Unit.REQUESTS_PER_S,
        ),
        Panel(
            title="Refused at the door",
            description="By cause. wait: it would have waited too long, in line or for room in decode. run: beside "
            "those that run, its answer would have come after its deadline. streams: BATON_MAX_STREAMS clients at "
            "once. concurrent, requests, tokens: a tenant's limits. not asked: Redis was away, so nobody was refused.",
            queries=[
                Query(rate("baton_edge_refused_total", "reason"), "{{reason}}"),
                Query(rate("baton_edge_unlimited_total"), "not asked"),
            ],
            unit=Unit.REQUESTS_PER_S,
        ),
        Panel(
            title="Clients",
            description="gone: left before their answer was complete. resumed: came back with Last-Event-ID. "
            "elsewhere: asked for a request whose partition another edge owns.",
            queries=[
                Query(rate("baton_clients_gone_total"), "gone"),
                Query(rate("baton_streams_resumed_total"), "resumed"),
                Query(rate("baton_followers_total"), "elsewhere"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Partitions owned",
            description="Of the 16 of stream-out, by edge. They must add up to 16: what nobody owns has no results.",
            queries=[Query("baton_stream_out_partitions", WORKER)],
            stacked=True,
        ),
        Panel(
            title="Cuts",
            description="Placements that owners ended, by reason: deadlines, clients that went.",
            queries=[Query(rate("baton_cuts_written_total", "reason"), "{{reason}}")],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Recovery",
            description="Partitions taken over by another edge, choices placed again on other workers, and workers "
            "told to stop what nobody wants. lost: placements whose worker is no more, by role. given up: requests "
            "that lost workers three times, kept on dead-letter.",
            queries=[
                Query(rate("baton_take_overs_total"), "partitions taken over"),
                Query(rate("baton_placed_again_total"), "choices placed again"),
                Query(rate("baton_stops_total"), "workers told to stop"),
                Query(rate("baton_placements_lost_total", "lost"), "lost: {{lost}}"),
                Query(rate("baton_dead_letters_total"), "given up"),
            ],
            unit=Unit.PER_S,
        ),
    ],
)

PROCESSES = Row(
    "Processes",
    [
        Panel(
            title="CPU",
            description="Cores each process uses. Edge and ingest have one event loop each: near 1 they are at their "
            "limit.",
            queries=[Query('rate(process_cpu_seconds_total{job="baton"}[$__rate_interval])', WORKER)],
        ),
        Panel(
            title="Memory",
            description="Resident memory of each process, without its GPU's.",
            queries=[Query('process_resident_memory_bytes{job="baton"}', WORKER)],
            unit=Unit.BYTES,
        ),
        Panel(
            title="Age",
            description="Time since each process started. A line that falls to 0 is a restart.",
            queries=[Query('time() - process_start_time_seconds{job="baton"}', WORKER)],
            unit=Unit.SECONDS,
        ),
        Panel(
            title="Kafka clients replaced",
            description="Connections to Kafka that were given up for new ones, because they failed or stood still. A "
            "broker that restarts costs a few; a steady flow is a fault.",
            queries=[
                Query(rate("baton_bus_producers_replaced_total", "role"), "producers, {{role}}"),
                Query(rate("baton_bus_consumers_replaced_total", "role"), "consumers, {{role}}"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Appends made again",
            description="Appends to Kafka that failed and were repeated, per second and role.",
            queries=[Query(rate("baton_bus_failed_appends_total", "role"), "{{role}}")],
            unit=Unit.PER_S,
        ),
        Panel(
            title="Of another version",
            description="Workers and ingests whose word about themselves a process cannot read, and passes over. For "
            "a moment in a rolling update it may be so; what lasts gets no work.",
            queries=[Query("max by (role, kind) (baton_unreadable_reports)", "{{kind}}s, by {{role}}")],
        ),
        Panel(
            title="Open files",
            description="Sockets and files of each process: an edge has one for each client.",
            queries=[Query('process_open_fds{job="baton"}', WORKER)],
        ),
        Panel(
            title="Tasks",
            description="Tasks of each process's event loop: they come and go with requests, and must not only come.",
            queries=[Query('baton_asyncio_tasks{job="baton"}', WORKER)],
        ),
    ],
)

ROWS = (GLANCE, POOLS, PLACEMENT, QUEUES, HOPS, KV, EDGES, PROCESSES)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "baton",
        "title": "Baton",
        "description": "Prefill and decode on separate workers, over Kafka, Redis and UCX.",
        "tags": ["baton"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": _laid_out(ROWS),
    }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows from top to bottom, their panels from left to right."""
    made: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": GRID_COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > GRID_COLUMNS:
                y, x, height = y + height, 0, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            made.append({"id": len(made) + 1, "gridPos": place, **_panel(panel)})
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return made


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [_target(panel, query, ref) for query, ref in zip(panel.queries, ascii_uppercase, strict=False)],
        "fieldConfig": {"defaults": _field(panel), "overrides": _overrides(panel)},
        "options": _options(panel),
    }


def _target(panel: Panel, query: Query, ref: str) -> dict[str, Any]:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": panel.now,
        "range": not panel.now,
        **({"format": "heatmap"} if panel.kind is Kind.HEATMAP else {}),
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green" if panel.bad_from is not None else "text", "value": None}]
    if panel.bad_from is not None:
        steps.append({"color": "red", "value": panel.bad_from})
    field: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind in {Kind.NUMBERS, Kind.BARS} else "palette-classic"},
    }
    if panel.most is not None:
        field["max"] = panel.most
    if panel.empty:
        field["noValue"] = panel.empty
    if panel.kind is Kind.LINES:
        field["custom"] = {
            "drawStyle": "line",
            # Areas have no lines: on a stack, that of a series at 0 would cover the one below it.
            "lineWidth": 0 if panel.stacked else 1,
            "fillOpacity": 60 if panel.stacked else 5,
            "showPoints": "never" if panel.stacked else "auto",
            "pointSize": 3,
            "spanNulls": BRIDGED_GAP_MS,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        if panel.unit in LEAST_TOP:
            field["custom"]["axisSoftMax"] = LEAST_TOP[panel.unit]
    return field


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    """Ends have the colours that one expects of them."""
    if not any("{{status}}" in query.legend and "finished" in query.expr for query in panel.queries):
        return []
    colours = {
        "completed": "green",
        "failed": "red",
        "expired": "orange",
        "rejected": "yellow",
        "cancelled": "blue",
    }
    return [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for name, colour in colours.items()
    ]


def _options(panel: Panel) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case Kind.LINES:
            return {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case Kind.NUMBERS:
            many = len(panel.queries) > 1 or "{{" in panel.queries[0].legend
            return {
                "reduceOptions": last,
                "colorMode": "value",
                "graphMode": "none" if panel.now else "area",
                "textMode": "value_and_name" if many else "value",
                "justifyMode": "center",
                "orientation": "auto",
            }
        case Kind.BARS:
            return {
                "reduceOptions": last,
                "displayMode": "basic",
                "orientation": "horizontal",
                "valueMode": "color",
                "showUnfilled": True,
            }
        case Kind.HEATMAP:
            return {
                "calculate": False,
                "cellGap": 1,
                "color": {"mode": "scheme", "scheme": "Blues", "steps": 32, "reverse": False},
                "filterValues": {"le": 1e-9},
                "legend": {"show": True},
                "tooltip": {"mode": "single", "yHistogram": False},
                "yAxis": {"axisPlacement": "left", "unit": panel.unit},
            }


def text() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
