import pytest

from loadgen.measure import Slo
from loadgen.settings import parse_goodput, parse_pairs, parse_rows, parse_window
from shared.errors import StartupError


def test_goodput_limits_are_milliseconds_by_name():
    assert parse_goodput(["ttft:500 tpot:50.5"]) == Slo(ttft_ms=500, tpot_ms=50.5)
    assert parse_goodput(["ttft:500", "e2el:9,tpot:1"]) == Slo(ttft_ms=500, tpot_ms=1, e2el_ms=9)
    assert parse_goodput([]) == Slo()


def test_slices_are_half_open_and_may_lack_a_side():
    assert parse_rows(None) is None
    assert parse_rows("2:10") == (2, 10)
    assert parse_rows("2:") == (2, None)
    assert parse_window(":1.5") == (0, 1.5)


def test_pairs_may_hold_equals_signs():
    assert parse_pairs("--metadata", ["a=b=c", "d="]) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (lambda text: parse_goodput([text]), "itl:5"),
        (lambda text: parse_goodput([text]), "ttft"),
        (lambda text: parse_goodput([text]), "ttft:fast"),
        (lambda text: parse_goodput([text]), "ttft:0"),
        (parse_rows, "5"),
        (parse_rows, "1.5:3"),
        (parse_rows, "5:5"),
        (parse_rows, "nan:"),
        (parse_rows, ":inf"),
        (parse_window, "-1:5"),
        (parse_window, "a:5"),
        (lambda text: parse_pairs("--metadata", [text]), "novalue"),
    ],
)
def test_what_cannot_be_read_is_refused_by_option_and_text(parse, text):
    with pytest.raises(StartupError, match=f"--(goodput|rows|window|metadata).*{text}"):
        parse(text)
