"""The head of the page: what was run, how it went in a few sentences, the key figures, the failures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from loadgen.measure import Attainment, Record, Slo, Summary, attainment
from loadgen.page.latency import Distribution, HandOff
from loadgen.page.stages import Stages
from loadgen.page.wording import counted, figures, ms_text, percent_text, seconds_text
from loadgen.report import LATE_S
from loadgen.saved import SavedResult

LIMIT_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}


class Tone(StrEnum):
    """How a reader should take a sentence; shown as a word and a mark, not by colour alone."""

    GOOD = "good"
    PLAIN = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of the summary."""

    tone: Tone
    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """One key figure; `of` says briefly what the value is."""

    title: str
    value: str
    of: str
    detail: str


@dataclass(frozen=True, slots=True)
class Failures:
    """All rows of one kind of failure; `first_message` is of the first of them."""

    bucket: str
    count: int
    first_at_s: float
    first_message: str


def facts_of(saved: SavedResult) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    facts = [
        ("trace", f"{saved.trace}, {_slice_text(saved)}"),
        ("arrivals", _arrivals_text(saved)),
        ("lengths", _lengths_text(saved)),
        ("prompts", f"{saved.prompts}, seed {saved.seed}"),
        ("schedule", f"sha256 {saved.schedule_sha256[:16]}, run {saved.run_id}"),
        ("server", f"{saved.server} {saved.endpoint} ({saved.backend})"),
        ("model", saved.model_id),
        ("client", saved.client),
        ("began", f"{datetime.fromtimestamp(saved.started_unix, UTC):%Y-%m-%d %H:%M:%S} UTC"),
        ("took", seconds_text(saved.duration)),
    ]
    return facts + list(saved.metadata.items())


def cards_of(saved: SavedResult, records: Sequence[Record], found: Mapping[str, Distribution]) -> list[Card]:
    """The key figures. Rates are over the whole run."""
    done = [record for record in records if record.completed]
    duration_s = saved.duration or 1.0
    output_tokens = sum(record.output_tokens or 0 for record in done)
    input_tokens = sum(record.served_prompt_tokens or 0 for record in done)
    failed = len(records) - len(done)
    attained = attainment(records, saved.slo)
    latencies = [
        _latency_card(title, found[name])
        for title, name in (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2el"), ("Hand-off gap", "handoff"))
    ]
    return [
        Card("Requests", f"{len(done):,}", "completed", f"{failed:,} failed of {len(records):,}"),
        *latencies,
        _slo_card(saved.slo, attained, duration_s),
        Card("Requests a second", figures(len(done) / duration_s), "completed", "over the whole run"),
        Card(
            "Tokens a second", figures(output_tokens / duration_s), "made", f"{figures(input_tokens / duration_s)} read"
        ),
    ]


def findings_of(
    saved: SavedResult, records: Sequence[Record], found: Mapping[str, Distribution], hand_off: HandOff, stages: Stages
) -> list[Finding]:
    """Was it good, and if not, why."""
    if not records:
        return [Finding(Tone.BAD, "The run has no requests: there is nothing to report.")]
    findings = [_outcome(records, saved.duration), *_slo_finding(saved.slo, records)]
    findings += [*_slowest_finding(stages), *_hand_off_finding(hand_off)]
    return [*findings, _client_finding(found["lateness"])]


def failures_of(records: Iterable[Record]) -> list[Failures]:
    """Failed rows by kind, the most frequent first."""
    by_bucket: dict[str, list[Record]] = {}
    for record in records:
        if not record.completed:
            by_bucket.setdefault(record.bucket, []).append(record)
    kinds = [
        Failures(bucket, len(alike), alike[0].row.at_s, message_of(alike[0].detail))
        for bucket, alike in by_bucket.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.count)


def message_of(detail: str) -> str:
    """The message of an OpenAI error body, without what else the body repeats of the request; other text as it is."""
    try:
        body = json.loads(detail)
    except ValueError:
        return detail
    error = body.get("error", body) if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else detail


def limits_text(slo: Slo) -> str:
    """`TTFT ≤ 2.00 s, TPOT ≤ 150 ms`, or nothing."""
    limits = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("E2E", slo.e2el_ms))
    return ", ".join(f"{name} ≤ {ms_text(limit_ms)}" for name, limit_ms in limits if limit_ms is not None)


def _slice_text(saved: SavedResult) -> str:
    parts = [counted(len(saved.requests), "request")]
    if saved.rows is not None:
        parts.append(f"rows {_range_text(saved.rows)}")
    if saved.window is not None:
        parts.append(f"seconds {_range_text(saved.window)}")
    return ", ".join(parts)


def _range_text(bounds: tuple[float, float | None]) -> str:
    first, end = bounds
    return f"{first:g}:{'' if end is None else format(end, 'g')}"


def _arrivals_text(saved: SavedResult) -> str:
    if saved.request_rate is not None:
        shape = f", burstiness {saved.burstiness:g}" if saved.arrivals == "gamma" else ""
        return f"{saved.arrivals} at {saved.request_rate:g} requests/s{shape}, over {seconds_text(saved.schedule_span)}"
    ticks = ", ticks spread" if saved.jitter_ticks else ""
    return f"the trace's clock times {saved.speed:g}{ticks}, over {seconds_text(saved.schedule_span)}"


def _lengths_text(saved: SavedResult) -> str:
    cuts = [
        f"{what} at most {limit} tokens"
        for what, limit in (("prompts", saved.max_input), ("answers", saved.max_output))
        if limit is not None
    ]
    return ", ".join([f"the trace's times {saved.length_scale:g}", *cuts])


def _latency_card(title: str, found: Distribution) -> Card:
    if found.summary is None:
        return Card(title, "–", "", "not measured")
    p99_s, median_s = found.summary.percentiles[99], found.summary.median
    return Card(title, seconds_text(median_s), "p50", f"p99 {seconds_text(p99_s)}")


def _slo_card(slo: Slo, attained: Attainment, duration_s: float) -> Card:
    limits = limits_text(slo)
    if not limits:
        return Card("SLO attainment", "–", "", "no limits given (--goodput)")
    good_per_s = figures(attained.good / duration_s)
    return Card("SLO attainment", percent_text(attained.share), "of all", f"{good_per_s} good requests a second")


def _outcome(records: Sequence[Record], duration_s: float) -> Finding:
    failures = failures_of(records)
    in_all = f"{counted(len(records), 'request')} in {seconds_text(duration_s)}"
    if not failures:
        return Finding(Tone.GOOD, f"{in_all}, none failed.")
    num_failed = sum(kind.count for kind in failures)
    kinds = ", ".join(f"{kind.bucket} {kind.count:,}" for kind in failures)
    if num_failed == len(records):
        return Finding(Tone.BAD, f"Every request failed ({kinds}).")
    text = f"{num_failed:,} of {len(records):,} requests failed ({kinds}); latencies are of the others only."
    return Finding(Tone.BAD, text)


def _slo_finding(slo: Slo, records: Sequence[Record]) -> list[Finding]:
    limits = limits_text(slo)
    if not limits:
        return []
    attained = attainment(records, slo)
    missed = ", ".join(
        f"{LIMIT_NAMES[name]} by {count:,}" for name, count in sorted(attained.missed.items(), key=lambda m: -m[1])
    )
    text = f"{percent_text(attained.share)} of all requests met {limits}"
    return [
        Finding(Tone.GOOD if attained.share == 1 else Tone.BAD, f"{text}; missed: {missed}." if missed else f"{text}.")
    ]


def _slowest_finding(stages: Stages) -> list[Finding]:
    if not stages.has_stamps or not stages.num_slowest:
        return []
    worst = max(stages.shares, key=lambda stage: stage.share_of_slowest)
    slowest = "The slowest request" if stages.num_slowest == 1 else f"The slowest {stages.num_slowest:,} requests"
    text = (
        f"{slowest} spent {percent_text(worst.share_of_slowest)} of the time in {worst.name} ({worst.meaning}); "
        f"all requests together {percent_text(worst.share)}."
    )
    return [Finding(Tone.PLAIN, text)]


def _hand_off_finding(hand_off: HandOff) -> list[Finding]:
    if hand_off.extra is None:
        return []
    first, extra = hand_off.first.summary, hand_off.extra
    assert first is not None
    text = (
        f"Between token 1 and 2, where it goes from prefill to decode, a request waits {seconds_text(first.median)} "
        f"at p50, {_signed(extra)} its usual gap."
    )
    return [Finding(Tone.PLAIN, text)]


def _signed(extra: Summary) -> str:
    return f"{seconds_text(abs(extra.median))} {'more' if extra.median >= 0 else 'less'} than"


def _client_finding(lateness: Distribution) -> Finding:
    if lateness.summary is None:
        return Finding(Tone.PLAIN, "Nothing was sent.")
    p99_s = lateness.summary.percentiles[99]
    if p99_s > LATE_S:
        text = (
            f"This client itself was late: p99 of its sends {seconds_text(p99_s)} behind the schedule. The load was "
            "not the one asked for, and latencies contain that wait: doubt the figures, or take a faster client."
        )
        return Finding(Tone.BAD, text)
    return Finding(Tone.GOOD, f"The client kept to its schedule: p99 of its sends {seconds_text(p99_s)} late.")
