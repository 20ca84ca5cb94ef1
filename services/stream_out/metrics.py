"""What the edge counts; `vllm:*` where it means the same as there. No label is a request id."""

from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.stream_out.results import COMPLETED, WORKER_LOST, WORKERS_LOST, timings_of
from shared.observe.metrics import LATENCY_BUCKETS_S
from shared.policy.admission import TooLate
from shared.policy.fold import ChoiceState, RequestState
from shared.request import Event
from shared.state.port import Role
from shared.wire.explanation import Candidate
from shared.wire.openai_answers import ENDS_AS_ERROR, Usage

FRAME_AGE_BUCKETS_S = (*(n / 4000 for n in range(1, 21)), *(bound for bound in LATENCY_BUCKETS_S if bound > 0.005))
"""Up to 5 ms in steps of 0.25 ms: a frame should take about one."""

STAGE_BUCKETS_S = tuple(round(mantissa * 10.0**exponent, 6) for exponent in range(-4, 2) for mantissa in (1, 2, 5))
"""From 0.1 ms to 50 s, coarser than other latencies: a request has eight stages, and a scrape holds up the loop that
reads frames for some 6 µs a bucket."""

RATIO_BUCKETS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 3.0, 5.0, 10.0)
"""Of a time to the one that was predicted."""

CUT_REASONS = ("deadline", "client gone", WORKER_LOST, WORKERS_LOST)
"""Why an owner cuts."""

REFUSAL_REASONS = (*TooLate, "streams", "concurrent", "requests", "tokens")
"""What an edge refuses by: the forecast, its own clients at once, a tenant's limits."""


class EdgeMetrics:
    """Metrics of one edge."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def latency(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=LATENCY_BUCKETS_S, registry=registry)

        def ratio(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=RATIO_BUCKETS, registry=registry)

        self.http_answers = counter("baton_http_answers", "HTTP answers", "route", "status")
        self.unknown_fields = counter("baton_edge_unknown_fields", "Request fields that were ignored as unknown")
        self.streams = Gauge("baton_streams_open", "Streams being sent now", registry=registry)
        self.resumed = counter("baton_streams_resumed", "Streams that went on behind an event")
        self.clients_gone = counter("baton_clients_gone", "Clients that left before their answer was complete")
        self.refused = counter("baton_edge_refused", "Requests refused before they were accepted", "reason")
        for reason in REFUSAL_REASONS:
            self.refused.labels(reason)  # from the start, as above
        self.unlimited = counter("baton_edge_unlimited", "Requests for which Redis could not be asked about limits")
        self.admission_blind = Gauge("baton_edge_blind", "1: Redis is away, no limit holds", registry=registry)
        self.tenants_outdated = Gauge(
            "baton_edge_tenants_outdated", "1: the changed file of tenants cannot be read", registry=registry
        )
        self.partitions = Gauge("baton_stream_out_partitions", "Partitions of stream-out owned", registry=registry)
        self.take_overs = counter("baton_take_overs", "Partitions of stream-out taken over")
        self.followers = counter("baton_followers", "Requests read from partitions that this edge does not own")
        self.undecodable = counter("baton_undecodable_records", "Records of stream-out that were skipped")
        self.cuts = counter("baton_cuts_written", "Cuts that the owner wrote", "reason")
        for reason in CUT_REASONS:
            self.cuts.labels(reason)  # from the start, or the first of its kind would not count as an increase
        self.resumes = counter("baton_placed_again", "Choices sent back to ingest to be placed again")
        self.placements_lost = counter("baton_placements_lost", "Placements cut because their worker was lost", "lost")
        for role in Role:
            self.placements_lost.labels(role)  # from the start, as above
        self.dead_letters = counter("baton_dead_letters", "Requests given up after too many losses, kept for operators")
        self.stops = counter("baton_stops", "Workers told to stop void work")
        self.finished = counter("baton_requests_finished", "Requests whose result was written", "status")
        for status in (COMPLETED, *sorted(ENDS_AS_ERROR)):
            self.finished.labels(status)  # from the start, as above
        self.success = counter(
            "vllm:request_success", "Choices that ended by a token or their length", "finished_reason"
        )
        self.prompt_tokens = counter("baton_prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = counter("baton_cached_prompt_tokens", "Prompt tokens of them whose KV was found")
        self.answer_tokens = counter("baton_answer_tokens", "Answer tokens of finished requests")
        self.ttft = latency("vllm:time_to_first_token_seconds", "From acceptance to the first token")
        self.tpot = latency(
            "vllm:request_time_per_output_token_seconds", "A choice's mean time per token behind its first"
        )
        self.e2e = latency("vllm:e2e_request_latency_seconds", "From acceptance to the last token")
        self.ttft_ratio = ratio(
            "baton_ttft_prediction_ratio", "Time from a placement to the first token, over what the placement predicted"
        )
        self.tpot_ratio = ratio(
            "baton_tpot_prediction_ratio", "A choice's mean time per token behind its first, over what was predicted"
        )
        self.stages = Histogram(
            "baton_stage_seconds",
            "From one event of a completed request's life to the next that it passed",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self.frame_age = Histogram(
            "baton_frame_age_seconds",
            "From the end of the step that made a frame to its reading here",
            buckets=FRAME_AGE_BUCKETS_S,
            registry=registry,
        )
        self.handoff_gap = latency(
            "baton_handoff_gap_seconds", "From the prefill worker's first token to the decode worker's first"
        )

    def observe_end(self, state: RequestState, status: str, delivered_s: float) -> None:
        """Count a request whose result was written, acknowledged at `delivered_s` (unix seconds)."""
        self.finished.labels(status).inc()
        stamps = timings_of(state)
        _observe(self.ttft, stamps, Event.ACCEPTED, Event.FIRST_TOKEN)
        _observe(self.e2e, stamps, Event.ACCEPTED, Event.FINISHED)
        if status == COMPLETED:
            stamps[Event.DELIVERED] = delivered_s
            for before, after in pairwise(stamps):
                _observe(self.stages.labels(f"{before}_{after}"), stamps, before, after)
            for choice in state.choices.values():
                self._observe_choice(choice)

    def _observe_choice(self, choice: ChoiceState) -> None:
        assert choice.end is not None, "the request completed"
        stamps = choice.stamps
        if Event.TRANSFERRING in stamps:  # who computed the prompt may have gone on itself
            _observe(self.handoff_gap, stamps, Event.FIRST_TOKEN, Event.DECODING)
        self.success.labels(choice.end.finish).inc()
        predicted = _predicted(choice)
        if predicted is not None and Event.PLACED in stamps and Event.FIRST_TOKEN in stamps:
            took_s = max(0.0, stamps[Event.FIRST_TOKEN] - stamps[Event.PLACED])
            self.ttft_ratio.observe(took_s / predicted.ttft_s)
        num_gaps = len(choice.ids) - 1
        if num_gaps > 0 and Event.FIRST_TOKEN in stamps and Event.FINISHED in stamps:
            token_s = max(0.0, stamps[Event.FINISHED] - stamps[Event.FIRST_TOKEN]) / num_gaps
            self.tpot.observe(token_s)
            if predicted is not None:
                self.tpot_ratio.observe(token_s / predicted.tpot_s)

    def observe_usage(self, usage: Usage) -> None:
        """Count the tokens of a request whose result was written."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.answer_tokens.inc(usage.completion_tokens)


def _observe(histogram: Histogram, stamps: dict[Event, float], start: Event, end: Event) -> None:
    """The time from `start` to `end`, if both were passed; by clocks of two hosts it may seem negative."""
    if start in stamps and end in stamps:
        histogram.observe(max(0.0, stamps[end] - stamps[start]))


def _predicted(choice: ChoiceState) -> Candidate | None:
    """What its placement expected, if it ran where it was placed first."""
    if len(choice.opens) != 1 or choice.opens[0].explanation is None:
        return None
    best = next(iter(choice.opens[0].explanation.candidates), None)
    return best if best is not None and best.ttft_s > 0 and best.tpot_s > 0 else None
