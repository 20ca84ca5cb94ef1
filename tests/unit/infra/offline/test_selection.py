from pathlib import Path

import pytest

from infra.offline.selection import direct_names, read_lock, select
from shared.errors import StartupError

ROOT = Path(__file__).parents[4]

LOCK = """\
bus==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
    # via baton (pyproject.toml)
engine==2.0 \\
    --hash=sha256:bb
    # via
    #   baton (pyproject.toml)
    #   trainer
gpu-lib==3.0 ; sys_platform == 'linux' \\
    --hash=sha256:cc
    # via engine
maths==4.0 ; python_full_version < '3.12' \\
    --hash=sha256:dd
    # via engine
maths==4.1 ; python_full_version >= '3.12' \\
    --hash=sha256:de
    # via
    #   bus
    #   engine
trainer==5.0 \\
    --hash=sha256:ee
    # via baton (pyproject.toml)
windows-lib==6.0 ; sys_platform == 'win32' \\
    --hash=sha256:ff
    # via bus
"""


def chosen(direct, provided=(), python="3.12"):
    return [f"{package.name} {package.version}" for package in select(read_lock(LOCK), direct, provided, python)]


def test_what_is_asked_for_comes_with_what_it_needs_on_that_host():
    assert chosen({"bus", "engine"}) == ["bus 1.0", "engine 2.0", "gpu-lib 3.0", "maths 4.1"]
    assert chosen({"bus", "engine"}, python="3.11") == ["bus 1.0", "engine 2.0", "gpu-lib 3.0", "maths 4.0"]
    assert chosen({"bus"}) == ["bus 1.0", "maths 4.1"]


def test_with_a_provided_package_goes_what_only_it_needs():
    assert chosen({"bus", "engine"}, {"engine"}) == ["bus 1.0", "maths 4.1"]
    assert chosen({"engine"}, {"engine"}) == []


def test_a_package_that_the_lock_does_not_have_cannot_be_provided():
    with pytest.raises(StartupError, match="no package tensors"):
        chosen({"bus"}, {"tensors"})


def test_a_line_carries_every_hash():
    assert read_lock(LOCK)[0].line() == "bus==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:ab\n"


def test_a_lock_of_another_form_is_refused():
    with pytest.raises(StartupError, match="-e"):
        read_lock("-e .\n")


def test_the_real_lock_gives_each_package_once_and_hashed():
    locked = read_lock((ROOT / "requirements.lock").read_text())
    direct = direct_names((ROOT / "pyproject.toml").read_text(), ["worker", "local", "demo"])
    for python in ("3.11", "3.12"):
        packages = select(locked, direct, (), python)
        names = [package.name for package in packages]
        assert len(set(names)) == len(names)
        assert direct <= set(names)
        assert all(package.hashes for package in packages)
        assert "pytest" not in names
        without_torch = {package.name for package in select(locked, direct, {"torch", "triton"}, python)}
        assert not any(name.startswith("nvidia-cu") for name in without_torch)


def test_an_unknown_extra_is_named():
    with pytest.raises(StartupError, match="no such extra: gui"):
        direct_names((ROOT / "pyproject.toml").read_text(), ["gui"])
