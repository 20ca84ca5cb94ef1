"""Packs and lays out small packs; that a real one runs is tried by hand, as it takes a registry and minutes."""

import json
import sys
import tarfile
from importlib.metadata import version

import pytest

from infra.offline import install
from infra.offline.install import InstallError
from infra.offline.pack import cut, write_manifest

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def about(**changes):
    return {"format": install.FORMAT, "python": HERE, "lock": "l", "commit": "c", "provided": {}} | changes


@pytest.fixture
def pack(tmp_path):
    folder = tmp_path / "pack"
    (folder / "cache" / "jars").mkdir(parents=True)
    (folder / "cache" / "jars" / "a.jar").write_bytes(b"jar")
    (folder / "wheels").mkdir()
    (folder / "wheels" / "big.whl").write_bytes(bytes(range(256)) * 10_000)
    (folder / install.INSTALLER).write_text("")
    source = tmp_path / "checkout"
    source.mkdir()
    (source / "README.md").write_text("read me")
    with tarfile.open(folder / install.SOURCE, "w") as archive:
        archive.add(source / "README.md", "README.md")
    write_manifest(folder, about())
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pack_in_parts_is_the_same_pack_when_joined(pack):
    whole = contents(pack)
    parts = cut(pack, 1)
    assert [part.name for part in parts] == ["part-01-of-03", "part-02-of-03", "part-03-of-03"]
    assert contents(pack).keys() == {install.INSTALLER, *(part.name for part in parts)}
    assert all(part.stat().st_size <= 10**6 for part in parts)
    install.join_parts(pack)
    assert contents(pack) == whole
    install.join_parts(pack)
    assert contents(pack) == whole


def test_a_hundred_parts_are_joined_in_the_order_of_their_numbers(pack):
    whole = contents(pack)
    parts = cut(pack, 1)
    joined = b"".join(part.read_bytes() for part in parts)
    for part in parts:
        part.unlink()
    size = -(-len(joined) // 100)
    for number in range(100):
        (pack / f"part-{number + 1:02}-of-100").write_bytes(joined[number * size : (number + 1) * size])
    install.join_parts(pack)
    assert contents(pack) == whole


def test_a_manifest_cut_short_is_noticed(pack):
    (pack / install.MANIFEST).write_text('{"format"')
    with pytest.raises(InstallError, match="copy it again"):
        install.read_manifest(pack)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_part_is_named(pack, number):
    part = cut(pack, 1)[number]
    part.unlink()
    with pytest.raises(InstallError, match=part.name):
        install.join_parts(pack)


def test_parts_of_two_packs_are_not_joined(pack):
    cut(pack, 1)
    (pack / "part-01-of-02").write_bytes(b"")
    with pytest.raises(InstallError, match="of another pack"):
        install.join_parts(pack)


def test_a_part_that_was_cut_short_is_noticed_and_the_parts_stay(pack):
    parts = cut(pack, 1)
    parts[1].write_bytes(parts[1].read_bytes()[:1000])
    with pytest.raises(InstallError, match="copy them again"):
        install.join_parts(pack)
    assert all(part.exists() for part in parts)


def test_what_changed_on_the_way_is_named(pack):
    manifest = install.read_manifest(pack)
    install.verify(pack, manifest)
    (pack / "wheels" / "big.whl").write_bytes(bytes(2_560_000))
    (pack / "cache" / "jars" / "a.jar").unlink()
    with pytest.raises(InstallError, match=r"cache/jars/a\.jar, wheels/big\.whl"):
        install.verify(pack, manifest)


def test_a_folder_that_is_no_pack_is_refused(tmp_path):
    with pytest.raises(InstallError, match=r"no manifest\.json"):
        install.read_manifest(tmp_path)
    (tmp_path / install.MANIFEST).write_text(json.dumps(about(format=0)))
    with pytest.raises(InstallError, match="format 0"):
        install.read_manifest(tmp_path)


def test_another_python_is_refused():
    with pytest.raises(InstallError, match=r"for Python 3\.9"):
        install.check_host(about(python="3.9"))


def test_what_the_host_was_to_provide_is_looked_for():
    pytest_version = version("pytest")
    assert install.check_host(about(provided={"pytest": pytest_version})) == []
    (remark,) = install.check_host(about(provided={"pytest": "0.1"}))
    assert f"pytest {pytest_version}; 0.1 is locked" in remark
    with pytest.raises(InstallError, match="no-such-package"):
        install.check_host(about(provided={"pytest": pytest_version, "no-such-package": "1"}))


def test_the_cache_gets_what_it_lacks_and_keeps_what_it_has(pack, tmp_path):
    cache = tmp_path / "home" / "cache"
    install.fill_cache(pack, cache)
    assert contents(cache) == {"jars/a.jar": b"jar"}
    (cache / "jars" / "a.jar").write_bytes(b"mine")
    install.fill_cache(pack, cache)
    assert contents(cache) == {"jars/a.jar": b"mine"}


def test_the_source_goes_into_an_empty_folder_only(pack, tmp_path):
    install.lay_out_source(pack, tmp_path / "baton")
    assert contents(tmp_path / "baton") == {"README.md": b"read me"}
    with pytest.raises(InstallError, match="not empty"):
        install.lay_out_source(pack, tmp_path / "baton")


def test_a_checkout_of_another_lock_is_refused(pack, tmp_path):
    (tmp_path / "checkout" / "requirements.lock").write_text("other")
    with pytest.raises(InstallError, match=r"another requirements\.lock"):
        install.install(pack, tmp_path / "checkout", unpack_source=False)
