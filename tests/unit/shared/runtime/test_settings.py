import ssl
from pathlib import Path

import pytest

from shared.errors import StartupError
from shared.runtime.access import PLAIN_KAFKA, Certificates, read_secret
from shared.runtime.settings import KafkaSettings, ServiceSettings


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BATON_MODEL", str(tmp_path))

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"BATON_{name}", str(value))

    return set_all


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"KAFKA_SECURITY": "tls", "KAFKA_CERT": "c"}, "BATON_KAFKA_CERT and BATON_KAFKA_KEY go together"),
        ({"KAFKA_SECURITY": "tls", "KAFKA_KEY": "k"}, "BATON_KAFKA_CERT and BATON_KAFKA_KEY go together"),
        ({"KAFKA_CA": "ca"}, "need BATON_KAFKA_SECURITY=tls"),
        (
            {"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USER": "u", "KAFKA_SASL_PASSWORD_FILE": "f"},
            "need BATON_KAFKA_SECURITY=tls",
        ),
        ({"KAFKA_SECURITY": "tls", "KAFKA_SASL_USER": "u"}, "go together"),
        ({"KAFKA_SECURITY": "tls", "KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USER": "u"}, "go together"),
        ({"KAFKA_SECURITY": "sasl"}, "BATON_KAFKA_SECURITY"),
        ({"KAFKA_SASL_MECHANISM": "GSSAPI"}, "BATON_KAFKA_SASL_MECHANISM"),
        ({"REDIS_USER": "u"}, "BATON_REDIS_USER needs BATON_REDIS_PASSWORD_FILE"),
        ({"REDIS_CA": "ca"}, "begins with rediss"),
        ({"REDIS": "rediss://h:1", "REDIS_CERT": "c"}, "BATON_REDIS_CERT and BATON_REDIS_KEY go together"),
        ({"REDIS": "redis://:swordfish@h:1"}, "BATON_REDIS: .*no user, password"),
        ({"REDIS": "rediss://h:1?ssl_cert_reqs=none&p=swordfish"}, "BATON_REDIS: .*options"),
        ({"REDIS": "http://h:1/swordfish"}, "BATON_REDIS: .*redis://"),
    ],
)
def test_half_a_setting_is_refused_by_name_and_not_quoted(environment, variables, words):
    environment(**variables)
    with pytest.raises(StartupError, match=words) as error:
        ServiceSettings.read()
    assert "swordfish" not in str(error.value)


def test_nothing_set_is_plain_text(environment):
    environment(KAFKA_CA="", REDIS_USER="")
    settings = ServiceSettings.read()
    assert settings.kafka_access() == PLAIN_KAFKA
    assert settings.kafka_access().client_options() == {}
    assert settings.redis_access().credentials is None


def test_tools_need_no_model(monkeypatch):
    monkeypatch.delenv("BATON_MODEL", raising=False)
    assert KafkaSettings.read().kafka_access() == PLAIN_KAFKA


def test_the_password_alone_is_the_default_users(environment, tmp_path):
    (tmp_path / "password").write_text("swordfish\n")
    environment(REDIS_PASSWORD_FILE=tmp_path / "password")
    credentials = ServiceSettings.read().redis_access().credentials
    assert (credentials.user, credentials.password.get_secret_value()) == ("default", "swordfish")
    assert "swordfish" not in repr(credentials)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe"])
def test_a_file_that_holds_no_secret_is_named(tmp_path, content):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=str(path)):
        read_secret(path)


def test_a_secret_keeps_its_spaces(tmp_path):
    (tmp_path / "password").write_text(" a b \r\n")
    assert read_secret(tmp_path / "password").get_secret_value() == " a b "


def test_without_an_authority_of_ours_this_machines_are_trusted():
    context = Certificates().context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(StartupError, match=r"nowhere\.pem"):
        Certificates(ca=Path("nowhere.pem")).context()
