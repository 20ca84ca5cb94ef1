from dataclasses import replace

import pytest

from benchmarks.simulation import (
    FEED_S,
    furthest_off,
    hardware_of,
    hops_of,
    later_half,
    local_prefills,
    simulated,
    table_of,
    times_seen,
)
from loadgen.measure import Record
from loadgen.schedule import ScheduledRow, ScheduleSettings, draw_schedule
from loadgen.traces import TraceRow
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Event, Incarnation
from shared.state.port import LiveWorker, Role, WorkerCard, WorkerLoad

BEGAN_UNIX_S = 1000.0
SPEEDS = SpeedProfile(4e-3, 1e-5, 3e-8, 2e-5, 1e-9)


def a_record(at_s=1.0, *, bucket="completed", local=False, frame_s=0.03, late_s=0.0):
    placed_s = BEGAN_UNIX_S + at_s + 0.01
    stamps = {Event.PLACED: placed_s, Event.PREFILLING: placed_s + 0.02, Event.FIRST_TOKEN: placed_s + 0.5}
    if not local:
        stamps[Event.TRANSFERRING] = placed_s + 0.54
    return Record(
        row=ScheduledRow(0, 0, round((at_s - late_s) * 1e6), 10, 3, ()),
        bucket=bucket,
        detail="",
        prompt_tokens=10,
        sent_s=at_s,
        first_token_s=at_s + 0.51 + frame_s,
        last_token_s=at_s + 0.61 + frame_s,
        answered_s=at_s + 0.7,
        ended_s=at_s + 0.7,
        gaps_s=(0.05, 0.05),
        served_prompt_tokens=10,
        output_tokens=3,
        cached_tokens=0,
        finish_reason="length",
        stamps=stamps,
    )


class Saved:
    started_unix = BEGAN_UNIX_S

    def __init__(self, *records):
        self._records = records

    def records(self):
        return self._records


def a_worker(role, speeds=SPEEDS, links=None):
    card = WorkerCard(
        incarnation=Incarnation(role),
        role=role,
        name=role,
        model="m",
        model_fingerprint="f",
        max_context=8192,
        num_pages=1000,
        max_running=64,
        transfer_address="a:1",
        layout_fingerprint="l",
        max_batch_tokens=2048,
        page_bytes=2**20,
        num_host_pages=0,
    )
    return LiveWorker(0, card, WorkerLoad(1000, 0, 0, profile=speeds, links=links or {}), 0, 0, 0.0)


def a_stack(**decode):
    rate = LinkRate(1e-3, 1e9)
    return [a_worker(Role.PREFILL), a_worker(Role.DECODE, links={Incarnation("prefill"): rate}, **decode)]


def test_the_hops_are_what_lies_between_the_stamps_of_a_request_that_waited_for_nothing():
    hops = hops_of(
        Saved(a_record(), a_record(local=True), a_record(frame_s=0.05), a_record(bucket="timeout", frame_s=9))
    )
    assert hops.placed_s == pytest.approx(0.01)
    assert hops.work_s == pytest.approx(0.02)
    assert hops.token_s == pytest.approx(0.04), "of those that were handed over"
    assert hops.frame_s == pytest.approx(0.03), "the middle one"
    assert hops.feed_s == FEED_S


def test_workers_as_they_tell_of_themselves():
    hops = hops_of(Saved(a_record()))
    hardware = hardware_of([*a_stack(), *a_stack(speeds=replace(SPEEDS, token_s=4e-5))], hops)
    assert hardware.prefill.speeds == SPEEDS
    assert hardware.decode.speeds.token_s == pytest.approx(3e-5)
    assert hardware.peer_link == LinkRate(1e-3, 1e9)
    assert (hardware.decode.num_pages, hardware.decode.max_batch_tokens) == (1000, 2048)


def test_speeds_are_those_of_the_later_half_of_a_replay_and_not_of_its_end_alone():
    told = [a_stack(speeds=replace(SPEEDS, base_s=base_s)) for base_s in (9.0, 9.0, 8e-3, 6e-3, 4e-3)]
    assert hardware_of(later_half(told), hops_of(Saved(a_record()))).decode.speeds.base_s == pytest.approx(6e-3)


def test_a_worker_without_speeds_cannot_be_simulated():
    with pytest.raises(RuntimeError, match="no speeds"):
        hardware_of(a_stack(speeds=None), hops_of(Saved(a_record())))


def test_what_the_client_saw_and_what_decode_computed():
    records = [a_record(late_s=0.02), a_record(local=True, late_s=0.01), a_record(bucket="timeout")]
    seen = times_seen(records)
    assert seen["ttft_ms"]["p50"] == pytest.approx(540), "from the send: the client's own lateness is not simulated"
    assert seen["tpot_ms"]["p90"] == pytest.approx(50)
    assert seen["prompt_ms"]["p90"] == pytest.approx(500)
    assert local_prefills(records) == 1


def test_a_lone_request_takes_its_hops_its_prefill_and_its_steps(tmp_path):
    rows = [TraceRow(index=0, at_s=0.0, input_tokens=1000, output_tokens=11, hash_ids=())]
    schedule = draw_schedule(rows, ScheduleSettings())
    (tmp_path / "one").write_bytes(schedule.to_bytes({}))
    hardware = hardware_of(a_stack(), hops_of(Saved(a_record())))
    times = simulated(tmp_path / "one", hardware, {"prefill": 1, "decode": 1})
    assert times["ttft_ms"]["p50"] == pytest.approx(1000 * (0.01 + 0.02 + SPEEDS.prefill_s(1000, 0) + 0.03), rel=0.05)
    assert times["prompt_ms"]["p50"] == pytest.approx(1000 * (0.02 + SPEEDS.prefill_s(1000, 0)), rel=0.05)
    assert times["tpot_ms"]["p50"] > 1000 * SPEEDS.decode_step_s(1, 1000)


def test_the_verdict_is_of_the_middle_and_the_ninth_tenth():
    off = {f"{what}_p{p}": 0.0 for what in ("ttft_ms", "tpot_ms") for p in (50, 90)}
    times = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    times_of = dict.fromkeys(("ttft_ms", "tpot_ms", "prompt_ms"), times)
    sides = {side: times_of | {"local": 1} for side in ("real", "simulated")}
    off |= {"ttft_ms_p99": 5.0, "tpot_ms_p99": 0.0, "tpot_ms_p90": -0.16}
    off |= {f"prompt_ms_p{p}": 1.0 for p in (50, 90, 99)}
    point = {"rate_per_s": 2.0, "off": off} | sides
    assert furthest_off({"points": [point]}) == pytest.approx(0.16)
    assert table_of({"points": [point]}).row_count == 10
