from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadgen.__main__ import app

AZURE = Path(__file__).parents[3] / "loadgen" / "data" / "azure_conv_60.csv"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--trace", "none.jsonl"], "cannot read the trace"),
        (["--trace", AZURE], "--tokenizer"),
        (["--trace", AZURE, "--prompt-as", "text"], "--tokenizer"),
        (["--trace", AZURE, "--vocab-size", 5, "--endpoint", "/v1/chat/completions"], "takes no token ids"),
        (["--trace", AZURE, "--vocab-size", 5, "--endpoint", "/v1/embeddings"], "--endpoint /v1/embeddings"),
        (["--trace", AZURE, "--vocab-size", 5, "--goodput", "speed:1"], "--goodput speed:1"),
        (["--trace", AZURE, "--vocab-size", 5, "--backend", "kafka"], "needs --model"),
        (["--trace", AZURE, "--vocab-size", 5, "--save-detailed"], "goes with --save-result"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, complaint):
    result = CliRunner().invoke(app, ["replay", *map(str, options)])
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert isinstance(result.exception, SystemExit)
