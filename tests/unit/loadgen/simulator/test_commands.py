import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadgen.__main__ import app

DATA = Path(__file__).parents[4] / "loadgen" / "data"
MOONCAKE = str(DATA / "mooncake_conversation_60.jsonl")
CONV = str(DATA / "azure_conv_60.csv")


def words(text: str) -> str:
    return " ".join(text.split())


def test_simulate_compares_policies_and_saves_the_numbers(tmp_path):
    saved = tmp_path / "runs.json"
    options = ["--prefill", "2", "--decode", "2", "--policy", "least-loaded", "--policy", "ours", "--seeds", "2"]
    result = CliRunner().invoke(app, ["simulate", MOONCAKE, CONV, *options, "--save", str(saved)])
    assert result.exit_code == 0
    assert "120 requests, 2 prefill + 2 decode of h200-8b, goals 2 s / 100 ms" in words(result.stdout)
    assert "one LRU of all 2 prefill workers' pages" in words(result.stdout)
    runs = json.loads(saved.read_text())
    assert {name: len(each) for name, each in runs.items()} == {"least-loaded": 2, "ours": 2}
    assert all(run["num_refused"] == 0 for each in runs.values() for run in each)


def test_who_was_refused_and_what_else_befell_requests_is_said():
    result = CliRunner().invoke(app, ["simulate", MOONCAKE, "--max-wait", "0"])
    assert result.exit_code == 0
    assert "ours: 60 of 60 requests were refused, as too long or after --max-wait" in words(result.stdout)


def test_numbers_that_cannot_be_saved_are_shown_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["simulate", CONV, "--save", str(tmp_path / "file" / "runs.json")])
    assert result.exit_code == 2
    assert "60 requests, 1 prefill + 1 decode" in words(result.stdout)
    assert f"--save {tmp_path}/file/runs.json: [Errno" in words(result.stderr)


def test_a_narrow_terminal_cuts_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    result = CliRunner().invoke(app, ["simulate", CONV])
    assert "…" not in result.stdout


def test_simulate_finds_what_a_system_bears():
    options = ["--goodput", "--max-input", "16384", "--ttft", "0.5", "--tpot", "0.03", "--host-gb", "100"]
    result = CliRunner().invoke(app, ["simulate", MOONCAKE, *options])
    assert result.exit_code == 0
    assert "requests/s per GPU at 90%" in words(result.stdout)
    assert "ours at speed 1: " in words(result.stderr), "a search takes long"


def test_plan_says_how_many_and_why_not_fewer():
    result = CliRunner().invoke(app, ["plan", MOONCAKE, "--policy", "least-loaded"])
    assert result.exit_code == 0
    answer = words(result.stdout)
    assert "90% are wanted." in answer
    assert "One less, best as" in answer


def test_plan_says_when_there_are_not_enough():
    result = CliRunner().invoke(app, ["plan", MOONCAKE, "--speed", "40", "--max-workers", "2"])
    assert result.exit_code == 2
    assert "--max-workers 2: not enough for --attainment 0.9 at --speed 40" in words(result.stderr)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["none.jsonl"], "cannot read the trace"),
        ([CONV, "--policy", "best"], "--policy best: it is one of round-robin, random"),
        ([CONV, "--profile", "none"], "--profile none: neither a profile known here nor a file"),
        ([CONV, "--max-input", "1"], "--max-input 1 leaves out every conversation"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, complaint):
    result = CliRunner().invoke(app, ["simulate", *options])
    assert result.exit_code == 2
    assert complaint in words(result.stderr)


def test_a_wrong_profile_is_refused_with_the_fields_name(tmp_path):
    profile = tmp_path / "mine.json"
    shipped = Path(__file__).parents[4] / "loadgen" / "simulator" / "profiles" / "h200-8b.json"
    fields = json.loads(shipped.read_text())
    fields["prefill"]["num_pages"] = 1
    profile.write_text(json.dumps(fields))
    result = CliRunner().invoke(app, ["simulate", CONV, "--profile", str(profile)])
    assert result.exit_code == 2
    assert "prefill.num_pages: Input should be greater than or equal to 2" in words(result.stderr)
