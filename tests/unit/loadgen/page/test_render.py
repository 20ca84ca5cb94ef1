import re
from dataclasses import replace
from html.parser import HTMLParser
from random import Random
from xml.etree import ElementTree as ET

import pytest

from loadgen.measure import Slo
from loadgen.page.render import render_page
from loadgen.page.timeline import MAX_BARS
from tests.unit.loadgen.builders import record
from tests.unit.loadgen.page.runs import answered, failed, mixed, saved_of

LOADING_ATTRIBUTES = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


def parsed(page: bytes) -> ET.Element:
    """The page's tree. It is written so that it is XML too, which has no mercy on what is not closed or not escaped."""
    text = page.decode()
    assert text.startswith("<!DOCTYPE html>")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def words_of(page: bytes) -> str:
    return " ".join(" ".join(parsed(page).itertext()).split())


class References(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in LOADING_ATTRIBUTES]

    handle_startendtag = handle_starttag


def lone_answer(**fields):
    return answered(0, rng=Random(1), **fields)


def over_kafka():
    """As its transport sees it: no pieces, the server's stamps."""
    return [replace(each, gaps_s=()) for each in mixed(20)]


RUNS = {
    "mixed": lambda: saved_of(mixed(40)),
    "no limits": lambda: saved_of(mixed(40), slo=Slo()),
    "one limit": lambda: saved_of(mixed(40), slo=Slo(e2el_ms=1500)),
    "more than bars": lambda: saved_of(mixed(MAX_BARS + 1)),
    "no stamps": lambda: saved_of(mixed(20, stamped=False)),
    "over Kafka": lambda: saved_of(over_kafka(), backend="kafka"),
    "one request": lambda: saved_of([lone_answer()]),
    "one token": lambda: saved_of([lone_answer(num_gaps=0)]),
    "two tokens": lambda: saved_of([lone_answer(num_gaps=1)]),
    "all failed": lambda: saved_of([failed(row) for row in range(3)]),
    "many failed": lambda: saved_of([failed(row) for row in range(MAX_BARS + 1)]),
    "never sent": lambda: saved_of([record(0, bucket="not_sent", sent_s=None)]),
    "cut off in the answer": lambda: saved_of(
        [replace(lone_answer(), bucket="disconnect", answered_s=None, ended_s=9.0, output_tokens=None)]
    ),
    "no rows": lambda: saved_of([], duration=0),
    "no time": lambda: saved_of(
        [record(sent_s=0, first_token_s=0, last_token_s=0, answered_s=0, gaps_s=(0.0, 0.0))], duration=0
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_makes_a_page_that_is_whole_and_loads_nothing(name):
    page = render_page(RUNS[name]())
    parsed(page)
    references = References(page)
    assert references.found == []
    assert references.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"} == set()
    assert not re.search(rb"@import|url\(|@font-face", page)
    assert not re.search(rb"""["ML ]-?(nan|inf)\b""", page)


def test_a_thousand_requests_make_less_than_a_megabyte():
    assert len(render_page(saved_of(mixed(1000)))) < 1_000_000
    assert len(render_page(saved_of(mixed(MAX_BARS)))) < 1_000_000


def test_names_and_messages_are_text_and_nothing_else():
    evil = '<script>alert("&")</script>'
    saved = saved_of(
        [lone_answer(), failed(1, bucket="http_400", detail=evil)], model_id=evil, notes=[evil], metadata_note=evil
    )
    page = render_page(saved)
    assert "script" not in References(page).tags
    assert words_of(page).count(evil) >= 4
    assert f"on {evil}" in parsed(page).find("head/title").text


def test_the_page_says_how_it_went_and_why():
    words = words_of(render_page(saved_of(mixed(40))))
    for part in (
        "4 of 40 requests failed (http_429 4)",
        "of all requests met TTFT ≤ 500 ms, TPOT ≤ 100 ms; missed:",
        "The slowest 4 requests spent",
        "placed → prefilling (waits for the prefill worker)",
        "Between token 1 and 2",
        "The client kept to its schedule",
        "rows 2:",
        "build 7",
    ):
        assert part in words


def test_a_late_client_is_said_to_make_the_figures_doubtful():
    late = [replace(each, sent_s=each.row.at_s + 0.2) for each in mixed(9)]
    words = words_of(render_page(saved_of(late)))
    assert "This client itself was late: p99 of its sends 200 ms behind the schedule" in words
    assert "doubt the figures" in words


def test_without_stamps_the_page_says_what_cannot_be_told():
    words = words_of(render_page(saved_of(mixed(20, stamped=False))))
    assert "The server sent no time stamps of its own" in words
    assert "sent → first piece" in words
    assert "prefilling" not in words


def test_over_kafka_the_hand_off_is_told_by_the_stamps():
    words = words_of(render_page(saved_of(over_kafka())))
    assert "No pieces of answers were seen" in words


def test_hover_texts_tell_about_single_requests():
    titles = [title.text for title in parsed(render_page(saved_of(mixed(20)))).iter("title")]
    assert any(title.startswith("#3, 4 → 3 tokens, sent at 0.30 s, first token after") for title in titles)
    assert any("http_429 after 10.0 ms" in title for title in titles)
    assert any(title.startswith("TTFT ≤ 500 ms, TPOT ≤ 100 ms:") for title in titles)
