from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.page.svg import LEAST_ON_LOG, Drawing, Scale, linear_ticks, log_bounds, log_ticks


@pytest.mark.parametrize(
    ("lowest", "highest", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.35, [0, 0.1, 0.2, 0.3]), (3, 11, [4, 6, 8, 10])],
)
def test_linear_ticks_are_round(lowest, highest, ticks):
    assert linear_ticks(lowest, highest, 5) == ticks


def test_log_ticks_are_closer_over_fewer_decades():
    assert log_ticks(0.001, 10_000) == [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10_000]
    assert log_ticks(0.9, 55) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(0.9, 4.5) == [1, 1.5, 2, 3, 4]


@given(st.lists(st.floats(0, 1e5)))
def test_log_bounds_enclose_all_but_the_least_values_and_have_ticks(values):
    lowest, highest = log_bounds(values)
    assert all(lowest <= value <= highest for value in values if value > LEAST_ON_LOG)
    assert log_ticks(lowest, highest)


def test_scales_map_their_ends_and_their_middle():
    linear, log = Scale(0, 10, 100, 200), Scale(0.1, 10, 0, 100, is_log=True)
    assert [linear(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert [log(value) for value in (0.1, 1, 10)] == pytest.approx([0, 50, 100])
    assert log(0) == pytest.approx(-50)


def test_words_are_escaped_and_hover_texts_are_titles():
    drawing = Drawing(10, 10, 'a "label"')
    drawing.text(1, 2.5, "<&>")
    drawing.rect(0, 0, -1, 3, "k", title="<b>")
    root = ET.fromstring(drawing.markup())
    assert root.get("aria-label") == 'a "label"'
    assert root.find("text").text == "<&>"
    assert (root.find("rect").get("width"), root.find("rect/title").text) == ("0", "<b>")
