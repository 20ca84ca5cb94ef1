import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.client import ExchangeFailed, HttpTransport
from loadgen.jobs import JobMaker, RequestShape
from loadgen.measure import COMPLETED, Slo, measure
from loadgen.prompts import IdPrompts, vocabulary_of_size
from loadgen.replay import Progress, replay
from tests.unit.loadgen.builders import job_of, loop_clock, scheduled
from tests.virtual_loop import InlineExecutor, run_virtually


class Scripted:
    """A server that answers row n as `script[n]` says, after `delay_s[n]` seconds."""

    def __init__(self, clock, script, delays_s):
        self.clock = clock
        self.script = script
        self.delays_s = delays_s

    async def exchange(self, job, seen):
        seen.sent_s = self.clock.monotonic()
        answer, delay_s = self.script[job.row.row], self.delays_s[job.row.row]
        await asyncio.sleep(delay_s)
        if answer == "hangs":
            await asyncio.sleep(10_000)
        if answer == "refuses":
            raise ExchangeFailed("http_429", "slow down")
        if answer == "bug":
            raise ZeroDivisionError("in the client")
        seen.heard_tokens(self.clock.monotonic())
        if answer == "breaks":
            raise ExchangeFailed("disconnect", "gone")
        await asyncio.sleep(1)
        seen.heard_tokens(self.clock.monotonic())
        seen.duplicated = answer == "doubles"
        if answer != "silent":
            seen.output_tokens = job.row.output_tokens - (answer == "short") + (answer == "long")


TTFT_S, HANDOFF_S, GAP_S = 0.2, 0.05, 0.02


def sse(chunk):
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


BUCKETS = {
    "good": COMPLETED,
    "refuses": "http_429",
    "breaks": "disconnect",
    "hangs": "timeout",
    "short": "wrong_length",
    "long": "wrong_length",
    "doubles": "duplicate",
    "silent": "no_usage",
    "bug": "client_ZeroDivisionError",
}


def run(times_s, script, delays_s=None, *, stop_after_s=None, exact_length=True):
    rows = [scheduled(number, at_s) for number, at_s in enumerate(times_s)]
    progress = Progress(scheduled=len(rows))

    async def work():
        clock, stop = loop_clock(), asyncio.Event()
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        transport = Scripted(clock, script, delays_s or [0.5] * len(rows))
        return await replay(
            rows,
            job_of,
            transport,
            maker_pool=InlineExecutor(),
            exact_length=exact_length,
            clock=clock,
            stop=stop,
            progress=progress,
        )

    return run_virtually(work()), progress


def test_sends_do_not_wait_for_answers():
    replayed, progress = run([0, 0, 1, 2], ["hangs", "good", "good", "good"])
    assert [record.sent_s for record in replayed.records] == [0, 0, 1, 2]
    assert [record.ttft_s for record in replayed.records] == [None, 0.5, 0.5, 0.5]
    assert [record.e2el_s for record in replayed.records[1:]] == [1.5, 1.5, 1.5]
    assert replayed.duration_s == 60
    assert [record.ended_s for record in replayed.records] == [60, 1.5, 2.5, 3.5]
    assert not replayed.interrupted
    assert (progress.sent, progress.ended, progress.in_flight, progress.output_tokens) == (4, 4, 0, 9)


def test_more_rows_than_are_prepared_ahead_all_leave_at_their_times():
    times_s = [number * 0.1 for number in range(150)]
    replayed, _ = run(times_s, ["good"] * 150)
    assert [record.row.row for record in replayed.records] == list(range(150))
    assert [record.sent_s for record in replayed.records] == pytest.approx(times_s)


def test_a_late_send_counts_in_the_latency_from_the_intended_time_and_not_from_the_send():
    class Late(Scripted):
        async def exchange(self, job, seen):
            await asyncio.sleep(2)
            await super().exchange(job, seen)

    async def work():
        clock = loop_clock()
        progress = Progress(scheduled=1)
        transport = Late(clock, ["good"], [0.5])
        rows = [scheduled(0)]
        return await replay(
            rows,
            job_of,
            transport,
            maker_pool=InlineExecutor(),
            exact_length=True,
            clock=clock,
            stop=asyncio.Event(),
            progress=progress,
        )

    (record,) = run_virtually(work()).records
    assert (record.lateness_s, record.ttft_s, record.ttft_from_send_s) == (2, 2.5, 0.5)
    assert (record.e2el_s, record.e2el_from_send_s) == (3.5, 1.5)


def test_known_delays_of_a_streaming_server_give_the_right_medians():
    async def stream(body):
        for index in range(body["max_tokens"]):
            await asyncio.sleep(TTFT_S if index == 0 else HANDOFF_S if index == 1 else GAP_S)
            reason = "length" if index == body["max_tokens"] - 1 else None
            yield sse({"choices": [{"text": "t", "finish_reason": reason}]})
        yield sse({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": body["max_tokens"]}})
        yield b"data: [DONE]\n\n"

    async def work():
        clock = loop_clock()
        rows = [scheduled(number, number * 0.1, output_tokens=11) for number in range(30)]
        prompts = IdPrompts(0, vocabulary_of_size(50))
        shape = RequestShape("/v1/completions", "m", ignore_eos=True, temperature=0.0, stream=True)
        server = httpx.MockTransport(lambda request: httpx.Response(200, content=stream(json.loads(request.content))))
        async with httpx.AsyncClient(transport=server, base_url="http://server") as http:
            return await replay(
                rows,
                JobMaker(shape, prompts, "run", 60).make,
                HttpTransport(http, shape.endpoint, {}, clock),
                maker_pool=InlineExecutor(),
                exact_length=True,
                clock=clock,
                stop=asyncio.Event(),
                progress=Progress(scheduled=30),
            )

    replayed = run_virtually(work())
    results = measure(replayed.records, Slo(), replayed.duration_s, replayed.started_unix_s)
    assert results.buckets == {COMPLETED: 30}
    medians = {name: summary.median for name, summary in results.latencies.items()}
    whole_s = HANDOFF_S + 9 * GAP_S
    expected = {"ttft": TTFT_S, "itl": GAP_S, "handoff": HANDOFF_S, "tpot": whole_s / 10, "e2el": TTFT_S + whole_s}
    assert medians == pytest.approx(
        expected | {"itl_per_token": GAP_S, "ttft_from_send": TTFT_S, "e2el_from_send": TTFT_S + whole_s}
    )
    assert results.latencies["itl"].count == 300
    assert results.duration_s == pytest.approx(2.9 + TTFT_S + whole_s)
    assert results.lateness.percentiles[99] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("answer", "bucket"), BUCKETS.items())
def test_each_kind_of_answer_has_its_bucket(answer, bucket):
    replayed, progress = run([0], [answer])
    assert replayed.records[0].bucket == bucket
    assert progress.buckets == {bucket: 1}


def test_without_ignore_eos_a_shorter_answer_is_right_and_a_longer_one_is_not():
    replayed, _ = run([0, 0], ["short", "long"], exact_length=False)
    assert [record.bucket for record in replayed.records] == [COMPLETED, "wrong_length"]


def test_a_stop_cancels_what_is_under_way_and_counts_what_was_never_sent():
    replayed, progress = run([0, 0, 5, 50], ["good", "hangs", "good", "good"], stop_after_s=5.2)
    assert [record.bucket for record in replayed.records] == [COMPLETED, "cancelled", "cancelled", "not_sent"]
    assert replayed.interrupted
    assert replayed.duration_s == pytest.approx(5.2)
    assert (progress.sent, progress.in_flight) == (3, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.sampled_from(sorted(BUCKETS)), st.floats(0, 100)), min_size=1, max_size=12
    ).map(sorted),
    st.none() | st.floats(0, 60),
)
def test_every_row_ends_in_one_bucket_whatever_answers_come(rows, stop_after_s):
    times_s, script, delays_s = zip(*rows, strict=True)
    replayed, progress = run(times_s, script, delays_s, stop_after_s=stop_after_s)
    results = measure(replayed.records, Slo(ttft_ms=10_000), max(replayed.duration_s, 1e-9), 0.0)
    assert sum(results.buckets.values()) == len(rows)
    assert results.completed + results.failed == len(rows)
    assert set(results.buckets) <= {*BUCKETS.values(), "cancelled", "not_sent"}
    assert progress.ended == progress.sent == sum(record.sent_s is not None for record in replayed.records)
    never_sent = sum(record.sent_s is None for record in replayed.records)
    assert results.buckets.get("not_sent", 0) == never_sent
    assert 0 <= results.attainment.good <= results.completed
    if stop_after_s is None:
        expected = ["timeout" if delay_s >= 60 else BUCKETS[answer] for _, answer, delay_s in rows]
        # An answer ends a second after its first token: those that begin in the last second run out of time too.
        for record, bucket, delay_s in zip(replayed.records, expected, delays_s, strict=True):
            assert record.bucket == bucket or (delay_s >= 59 and record.bucket == "timeout")
