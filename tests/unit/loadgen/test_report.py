import json
from dataclasses import replace
from io import StringIO

from rich.console import Console

from loadgen.arrivals import Arrivals
from loadgen.measure import Slo, measure
from loadgen.progress import progress_line, shown
from loadgen.replay import Progress
from loadgen.report import Run, notes, print_report, to_json, to_json_lines
from loadgen.schedule import Schedule, ScheduleSettings
from shared.request import Event
from tests.unit.loadgen.builders import loop_clock, record, scheduled

RECORDS = [
    record(
        0,
        0.0,
        sent_s=0.1,
        first_token_s=0.5,
        last_token_s=1.1,
        answered_s=1.1,
        gaps_s=(0.2, 0.4),
        stamps={Event.ACCEPTED: 0.2, Event.FINISHED: 1.0},
    ),
    record(1, 0.0, bucket="http_429", detail="busy"),
]
RUN = Run(
    trace="t.jsonl",
    backend="openai",
    server="http://edge:8000",
    endpoint="/v1/completions",
    client="host, 2 cores",
    model="m",
    prompts="ids of size 5",
    date="20260101-000000",
    started_unix_s=0.0,
    run_id="r",
    settings=ScheduleSettings(length_scale=0.02, max_input_tokens=9, max_output_tokens=8),
    schedule=Schedule(0, (scheduled(0), scheduled(1)), clipped_inputs=1, clipped_outputs=2, stretched=1),
    schedule_sha256="ab" * 32,
    slo=Slo(ttft_ms=600),
    metadata={"build": "7"},
    interrupted=True,
    repeated_results=3,
)
RESULTS = measure(RECORDS, RUN.slo, 2.0, 0.0)


def test_the_json_has_the_names_that_other_tools_read():
    fields = json.loads(to_json(RUN, RESULTS, RECORDS, detailed=False))
    assert fields["duration"] == 2
    assert (fields["completed"], fields["failed"], fields["num_prompts"]) == (1, 1, 2)
    assert (fields["request_throughput"], fields["request_goodput"], fields["output_throughput"]) == (0.5, 0.5, 1.5)
    assert fields["total_token_throughput"] == 3.5
    assert fields["mean_ttft_ms"] == fields["median_ttft_ms"] == fields["p99_ttft_ms"] == 500
    assert fields["mean_ttft_from_send_ms"] == 400
    assert round(fields["mean_tpot_ms"]) == 300
    assert round(fields["p50_itl_ms"]) == 300
    assert fields["goodput_config"] == {"ttft": 600}
    assert (fields["slo_attainment"], fields["slo_missed"]) == (0.5, {})
    assert fields["metadata_build"] == "7"
    assert round(fields["stages_ms"]["accepted → finished"]["mean"]) == 800
    assert "ttfts" not in fields


def test_what_was_not_measured_is_null_and_not_zero():
    records = [record(0, bucket="timeout"), record(1, bucket="timeout")]
    fields = json.loads(to_json(RUN, measure(records, Slo(), 2.0, 0.0), records, detailed=True))
    assert fields["mean_ttft_ms"] is None
    assert fields["ttfts"] == [None, None]
    assert fields["request_throughput"] == 0


def test_detailed_lists_stand_in_the_schedules_order():
    fields = json.loads(to_json(RUN, RESULTS, RECORDS, detailed=True))
    assert fields["ttfts"] == [0.5, None]
    assert fields["itls"] == [[0.2, 0.4], []]
    assert fields["errors"] == ["", "http_429: busy"]


def test_there_is_a_line_for_each_row():
    lines = [json.loads(line) for line in to_json_lines(RUN, RECORDS).splitlines()]
    assert [line["bucket"] for line in lines] == ["completed", "http_429"]
    assert lines[0]["timings"] == {"accepted": 0.2, "finished": 1.0}
    assert lines[0]["request_id"] == "replay-r-0"


def test_the_report_says_what_the_numbers_hide():
    text = " | ".join(notes(RUN, RESULTS))
    for part in ("times 0.02", "1 of 2 prompts were longer than 9", "2 of 2 answers were longer than 8"):
        assert part in text
    for part in ("1 of 2 rows would have had no token", "sent late", "3 results came again", "interrupted"):
        assert part in text
    plain = replace(RUN, settings=ScheduleSettings(arrivals=Arrivals.TRACE), schedule=Schedule(0, (), 0, 0, 0))
    on_time = measure([record(0)], Slo(), 1.0, 0.0)
    assert notes(replace(plain, interrupted=False, repeated_results=0), on_time) == []


def test_the_tables_show_every_bucket_quantity_and_stage():
    out = StringIO()
    print_report(Console(file=out, width=160), RUN, RESULTS)
    for part in ("completed", "http_429", "TTFT from the send", "hand-off", "accepted → finished", "send lateness"):
        assert part in out.getvalue()
    assert "50.0% of all 2 rows (ttft ≤ 600 ms)" in out.getvalue()


async def test_progress_is_plain_lines_where_there_is_no_terminal():
    progress = Progress(scheduled=5, sent=3)
    progress.buckets.update({"completed": 1, "timeout": 1})
    out = StringIO()
    async with shown(progress, Console(file=out, width=40), loop_clock()):
        pass
    (line,) = out.getvalue().splitlines()
    assert "sent 3/5  in flight 1  completed 1  failed 1" in line
    assert "(timeout 1)" in line
    assert "\x1b" not in line


async def test_progress_is_one_live_line_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = StringIO()
    async with shown(Progress(scheduled=5), Console(file=out, force_terminal=True, width=160), loop_clock()):
        pass
    assert progress_line(Progress(scheduled=5), 0)[9:] in out.getvalue()
