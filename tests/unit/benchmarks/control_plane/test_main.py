import pytest
from typer.testing import CliRunner

from benchmarks.control_plane.__main__ import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "1,some"], "--streams some"),
        (["--streams", "1,64", "--max-running", "32"], "--max-running 32"),
        (["--gpus", "0"], "--gpus 0"),
        (["--counts", "decode=0"], "--counts decode=0"),
        (["--counts", "worker=1"], "--counts worker=1"),
        (["--profile-load", "8", "--streams", "1,16"], "--profile-load 8"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["--model", str(tmp_path), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
