import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text.stop import StopDelta, StopMatcher

few_letters = st.text("ab", min_size=1, max_size=4)


def naive(text, stops):
    """Where the shown text ends and by which stop string: the match that ends first, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def held_back(text, stops):
    """The longest end of `text` that a stop string could grow from."""
    lengths = range(1, len(text) + 1)
    return max((n for n in lengths for s in stops if len(s) > n and s.startswith(text[-n:])), default=0)


@given(pieces=st.lists(st.text("ab", max_size=4)), stops=st.lists(few_letters, max_size=4))
def test_equals_a_search_over_the_whole_text(pieces, stops):
    matcher = StopMatcher(stops)
    shown, so_far = "", ""
    for piece in pieces:
        so_far += piece
        delta = matcher.feed(piece)
        shown += delta.text
        expected, stopped = naive(so_far, stops)
        assert delta.stopped == stopped
        assert shown == expected[: len(expected) if stopped else len(so_far) - held_back(so_far, stops)]
    assert shown + matcher.flush() == naive("".join(pieces), stops)[0]


def test_holds_back_only_what_may_become_a_stop_string():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.feed("Hi.\n") == StopDelta("Hi.")
    assert matcher.feed("\nUse") == StopDelta("")
    assert matcher.feed("d it") == StopDelta("\n\nUsed it")


def test_text_behind_a_match_is_void():
    matcher = StopMatcher(["END"])
    assert matcher.feed("one EN") == StopDelta("one ")
    assert matcher.feed("D two") == StopDelta("", "END")
    assert matcher.feed("END three") == StopDelta("", "END")
    assert matcher.flush() == ""


def test_the_end_shows_what_was_held():
    matcher = StopMatcher(["END"])
    matcher.feed("EN")
    assert matcher.flush() == "EN"


def test_of_two_that_end_together_the_longer_counts():
    assert StopMatcher(["b", "ab"]).feed("xab") == StopDelta("x", "ab")


def test_a_match_completed_while_unarmed_is_text():
    matcher = StopMatcher(["aa"])
    assert matcher.feed("xaa", armed=False) == StopDelta("xa")
    assert matcher.feed("b") == StopDelta("ab")
    assert matcher.feed("aa") == StopDelta("", "aa")


def test_an_old_match_is_not_found_later():
    matcher = StopMatcher(["ab", "abab"])
    assert matcher.feed("ab", armed=False).stopped is None
    assert matcher.feed("x").stopped is None


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
