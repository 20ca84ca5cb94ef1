"""worker.sh and model.sh with stand-ins for the programs that they call."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[4] / "infra/docker"
PYTHON = '#!/bin/sh\necho "$@"\nenv | grep ^BATON_ | sort\n'
HOSTNAME = '#!/bin/sh\nif [ "$1" = -i ]; then echo "172.18.0.6 10.0.0.6"; else echo 5f8dae9d2ba6; fi\n'


def run(tmp_path: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    for name, text in {"python": PYTHON, "hostname": HOSTNAME}.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(command, env={"PATH": path, **env}, capture_output=True, text=True, check=False, timeout=30)


def test_a_worker_is_told_its_own_address_and_a_name(tmp_path: Path):
    done = run(tmp_path, str(SCRIPTS / "worker.sh"), "decode")
    assert done.stdout.splitlines() == [
        "-m services.decode",
        "BATON_NAME=decode-5f8dae9d2ba6",
        "BATON_TRANSFER_HOST=172.18.0.6",
    ]


def test_an_address_and_a_name_that_are_set_stay(tmp_path: Path):
    done = run(tmp_path, str(SCRIPTS / "worker.sh"), "prefill", BATON_NAME="left", BATON_TRANSFER_HOST="10.0.0.6")
    assert done.stdout.splitlines()[1:] == ["BATON_NAME=left", "BATON_TRANSFER_HOST=10.0.0.6"]


def test_a_model_that_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").touch()
    done = run(tmp_path, str(SCRIPTS / "model.sh"), BATON_MODEL=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path} is there\n")


@pytest.mark.parametrize("model", ["/models/another", "/nowhere"])
def test_another_model_that_is_missing_is_an_error_that_says_what_to_do(tmp_path: Path, model: str):
    done = run(tmp_path, str(SCRIPTS / "model.sh"), BATON_MODEL=model)
    assert done.returncode == 1
    assert model in done.stderr
    assert "MODELS and BATON_MODEL in .env" in done.stderr
