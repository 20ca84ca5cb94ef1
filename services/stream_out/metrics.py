"""What the edge counts; `vllm:*` where it means the same as there. No label is a request id."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.observe.metrics import LATENCY_BUCKETS_S
from shared.policy.fold import RequestState
from shared.request import Event
from shared.wire.openai_answers import Usage


class EdgeMetrics:
    """Metrics of one edge."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def latency(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=LATENCY_BUCKETS_S, registry=registry)

        self.http_answers = counter("baton_http_answers", "HTTP answers", "route", "status")
        self.unknown_fields = counter("baton_edge_unknown_fields", "Request fields that were ignored as unknown")
        self.streams = Gauge("baton_streams_open", "Streams being sent now", registry=registry)
        self.resumed = counter("baton_streams_resumed", "Streams that went on behind an event")
        self.clients_gone = counter("baton_clients_gone", "Clients that left before their answer was complete")
        self.partitions = Gauge("baton_stream_out_partitions", "Partitions of stream-out owned", registry=registry)
        self.take_overs = counter("baton_take_overs", "Partitions of stream-out taken over")
        self.followers = counter("baton_followers", "Requests read from partitions that this edge does not own")
        self.undecodable = counter("baton_undecodable_records", "Records of stream-out that were skipped")
        self.cuts = counter("baton_cuts_written", "Cuts that the owner wrote", "reason")
        self.resumes = counter("baton_placed_again", "Choices sent back to ingest to be placed again")
        self.stops = counter("baton_stops", "Workers told to stop void work")
        self.finished = counter("baton_requests_finished", "Requests whose result was written", "status")
        self.prompt_tokens = counter("baton_prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = counter("baton_cached_prompt_tokens", "Prompt tokens of them whose KV was found")
        self.answer_tokens = counter("baton_answer_tokens", "Answer tokens of finished requests")
        self.ttft = latency("vllm:time_to_first_token_seconds", "From acceptance to the first token")
        self.e2e = latency("vllm:e2e_request_latency_seconds", "From acceptance to the last token")

    def observe_end(self, state: RequestState, status: str) -> None:
        """Count a request whose result was written."""
        self.finished.labels(status).inc()
        stamps = state.stamps
        accepted_s = stamps.get(Event.ACCEPTED)
        for histogram, event in ((self.ttft, Event.FIRST_TOKEN), (self.e2e, Event.FINISHED)):
            if accepted_s is not None and event in stamps:
                histogram.observe(max(0.0, stamps[event] - accepted_s))

    def observe_usage(self, usage: Usage) -> None:
        """Count the tokens of a request whose result was written."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.answer_tokens.inc(usage.completion_tokens)
