"""Runs as they would have been saved, made up from seeds."""

from random import Random

import orjson

from loadgen.measure import Record, Slo, measure
from loadgen.report import Run, to_json
from loadgen.saved import SavedResult, parse_saved
from loadgen.schedule import Schedule, ScheduleSettings
from shared.request import Event
from tests.unit.loadgen.builders import record, scheduled

STARTED_UNIX_S = 1_700_000_000.0


def answered(row: int, at_s: float = 0.0, *, rng: Random, num_gaps: int = 8, stamped: bool = True) -> Record:
    """A completed request with a hand-off gap longer than the others, and stamps that agree with it."""
    sent_s = at_s + 0.001
    steps_s = [0.003, 0.004, 0.002, rng.expovariate(5), 0.2 + rng.random() / 10]
    moments_s = [sent_s + sum(steps_s[: place + 1]) for place in range(len(steps_s))]
    gaps_s = [0.3 + rng.random() / 10, *(0.05 + rng.expovariate(100) for _ in range(num_gaps - 1))][:num_gaps]
    first_s = moments_s[-1] + 0.002
    last_s = first_s + sum(gaps_s)
    until_first = (Event.ACCEPTED, Event.ADMITTED, Event.PLACED, Event.PREFILLING, Event.FIRST_TOKEN)
    stamps = dict(zip(until_first, moments_s, strict=True)) | {
        Event.TRANSFERRING: moments_s[-1] + 0.1,
        Event.DECODING: moments_s[-1] + 0.25,
        Event.FINISHED: last_s - 0.002,
        Event.DELIVERED: last_s + 0.001,
    }
    return record(
        row,
        at_s,
        sent_s=sent_s,
        first_token_s=first_s,
        last_token_s=last_s,
        answered_s=last_s,
        gaps_s=tuple(gaps_s),
        output_tokens=num_gaps + 1,
        stamps={event: STARTED_UNIX_S + moment_s for event, moment_s in stamps.items()} if stamped else {},
    )


def failed(row: int, at_s: float = 0.0, bucket: str = "http_429", detail: str = "slow down") -> Record:
    return record(row, at_s, bucket=bucket, detail=detail, ended_s=at_s + 0.01, output_tokens=None)


def saved_of(records: list[Record], *, slo: Slo | None = None, **changes) -> SavedResult:
    """The run of `records` after a way through JSON; `changes` are laid over its fields."""
    slo = Slo(ttft_ms=500, tpot_ms=100) if slo is None else slo
    duration_s = max((at_s for at_s in (each.ended_s for each in records) if at_s is not None), default=0.0) + 0.01
    run = Run(
        trace="trace.jsonl",
        backend="openai",
        server="http://edge:8000",
        endpoint="/v1/completions",
        client="host, 2 cores",
        model="small-model",
        prompts="ids of size 5",
        date="20260101-000000",
        started_unix_s=STARTED_UNIX_S,
        run_id="abc",
        settings=ScheduleSettings(rows=(2, None)),
        schedule=Schedule(0, tuple(each.row for each in records) or (scheduled(0),), 0, 0, 0),
        schedule_sha256="ab" * 32,
        slo=slo,
        metadata={"build": "7"},
        interrupted=False,
        repeated_results=0,
    )
    results = measure(records, slo, duration_s, STARTED_UNIX_S)
    fields = orjson.loads(to_json(run, results, records, detailed=True))
    return parse_saved(orjson.dumps(fields | changes))


def mixed(count: int, *, stamped: bool = True) -> list[Record]:
    """Every tenth request fails."""
    rng = Random(3)
    return [
        failed(row, row * 0.1) if row % 10 == 9 else answered(row, row * 0.1, rng=rng, stamped=stamped)
        for row in range(count)
    ]
