"""The report of a run: tables for people, JSON in the field names that other tools read, one JSON line a request."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from loadgen.measure import PERCENTILES, Record, Results, Slo, Summary
from loadgen.schedule import Schedule, ScheduleSettings

LATE_S = 0.05
"""A p99 send lateness above this is pointed out: the load that came was not the load that was asked for."""

TITLES: Mapping[str, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL (gaps between pieces)",
    "e2el": "E2E",
    "itl_per_token": "ITL per token",
    "handoff": "hand-off gap (piece 1 to 2)",
    "ttft_from_send": "TTFT from the send",
    "e2el_from_send": "E2E from the send",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What was asked for.

    Attributes:
        backend: "openai" or "kafka".
        server: its URL without credentials, or Kafka's bootstrap servers.
        client: the host that sent, in words.
        date: when the run began, `YYYYmmdd-HHMMSS` in UTC.
        started_unix_s: start of the run, the origin of all its times.
        schedule_sha256: equal for runs that sent the same requests at the same times.
        repeated_results: results that came again byte for byte (Kafka only).
    """

    trace: str
    backend: str
    server: str
    endpoint: str
    client: str
    model: str
    prompts: str
    date: str
    started_unix_s: float
    run_id: str
    settings: ScheduleSettings
    schedule: Schedule
    schedule_sha256: str
    slo: Slo
    metadata: Mapping[str, str]
    interrupted: bool
    repeated_results: int


def to_json(run: Run, results: Results, records: Sequence[Record], *, detailed: bool) -> bytes:
    """The run as one JSON object; latencies in milliseconds, lists of `detailed` in seconds and schedule order.

    With `detailed` the page of `loadgen.page` can be made from it.
    """
    fields = _summary_fields(run, results)
    if detailed:
        fields |= _detailed_fields(run, records)
    return orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


def to_json_lines(run: Run, records: Iterable[Record]) -> bytes:
    """One JSON object for each row of the schedule; times are seconds after the start of the run."""
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    return b"".join(orjson.dumps(_request_fields(run, record), option=options) for record in records)


def _request_fields(run: Run, record: Record) -> dict[str, Any]:
    return {
        "request_id": f"replay-{run.run_id}-{record.row.row}",
        "row": record.row.row,
        "trace_index": record.row.trace_index,
        "bucket": record.bucket,
        "detail": record.detail,
        "intended_s": record.row.at_s,
        "sent_s": record.sent_s,
        "first_token_s": record.first_token_s,
        "last_token_s": record.last_token_s,
        "answered_s": record.answered_s,
        "ended_s": record.ended_s,
        "gaps_s": record.gaps_s,
        "input_tokens": record.row.input_tokens,
        "prompt_tokens": record.prompt_tokens,
        "served_prompt_tokens": record.served_prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "wanted_output_tokens": record.row.output_tokens,
        "output_tokens": record.output_tokens,
        "finish_reason": record.finish_reason,
        "timings": record.stamps,
    }


def notes(run: Run, results: Results) -> list[str]:
    """What a reader must know to read the numbers right."""
    lines = _notes_on_lengths(run, results)
    if results.lateness is not None and results.lateness.percentiles[99] > LATE_S:
        lines.append("this client sent late (see send lateness): latencies from the intended time contain that wait")
    if run.backend == "kafka":
        lines.append("TTFT and TPOT are from the server's stamps, so they carry the skew of its hosts' clocks")
    if run.repeated_results:
        lines.append(f"{run.repeated_results} results came again, byte for byte")
    if run.interrupted:
        lines.append("the run was interrupted")
    return lines


def _notes_on_lengths(run: Run, results: Results) -> list[str]:
    settings, schedule = run.settings, run.schedule
    num_rows = len(schedule.rows)
    lines: list[str] = []
    if settings.length_scale != 1:
        lines.append(
            f"lengths of prompts, answers and shared blocks are those of the trace times {settings.length_scale:g}"
        )
    if schedule.stretched:
        lines.append(f"{schedule.stretched} of {num_rows} rows would have had no token on one side and have one")
    for what, count, limit in (
        ("prompts", schedule.clipped_inputs, settings.max_input_tokens),
        ("answers", schedule.clipped_outputs, settings.max_output_tokens),
    ):
        if count:
            lines.append(f"{count} of {num_rows} {what} were longer than {limit} tokens and were cut to that")
    if results.prompts_off:
        lines.append(f"{results.prompts_off} prompts could not be made exact as text")
    if results.counts_differ:
        lines.append(
            f"the server counted {results.counts_differ} of {results.completed} prompts otherwise than the local "
            "tokeniser (a chat template adds its own tokens)"
        )
    return lines


def print_report(console: Console, run: Run, results: Results) -> None:
    """All tables and notes."""
    console.print(_run_table(run, results))
    console.print(_bucket_table(results))
    console.print(_latency_table(results))
    if results.stages:
        console.print(_stage_table(results))
    for note in notes(run, results):
        console.print(f"note: {note}", highlight=False, markup=False)


def _summary_fields(run: Run, results: Results) -> dict[str, Any]:
    settings, schedule, duration_s = run.settings, run.schedule, results.duration_s
    fields: dict[str, Any] = {
        "date": run.date,
        "started_unix": run.started_unix_s,
        "backend": run.backend,
        "server": run.server,
        "endpoint": run.endpoint,
        "client": run.client,
        "model_id": run.model,
        "prompts": run.prompts,
        "trace": run.trace,
        "run_id": run.run_id,
        "seed": settings.seed,
        "schedule_sha256": run.schedule_sha256,
        "num_prompts": len(schedule.rows),
        "rows": settings.rows,
        "window": settings.window_s,
        "arrivals": settings.arrivals,
        "request_rate": settings.request_rate_per_s,
        "burstiness": settings.burstiness,
        "speed": settings.speed,
        "jitter_ticks": settings.jitter_ticks,
        "length_scale": settings.length_scale,
        "max_input": settings.max_input_tokens,
        "max_output": settings.max_output_tokens,
        "clipped_inputs": schedule.clipped_inputs,
        "clipped_outputs": schedule.clipped_outputs,
        "scheduled_input_tokens": sum(row.input_tokens for row in schedule.rows),
        "scheduled_output_tokens": sum(row.output_tokens for row in schedule.rows),
        "scheduled_shared_input_tokens": schedule.shared_input_tokens(),
        "schedule_span": schedule.span_s,
        "interrupted": run.interrupted,
        "duration": duration_s,
        "completed": results.completed,
        "failed": results.failed,
        "buckets": results.buckets,
        "repeated_results": run.repeated_results,
        "total_input_tokens": results.total_input_tokens,
        "total_output_tokens": results.total_output_tokens,
        "total_cached_tokens": results.total_cached_tokens,
        "prompts_off": results.prompts_off,
        "prompt_counts_differ": results.counts_differ,
        "request_throughput": results.completed / duration_s,
        "request_goodput": results.attainment.good / duration_s,
        "output_throughput": results.total_output_tokens / duration_s,
        "total_token_throughput": (results.total_input_tokens + results.total_output_tokens) / duration_s,
        "max_concurrent_requests": results.max_concurrent_requests,
        "goodput_config": _limits(run.slo),
        "good": results.attainment.good,
        "slo_attainment": results.attainment.share,
        "slo_missed": results.attainment.missed,
        "latency_origin": "intended send time",
    }
    for name, summary in {**results.latencies, "lateness": results.lateness}.items():
        fields |= _summary_in_ms(name, summary)
    fields["stages_ms"] = {
        name: {"count": stage.count, "mean": stage.mean * 1e3}
        | {f"p{percent}": value * 1e3 for percent, value in stage.percentiles.items()}
        for name, stage in results.stages.items()
    }
    fields["notes"] = notes(run, results)
    return fields | {f"metadata_{name}": value for name, value in run.metadata.items()}


def _summary_in_ms(name: str, summary: Summary | None) -> dict[str, float | None]:
    def in_ms(value_s: float | None) -> float | None:
        return None if value_s is None else value_s * 1e3

    fields = {
        f"mean_{name}_ms": in_ms(summary and summary.mean),
        f"median_{name}_ms": in_ms(summary and summary.median),
        f"std_{name}_ms": in_ms(summary and summary.std),
    }
    return fields | {
        f"p{percent}_{name}_ms": in_ms(summary and summary.percentiles[percent]) for percent in PERCENTILES
    }


def _detailed_fields(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [record.gaps_s for record in records],
        "latencies": [record.e2el_s for record in records],
        "start_times": [record.sent_s for record in records],
        "intended_times": [record.row.at_s for record in records],
        "errors": ["" if record.completed else f"{record.bucket}: {record.detail}" for record in records],
        "requests": [_request_fields(run, record) for record in records],
    }


def _limits(slo: Slo) -> dict[str, float]:
    limits = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2el": slo.e2el_ms}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _run_table(run: Run, results: Results) -> Table:
    schedule, duration_s = run.schedule, results.duration_s
    scheduled_input = sum(row.input_tokens for row in schedule.rows)
    attained = results.attainment
    table = Table(title=f"Replay of {run.trace}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("model", f"{run.model} over {run.backend} {run.endpoint}"),
        ("schedule", f"sha256 {run.schedule_sha256[:16]}, seed {schedule.seed}, span {schedule.span_s:.1f} s"),
        ("duration", f"{duration_s:.2f} s"),
        (
            "requests",
            f"{results.completed / duration_s:.2f} /s completed, at most {results.max_concurrent_requests} at once",
        ),
        ("output tokens", f"{results.total_output_tokens} ({results.total_output_tokens / duration_s:.1f} /s)"),
        ("input tokens", f"{results.total_input_tokens} served of {scheduled_input} scheduled"),
        (
            "prefix cache",
            f"{results.total_cached_tokens} tokens hit; the schedule shares {schedule.shared_input_tokens()}",
        ),
    ]
    limits = _limits(run.slo)
    if limits:
        wanted = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items())
        missed = ", ".join(f"{name} {count}" for name, count in attained.missed.items())
        share = f"{attained.share:.1%} of all {len(schedule.rows)} rows ({wanted})"
        rows.append(("SLO attainment", f"{share}; missed: {missed}" if missed else share))
        rows.append(("goodput", f"{attained.good / duration_s:.2f} requests/s"))
    for name, text in rows:
        table.add_row(name, text)
    return table


def _bucket_table(results: Results) -> Table:
    table = Table(title="What became of the rows", title_justify="left", min_width=25)
    table.add_column("bucket")
    table.add_column("rows", justify="right")
    for bucket, count in results.buckets.items():
        table.add_row(bucket, str(count))
    table.add_section()
    table.add_row("all", str(sum(results.buckets.values())))
    return table


def _latency_table(results: Results) -> Table:
    table = _summary_table("Latency in ms, completed requests, from the intended time", "quantity")
    for name, summary in results.latencies.items():
        if summary is not None:
            table.add_row(TITLES[name], *_cells(summary))
    if results.lateness is not None:
        table.add_section()
        table.add_row("send lateness (all sends)", *_cells(results.lateness))
    return table


def _stage_table(results: Results) -> Table:
    table = _summary_table("Where the time went, in ms, by the servers' stamps", "stage")
    for name, summary in results.stages.items():
        table.add_row(name, *_cells(summary))
    return table


def _summary_table(title: str, first_column: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first_column)
    for heading in ("count", "mean", "std", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(heading, justify="right")
    return table


def _cells(summary: Summary) -> list[str]:
    values_s = (summary.mean, summary.std, *summary.percentiles.values())
    return [str(summary.count), *(f"{value_s * 1e3:.1f}" for value_s in values_s)]
