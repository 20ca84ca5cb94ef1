from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadgen.__main__ import app
from loadgen.page.render import render_page
from tests.unit.loadgen.page.runs import mixed, saved_of

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
        (["--trace", AZURE, "--vocab-size", 5, "--rows", "nan:"], "--rows nan:: 'nan' is no finite number"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, complaint):
    result = CliRunner().invoke(app, ["replay", *map(str, options)])
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert isinstance(result.exception, SystemExit)


def test_a_saved_result_becomes_a_page(tmp_path):
    saved, page = saved_of(mixed(5)), tmp_path / "new" / "page.html"
    result = tmp_path / "result.json"
    result.write_text(saved.model_dump_json(exclude={"metadata"}).removesuffix("}") + ',"metadata_build":"7"}')
    assert CliRunner().invoke(app, ["report", str(result), "--html", str(page)]).exit_code == 0
    assert page.read_bytes() == render_page(saved)


def test_what_is_no_result_is_refused_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path / "none.json"), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert "cannot read the result" in " ".join(result.stderr.split())
