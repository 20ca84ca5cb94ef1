import orjson
import pytest

from loadgen.measure import Slo
from loadgen.saved import parse_saved, read_saved
from shared.errors import StartupError
from tests.unit.loadgen.page.runs import mixed, saved_of


def test_records_come_back_as_they_were_measured():
    records = mixed(12)
    saved = saved_of(records, slo=Slo(ttft_ms=500, e2el_ms=9))
    assert saved.records() == records
    assert saved.slo == Slo(ttft_ms=500, e2el_ms=9)
    assert saved.metadata == {"build": "7"}
    assert saved.rows == (2, None)


def changed(**changes) -> bytes:
    fields = saved_of(mixed(2)).model_dump(mode="json", exclude={"metadata"})
    return orjson.dumps(fields | changes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"no JSON", "is no result of `loadgen replay`"),
        (b"[]", "is no result of `loadgen replay`"),
        (changed(duration=-1), "duration: "),
        (changed(requests=[{}]), "requests.0."),
        (orjson.dumps({k: v for k, v in orjson.loads(changed()).items() if k != "requests"}), "--save-detailed"),
    ],
)
def test_what_is_no_detailed_result_is_refused_by_file_and_field(tmp_path, content, complaint):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=r"result\.json") as refused:
        read_saved(path)
    assert complaint in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StartupError, match="cannot read the result"):
        read_saved(tmp_path / "none.json")


def test_a_result_may_have_fields_of_later_versions():
    assert parse_saved(changed(novelty=1)).duration == saved_of(mixed(2)).duration
