import json
import os

import pytest
import structlog
from typer.testing import CliRunner

from services.stream_out.__main__ import app, read_tenants
from services.stream_out.settings import Settings
from services.stream_out.tenants import Tenants, key_hash
from shared.errors import NotAllowed, NotAuthenticated, StartupError
from shared.policy.limits import TenantLimits
from shared.request import Priority


def written(folder, tenants):
    path = folder / "tenants.json"
    path.write_text(tenants if isinstance(tenants, str) else json.dumps(tenants))
    os.utime(path, ns=(written.counter, written.counter))
    written.counter += 10**9
    return path


written.counter = 10**18

ACME = {"keys": [key_hash("a"), key_hash("b")], "models": ["small"], "max_concurrent": 3, "tokens_per_minute": 7}


def test_a_key_names_its_tenant_and_what_it_may(tmp_path):
    tenants = Tenants(written(tmp_path, {"acme": ACME, "rival": {"keys": [key_hash("c")]}}))
    for key in ("a", "b"):
        caller = tenants.caller(f"Bearer {key}")
        assert (caller.tenant, caller.limits) == ("acme", TenantLimits(3, None, 7))
        caller.check_model("small")
        with pytest.raises(NotAllowed) as refused:
            caller.check_model("large")
        assert refused.value.param == "model"
    rival = tenants.caller("bearer  c ")
    assert (rival.tenant, rival.limits) == ("rival", TenantLimits())
    assert rival.may_use("large")


def test_a_tenant_may_be_kept_to_some_priorities(tmp_path):
    may = {"acme": {"keys": [key_hash("a")], "priorities": ["batch"]}, "rival": {"keys": [key_hash("c")]}}
    tenants = Tenants(written(tmp_path, may))
    tenants.caller("Bearer a").check_priority(Priority.BATCH)
    with pytest.raises(NotAllowed) as refused:
        tenants.caller("Bearer a").check_priority(Priority.STANDARD)
    assert (refused.value.param, refused.value.http_status) == ("x-baton-priority", 403)
    for priority in Priority:
        tenants.caller("Bearer c").check_priority(priority)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer  ", "Basic a", "a", "Bearer d", "Bearer " + key_hash("a")]
)
def test_nobody_else_comes_in(tmp_path, header):
    with pytest.raises(NotAuthenticated):
        Tenants(written(tmp_path, {"acme": ACME})).caller(header)


@pytest.mark.parametrize(
    "tenants",
    [
        "{",
        "[]",
        {"acme": {}},
        {"acme": {"keys": ["a plain key"]}},
        {"acme": {"keys": [], "max_concurent": 3}},
        {"acme": {"keys": [], "requests_per_minute": 0}},
        {"acme": {"keys": [], "priorities": []}},
        {"acme": {"keys": [], "priorities": ["urgent"]}},
        {"a b": {"keys": []}},
        {"acme": ACME, "rival": ACME},
    ],
)
def test_a_file_that_says_nothing_sensible_stops_the_start(tmp_path, tenants):
    path = written(tmp_path, tenants)
    with pytest.raises(StartupError, match=r"tenants\.json") as error:
        Tenants(path)
    assert "a plain key" not in str(error.value)


def test_the_file_is_read_again_when_it_changes_and_nonsense_changes_nothing(tmp_path):
    logs = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(None, processors=[logs], wrapper_class=structlog.stdlib.BoundLogger)
    tenants = Tenants(written(tmp_path, {"acme": ACME}))
    tenants.refresh(logger)
    assert logs.entries == []
    for nonsense in ("{", None):
        path = written(tmp_path, nonsense or "")
        if nonsense is None:
            path.unlink()
        for _ in range(3):
            tenants.refresh(logger)
        assert tenants.caller("Bearer a").tenant == "acme"
        assert tenants.is_outdated
    assert [entry["log_level"] for entry in logs.entries] == ["error", "error"], "each once"
    written(tmp_path, {"acme": {"keys": [key_hash("new")]}})
    tenants.refresh(logger)
    assert not tenants.is_outdated
    assert tenants.caller("Bearer new").tenant == "acme"
    with pytest.raises(NotAuthenticated):
        tenants.caller("Bearer a")


def test_a_new_key_is_shown_with_the_hash_that_lets_it_in(tmp_path):
    shown = [CliRunner().invoke(app, ["new-key", "--tenant", "acme"]).output.split() for _ in range(2)]
    key, known = next(word for word in shown[0] if word.startswith("baton-")), shown[0][-1]
    assert shown[0] != shown[1]
    assert Tenants(written(tmp_path, {"acme": {"keys": [known]}})).caller(f"Bearer {key}").tenant == "acme"
    assert CliRunner().invoke(app, ["new-key", "--tenant", "a b"]).exit_code != 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_on_loopback_nobody_needs_a_key(host):
    assert read_tenants(Settings(model=".", http_host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "edge.example"])
def test_elsewhere_keys_are_needed_or_said_not_to_be(tmp_path, host):
    with pytest.raises(StartupError, match="BATON_TENANTS"):
        read_tenants(Settings(model=".", http_host=host))
    assert read_tenants(Settings(model=".", http_host=host, allow_anonymous=True)) is None
    path = written(tmp_path, {"acme": ACME})
    assert read_tenants(Settings(model=".", http_host=host, tenants=path)).caller("Bearer a").tenant == "acme"
