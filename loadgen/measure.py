"""From what was seen of each request to the numbers of a report.

Latencies count from the *intended* time of a request, so that a client or server that stalls cannot hide the wait of
those that should have been sent meanwhile; the same from the send stand beside them.

    TTFT   first piece with tokens - intended time
    TPOT   (last piece - first piece) / (tokens - 1), for two tokens or more
    ITL    every gap between two pieces, all requests together; per token: divided by the request's tokens per gap
    E2E    last piece - intended time (Kafka: arrival of the result - intended time)
    hand-off gap   second piece - first piece: there the request goes from prefill to decode
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import floor
from statistics import fmean, pstdev

from loadgen.client import Observation
from loadgen.schedule import ScheduledRow
from shared.request import Event

COMPLETED = "completed"
DUPLICATE = "duplicate"

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the schedule and what became of it; times are seconds after the start of the run.

    Attributes:
        bucket: `completed` or the label of its failure.
        detail: what is known of a failure.
        prompt_tokens: of the prompt that was sent, by the local count; None for a row that was never made.
        ended_s: when it was over, well or not; None for a row that was never sent.
        gaps_s: between successive pieces of the answer.
        stamps: the server's, in unix seconds.
    """

    row: ScheduledRow
    bucket: str
    detail: str
    prompt_tokens: int | None
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    answered_s: float | None
    ended_s: float | None
    gaps_s: tuple[float, ...]
    served_prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    stamps: Mapping[Event, float]

    @property
    def completed(self) -> bool:
        return self.bucket == COMPLETED

    @property
    def lateness_s(self) -> float | None:
        """How long after its time it was sent."""
        return _since(self.row.at_s, self.sent_s)

    @property
    def ttft_s(self) -> float | None:
        return _since(self.row.at_s, self.first_token_s)

    @property
    def ttft_from_send_s(self) -> float | None:
        return _since(self.sent_s, self.first_token_s)

    @property
    def e2el_s(self) -> float | None:
        return _since(self.row.at_s, self.answered_s)

    @property
    def e2el_from_send_s(self) -> float | None:
        return _since(self.sent_s, self.answered_s)

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token: it has no second one to wait for."""
        total_s = _since(self.first_token_s, self.last_token_s)
        if total_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return total_s / (self.output_tokens - 1)

    @property
    def handoff_s(self) -> float | None:
        return self.gaps_s[0] if self.gaps_s else None

    @property
    def gaps_per_token_s(self) -> list[float]:
        """The gaps, each divided by the mean number of tokens that a gap of this answer brought."""
        if not self.gaps_s or self.output_tokens is None or self.output_tokens < 2:
            return []
        tokens_per_gap = (self.output_tokens - 1) / len(self.gaps_s)
        return [gap / tokens_per_gap for gap in self.gaps_s]


def bucket_of_answer(seen: Observation, wanted_tokens: int, *, exact_length: bool) -> str:
    """The bucket of an exchange that ended well in itself."""
    if seen.duplicated:
        return DUPLICATE
    if seen.output_tokens is None:
        return "no_usage"
    if seen.output_tokens > wanted_tokens or (exact_length and seen.output_tokens != wanted_tokens):
        return "wrong_length"
    return COMPLETED


def record_of(
    row: ScheduledRow,
    seen: Observation,
    *,
    started_s: float,
    ended_s: float | None,
    prompt_tokens: int | None,
    bucket: str,
    detail: str,
) -> Record:
    """The record of `row`. A contradicting second answer that came after the first makes it a duplicate."""
    return Record(
        row=row,
        bucket=DUPLICATE if seen.duplicated and bucket == COMPLETED else bucket,
        detail=detail,
        prompt_tokens=prompt_tokens,
        sent_s=_since(started_s, seen.sent_s),
        first_token_s=_since(started_s, seen.first_token_s),
        last_token_s=_since(started_s, seen.last_token_s),
        answered_s=_since(started_s, seen.answered_s),
        ended_s=_since(started_s, ended_s),
        gaps_s=tuple(seen.gaps_s),
        served_prompt_tokens=seen.prompt_tokens,
        output_tokens=seen.output_tokens,
        cached_tokens=seen.cached_tokens,
        finish_reason=seen.finish_reason,
        stamps=dict(seen.stamps),
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one quantity over many requests. `std` is the population's; percentiles interpolate linearly."""

    count: int
    mean: float
    std: float
    percentiles: Mapping[int, float]

    @property
    def median(self) -> float:
        return self.percentiles[50]


def summarise(values: Iterable[float | None]) -> Summary | None:
    """The summary of all values that are not None; None if there is none."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Summary(len(known), fmean(known), pstdev(known), {p: percentile(known, p) for p in PERCENTILES})


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, by linear interpolation between the two nearest."""
    place = (len(ascending) - 1) * percent / 100
    below = floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds; a good request meets all that are set.

    A request whose limited quantity could not be measured misses it, but for TPOT of a single token, which counts as 0.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def missed(self, record: Record) -> list[str]:
        """Names of the limits that a completed request missed."""
        tpot_s = 0.0 if record.output_tokens == 1 else record.tpot_s
        held_against = {
            "ttft": (record.ttft_s, self.ttft_ms),
            "tpot": (tpot_s, self.tpot_ms),
            "e2el": (record.e2el_s, self.e2el_ms),
        }
        return [
            name
            for name, (value_s, limit_ms) in held_against.items()
            if limit_ms is not None and (value_s is None or value_s * 1000 > limit_ms)
        ]


@dataclass(frozen=True, slots=True)
class Attainment:
    """How many of all intended rows were good.

    Attributes:
        missed: completed rows by the limit they missed; a row may have missed several.
    """

    good: int
    share: float
    missed: Mapping[str, int]


def attainment(records: Sequence[Record], slo: Slo) -> Attainment:
    """Shares are of all rows of the schedule: a request that failed, or was never sent, is not good."""
    missed: Counter[str] = Counter()
    good = 0
    for record in records:
        if record.completed:
            misses = slo.missed(record)
            missed.update(misses)
            good += not misses
    return Attainment(good, good / len(records) if records else 0.0, dict(missed))


QUANTITIES: Mapping[str, Callable[[Record], Iterable[float | None]]] = {
    "ttft": lambda record: (record.ttft_s,),
    "tpot": lambda record: (record.tpot_s,),
    "itl": lambda record: record.gaps_s,
    "e2el": lambda record: (record.e2el_s,),
    "itl_per_token": lambda record: record.gaps_per_token_s,
    "handoff": lambda record: (record.handoff_s,),
    "ttft_from_send": lambda record: (record.ttft_from_send_s,),
    "e2el_from_send": lambda record: (record.e2el_from_send_s,),
}
"""What is summarised over the completed requests, in seconds."""


@dataclass(frozen=True, slots=True)
class Results:
    """The numbers of one run.

    Attributes:
        duration_s: from the start of the run to the end of the last row.
        buckets: rows by what became of them, `completed` first; they sum to the schedule.
        latencies: summaries in seconds by the names of `QUANTITIES`.
        lateness: of every send, in seconds.
        total_input_tokens, total_output_tokens, total_cached_tokens: of completed rows, by the server's count.
        prompts_off: rows whose prompt the local tokeniser could not make exact.
        counts_differ: completed rows whose prompt the server counted otherwise than it was asked for.
        stages: seconds between successive events of the server, in the order of a request's life.
    """

    duration_s: float
    buckets: Mapping[str, int]
    latencies: Mapping[str, Summary | None]
    lateness: Summary | None
    attainment: Attainment
    total_input_tokens: int
    total_output_tokens: int
    total_cached_tokens: int
    prompts_off: int
    counts_differ: int
    max_concurrent_requests: int
    stages: Mapping[str, Summary]

    @property
    def completed(self) -> int:
        return self.buckets.get(COMPLETED, 0)

    @property
    def failed(self) -> int:
        """Rows that were not completed, those never sent included."""
        return sum(self.buckets.values()) - self.completed


def measure(records: Sequence[Record], slo: Slo, duration_s: float, started_unix_s: float) -> Results:
    """The numbers of a run from the records of all its rows.

    `started_unix_s` is the start of the run in unix time; it ties the server's stamps to the client's times.
    """
    done = [record for record in records if record.completed]
    counts = Counter(record.bucket for record in records)
    return Results(
        duration_s=duration_s,
        buckets={COMPLETED: counts.pop(COMPLETED, 0), **dict(counts.most_common())},
        latencies={
            name: summarise(value for record in done for value in values(record)) for name, values in QUANTITIES.items()
        },
        lateness=summarise(record.lateness_s for record in records),
        attainment=attainment(records, slo),
        total_input_tokens=sum(record.served_prompt_tokens or 0 for record in done),
        total_output_tokens=sum(record.output_tokens or 0 for record in done),
        total_cached_tokens=sum(record.cached_tokens or 0 for record in done),
        prompts_off=sum(record.prompt_tokens not in (None, record.row.input_tokens) for record in records),
        counts_differ=sum(record.served_prompt_tokens != record.prompt_tokens for record in done),
        max_concurrent_requests=_max_concurrent(records),
        stages=stage_times(done, started_unix_s),
    )


SENT = "sent"
RECEIVED = "received"
STAGE_EVENTS = (SENT, *(event.value for event in Event if event is not Event.DELIVERED), RECEIVED)
"""The ends of stages, in the order of a request's life.

`delivered` is written behind the client's back, before or after its last piece: it is no stage of its wait.
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """What lay between two successive events of one request; times are seconds after the start of the run."""

    earlier: str
    later: str
    from_s: float
    to_s: float

    @property
    def name(self) -> str:
        return f"{self.earlier} → {self.later}"

    @property
    def took_s(self) -> float:
        return self.to_s - self.from_s

    @property
    def place(self) -> tuple[int, int]:
        """Sorts stages in the order of a request's life."""
        return STAGE_EVENTS.index(self.earlier), STAGE_EVENTS.index(self.later)


def stages_of(record: Record, started_unix_s: float) -> list[Stage]:
    """What lay between each two successive events that the request has stamps for, the client's ends included.

    Empty without stamps, or without an answer. The server's stamps and the client's two ends are by the clocks of their
    hosts: their skew is in the differences.
    """
    if not record.stamps or record.sent_s is None or record.answered_s is None:
        return []
    stamps = {event.value: at_s - started_unix_s for event, at_s in record.stamps.items()}
    moments = {SENT: record.sent_s, **stamps, RECEIVED: record.answered_s}
    known = [(name, moments[name]) for name in STAGE_EVENTS if name in moments]
    return [Stage(earlier, later, from_s, to_s) for (earlier, from_s), (later, to_s) in pairwise(known)]


def stage_times(records: Iterable[Record], started_unix_s: float) -> dict[str, Summary]:
    """Seconds of each kind of stage over all requests, in the order of a request's life."""
    stages = sorted((stage for record in records for stage in stages_of(record, started_unix_s)), key=_place)
    summaries = {name: summarise(stage.took_s for stage in alike) for name, alike in groupby(stages, key=_name)}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def _place(stage: Stage) -> tuple[int, int]:
    return stage.place


def _name(stage: Stage) -> str:
    return stage.name


def _max_concurrent(records: Iterable[Record]) -> int:
    changes: list[tuple[float, int]] = []
    for record in records:
        if record.sent_s is not None and record.ended_s is not None:
            changes += [(record.sent_s, 1), (record.ended_s, -1)]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


def _since(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
