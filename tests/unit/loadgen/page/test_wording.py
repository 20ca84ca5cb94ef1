import pytest

from loadgen.page.overview import message_of
from loadgen.page.wording import counted, percent_text, seconds_text, short


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0, "0 ms"),
        (0.000_82, "0.82 ms"),
        (0.099_999_9, "100 ms"),
        (0.348, "348 ms"),
        (0.9999, "1.00 s"),
        (83.04, "83.0 s"),
        (1234.4, "20 min 34 s"),
        (-0.01, "−10.0 ms"),
    ],
)
def test_times_have_three_figures_and_the_unit_that_suits(value_s, text):
    assert seconds_text(value_s) == text


def test_only_all_is_100_percent_and_only_none_is_0():
    assert [percent_text(share) for share in (0, 0.000_1, 0.5, 0.9999, 1)] == ["0%", "0.1%", "50.0%", "99.9%", "100%"]


def test_counts_and_ticks():
    assert (counted(1, "request"), counted(1200, "request")) == ("1 request", "1,200 requests")
    assert (short(0.5), short(20), short(20_000)) == ("0.5", "20", "20k")


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        ("plain words", "plain words"),
        ('{"error": {"message": "too long", "input": "what was asked"}}', "too long"),
        ('{"message": "busy"}', "busy"),
        ('{"error": "odd"}', '{"error": "odd"}'),
        ("[1]", "[1]"),
    ],
)
def test_of_an_error_body_only_its_message_is_shown(detail, message):
    assert message_of(detail) == message
