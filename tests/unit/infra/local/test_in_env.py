"""`in_env.sh` with a Python that only pretends: it makes an environment of scripts, and can be told to fail."""

import os
import subprocess
from pathlib import Path

import pytest

IN_ENV = Path(__file__).parents[4] / "infra" / "local" / "in_env.sh"

PRETENDING_PYTHON = """#!/bin/bash
case "$*" in
*print*) echo "${PRETEND_VERSION:-3.11}" ;;
"-c import"*) [[ "${PRETEND_VERSION:-3.11}" == 3.11 ]] ;;
"-m venv "*)
    echo made >> "$BATON_CACHE/made"
    sleep 0.2
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/bash\\n[[ ! -e "$BATON_CACHE/uv-fails" ]]\\n' > "$3/bin/uv"
    printf '#!/bin/bash\\necho "in $VIRTUAL_ENV at $PWD"\\n' > "$3/bin/where"
    chmod +x "$3"/bin/*
    ;;
esac
"""


@pytest.fixture
def in_env(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETENDING_PYTHON)
    python.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = os.environ | {"BATON_CACHE": str(cache), "BATON_PYTHON": str(python)}

    def start(*command: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [IN_ENV, *command],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    return start


def times_made(tmp_path: Path) -> int:
    return len((tmp_path / "cache" / "made").read_text().splitlines())


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_a_command_runs_at_the_root_in_an_environment_that_is_made_once(in_env, tmp_path):
    status, out, _ = finish(in_env("where"))
    (venv,) = (tmp_path / "cache").glob("venv-3.11-*")
    assert (status, out) == (0, f"in {venv} at {IN_ENV.parents[2]}\n")
    assert finish(in_env("where"))[:2] == (0, out)
    assert times_made(tmp_path) == 1


def test_an_interrupted_environment_is_not_reused(in_env, tmp_path):
    (tmp_path / "cache" / "uv-fails").touch()
    assert finish(in_env("where"))[:2] == (1, "")
    (tmp_path / "cache" / "uv-fails").unlink()
    assert finish(in_env("where"))[0] == 0
    assert times_made(tmp_path) == 2


def test_those_who_ask_together_wait_for_one(in_env, tmp_path):
    both = [in_env("where"), in_env("where")]
    assert [finish(process)[0] for process in both] == [0, 0]
    assert times_made(tmp_path) == 1


def test_the_status_of_the_command_is_handed_on(in_env):
    assert finish(in_env("bash", "-c", "exit 7"))[0] == 7


def test_a_python_that_does_not_fit_is_named(in_env):
    status, _, told = finish(in_env("where", PRETEND_VERSION="3.13"))
    assert status == 1
    assert "is no Python 3.11 or 3.12" in told


def test_it_says_where_an_environment_belongs_without_making_it(in_env, tmp_path):
    status, out, _ = finish(in_env("--where", "3.12"))
    assert status == 0
    assert Path(out.strip()).parent == tmp_path / "cache"
    assert not (tmp_path / "cache" / "made").exists()
    finish(in_env("where"))
    (made,) = (tmp_path / "cache").glob("venv-3.11-*")
    assert Path(out.strip()).name == made.name.replace("3.11", "3.12")
