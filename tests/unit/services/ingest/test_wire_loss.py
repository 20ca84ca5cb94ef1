import pytest

from services.ingest.settings import IngestProcessSettings
from shared.errors import StartupError
from shared.wire.wire_format import WireFormat


@pytest.fixture
def read(monkeypatch):
    def read_with(**variables):
        for name, value in {"model": "unused", **variables}.items():
            monkeypatch.setenv(f"BATON_{name}".upper(), value)
        return IngestProcessSettings.read().wire_loss

    return read_with


def test_kv_travels_as_it_is_unless_the_operator_says_otherwise(read):
    assert read().allowed("anyone") is WireFormat.NATIVE


def test_a_tenant_may_have_its_own_word_above_or_below_that_for_all(read):
    loss = read(max_wire_loss="int8", tenant_max_wire_loss='{"exact": "native", "frugal": "int4"}')
    allowed = [loss.allowed(tenant) for tenant in ("exact", "frugal", "anyone")]
    assert allowed == [WireFormat.NATIVE, WireFormat.INT4, WireFormat.INT8]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("max_wire_loss", "int2"),
        ("tenant_max_wire_loss", '{"a": "int2"}'),
        ("tenant_max_wire_loss", "int8"),
        ("tenant_max_wire_loss", '["a"]'),
    ],
)
def test_what_is_wrong_is_refused_by_name(read, variable, value):
    with pytest.raises(StartupError, match=f"BATON_{variable}".upper()):
        read(**{variable: value})
