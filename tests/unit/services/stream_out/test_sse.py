import pytest

from services.stream_out.sse import BEFORE_ALL, Cursor, format_event, parse_event_id
from shared.errors import InvalidRequest
from shared.request import RequestId


def test_an_event_names_its_request_its_record_and_its_place():
    event = format_event(RequestId("r-1"), Cursor(17, 2), b'{"a":1}')
    assert event == b'id: r-1:17.2\ndata: {"a":1}\n\n'


def test_an_id_reads_back():
    assert parse_event_id("r.1_x-y:17.2") == ("r.1_x-y", Cursor(17, 2))
    assert BEFORE_ALL < Cursor(0, 0) < Cursor(0, 1) < Cursor(9, 0) < Cursor(10, 0)


@pytest.mark.parametrize(
    "text", ["", "r", "r:", "r:1", "r:1.", "r:.1", "r:-1.0", "r:1.0.0", ":1.0", "r r:1.0", "r:1.²"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(InvalidRequest) as caught:
        parse_event_id(text)
    assert caught.value.param == "Last-Event-ID"
