import json
from pathlib import Path

import pytest

from loadgen.traces import read_trace
from shared.errors import StartupError

DATA = Path(__file__).parents[3] / "loadgen" / "data"


def write(folder, name, text):
    path = folder / name
    path.write_text(text, newline="")
    return path


def mooncake_line(timestamp=0, input_length=513, output_length=5, hash_ids=(1, 2)):
    fields = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length}
    return json.dumps(fields | {"hash_ids": list(hash_ids)}) + "\n"


def test_mooncake_timestamps_are_milliseconds_from_the_first_row(tmp_path):
    path = write(tmp_path, "t.jsonl", mooncake_line(27482) + "\n" + mooncake_line(30535, 512, 7, [1]))
    first, second = read_trace(path)
    assert (first.at_s, second.at_s) == (0, pytest.approx(3.053))
    assert (second.index, second.input_tokens, second.output_tokens, second.hash_ids) == (1, 512, 7, (1,))


def test_azure_times_have_seven_digits_and_windows_line_ends(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
    )
    first, second = read_trace(write(tmp_path, "t.csv", text))
    assert (first.at_s, first.input_tokens, first.output_tokens, first.hash_ids) == (0, 374, 44, ())
    assert second.at_s == pytest.approx(4.314579)


@pytest.mark.parametrize("name", ["mooncake_conversation_60.jsonl", "azure_conv_60.csv", "azure_code_60.csv"])
def test_the_slices_that_come_with_the_generator_are_whole(name):
    rows = read_trace(DATA / name)
    assert len(rows) == 60
    assert [row.index for row in rows] == list(range(60))
    assert all(bool(row.hash_ids) == name.startswith("mooncake") for row in rows)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "no trace"),
        ("", "no trace"),
        (mooncake_line() + '{"timestamp": 0}\n', "line 2: no input_length"),
        (mooncake_line() + "{nonsense\n", "line 2"),
        (mooncake_line(hash_ids=[1]), "1 hash_ids for 513 tokens"),
        (mooncake_line(input_length=-1), "-1 tokens"),
        (mooncake_line(9) + mooncake_line(8), "request 1 lies before"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,374,1\n", "line 2"),
    ],
)
def test_a_bad_trace_is_refused_by_line_and_reason(tmp_path, text, complaint):
    with pytest.raises(StartupError, match=complaint):
        read_trace(write(tmp_path, "t", text))


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(StartupError, match="cannot read"):
        read_trace(tmp_path / "none.jsonl")
