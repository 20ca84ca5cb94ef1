import re
from hashlib import sha256

from infra.docker.make_secrets import make_secrets


def modes(folder):
    return {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}


def test_every_deployment_gets_secrets_of_its_own(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_secrets(tmp_path / name)
    for name in ("redis-password", "cache-salt"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert one != two
        assert len(one) >= 43  # 256 bits
    assert modes(tmp_path / "one") == {"redis-password": "0o400", "cache-salt": "0o400", "users.acl": "0o444"}


def test_redis_knows_the_hash_of_the_password_and_nobody_can_read_it_back(tmp_path):
    make_secrets(tmp_path)
    password = (tmp_path / "redis-password").read_text()
    users = (tmp_path / "users.acl").read_text()
    assert re.findall(r"#([0-9a-f]{64})", users) == [sha256(password.encode()).hexdigest()]
    assert password not in users


def test_a_second_start_changes_nothing_but_the_rights(tmp_path):
    make_secrets(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / "users.acl").chmod(0o600)
    (tmp_path / "users.acl").write_text("user default on nopass ~* +@all")
    make_secrets(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
