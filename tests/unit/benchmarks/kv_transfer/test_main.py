from dataclasses import replace

import pytest
import typer

from benchmarks.kv_transfer.__main__ import Interference, Transfers, main
from benchmarks.kv_transfer.plan import TRIAL

PLAN = replace(TRIAL, tokens=(128,), num_warm=1, num_pulls=3, num_traced=1, at_once=2, rounds=2)


class ScriptedChild:
    """Answers what it is asked from a table, and notes it where both children do."""

    def __init__(self, name, notes, **answers):
        self._name = name
        self._notes = notes
        self._answers = answers

    async def ask(self, do, **arguments):
        self._notes.append((self._name, do, arguments))
        answer = self._answers.get(do)
        return answer(**arguments) if callable(answer) else answer


def a_source(notes, **answers):
    return ScriptedChild("source", notes, offer=lambda num_pages, seeds: [num_pages] * len(seeds), **answers)


async def test_a_length_has_its_pulls_phases_and_contents():
    notes = []
    spans = [[float(index), index + 0.001 * (index + 1)] for index in range(4)]
    received = {"end": "puller", "name": "receive", "began_s": 1.0, "ended_s": 1.002}
    puller = ScriptedChild(
        "puller",
        notes,
        pull=lambda tickets, pause_s=0.0: spans[: len(tickets)],
        page_bytes=1000,
        watched=[received],
        pull_and_compare=lambda **_: False,
    )
    [row] = await Transfers(PLAN, a_source(notes, watched=[]), puller).pulls()
    assert row["all_ms"] == [2.0, 3.0, 4.0]  # the first was the warm-up
    assert row["gb_per_s"] == pytest.approx(2000 / 0.003 / 1e9)
    assert row["phases_ms"] == pytest.approx(
        {"pull": 2, "wire": 2, "receives": 2, "packs": 0, "sends": 0, "unpacks": 0, "parts": 1}
    )
    assert len(row["timeline"]) == 1
    assert row["equal"] is False


async def test_pulls_at_once_leave_out_the_warm_up():
    notes = []
    puller = ScriptedChild("puller", notes, page_bytes=1000, pull_together=[9.0, 1.0, 2.0, 3.0])
    row = await Transfers(PLAN, a_source(notes), puller).together()
    assert (row["at_once"], row["p50_ms"]) == (2, 2.0)
    assert row["gb_per_s"] == pytest.approx(4000 / 0.002 / 1e9)


async def test_phases_with_and_without_pulls_take_turns():
    notes = []
    streaming = []

    def steps(**_):
        return [2.0, 2.0] if streaming else [1.0, 1.0]

    def stop():
        streaming.clear()
        return {"gb_per_s": 25.0, "num_pulls": 3, "ran_out": False}

    answers = {"decode": steps, "prefill": steps}
    puller = ScriptedChild(
        "puller", notes, start_stream=lambda **pace: streaming.append(pace), stop_stream=stop, **answers
    )
    rows = await Interference(PLAN, a_source(notes, **answers), puller).rows()
    assert [(row["work"], row["stream"], row["mean_percent"], row["gb_per_s"]) for row in rows] == [
        ("decode", "none", 0.0, 0.0),
        ("decode", "paced", 100.0, 25.0),
        ("decode", "full", 100.0, 25.0),
        ("prefill", "none", 0.0, 0.0),
        ("prefill", "paced", 100.0, 25.0),
    ]
    phases = [do for name, do, _ in notes if name == "puller" and do != "prefill"]
    turn = ["decode", "start_stream", "decode", "stop_stream"]
    assert phases == ["decode"] + 4 * turn + 2 * ["start_stream", "stop_stream"]
    paces = [arguments["gb_per_s"] for _, do, arguments in notes if do == "start_stream"]
    assert paces == [PLAN.paced_gb_per_s, None] * 2 + [PLAN.paced_gb_per_s] * 2


async def test_a_stream_that_ends_before_the_phase_is_no_measurement():
    notes = []
    puller = ScriptedChild(
        "puller", notes, decode=[1.0], stop_stream={"gb_per_s": 9.0, "num_pulls": 3, "ran_out": True}
    )
    with pytest.raises(RuntimeError, match="did not last"):
        await Interference(PLAN, a_source(notes), puller).rows()


def test_unknown_parts_are_refused():
    with pytest.raises(typer.BadParameter):
        main(only="pulls,everything")
