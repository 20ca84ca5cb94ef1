from hypothesis import given
from hypothesis import strategies as st

from shared.request import SamplingParams
from shared.text.stream import TextDelta, TextStream
from shared.text.tokeniser import Tokeniser
from tests.tiny_tokenizers import byte_level
from tests.unit.shared.text.test_detokenise import chunk_sizes, chunks

TOKENISER = Tokeniser(byte_level(), eos_ids=(1,))
STOPS = ["the", "a", "好", " \n"]


def run(ids, stops, sizes, min_tokens=0):
    stream = TextStream(TOKENISER, stops, min_tokens=min_tokens)
    deltas = [stream.push(chunk) for chunk in chunks(ids, sizes)]
    last = deltas[-1] if deltas else TextDelta("", None, 0)
    return "".join(delta.text for delta in deltas) + stream.finish(), last.stopped, last.num_ids


@given(
    ids=st.lists(st.integers(0, TOKENISER.vocab_size)),
    stops=st.lists(st.sampled_from(STOPS), max_size=3),
    sizes=chunk_sizes,
    min_tokens=st.integers(0, 4),
)
def test_pushes_of_any_size_give_the_same_text_and_end(ids, stops, sizes, min_tokens):
    assert run(ids, stops, sizes, min_tokens) == run(ids, stops, (1,), min_tokens)


@given(text=st.text("theca 好\n"), stops=st.lists(st.sampled_from(STOPS), max_size=3), sizes=chunk_sizes)
def test_the_text_ends_before_the_first_stop_string(text, stops, sizes):
    shown, stopped, num_ids = run(TOKENISER.encode(text, add_special=False), stops, sizes)
    if stopped is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + stopped)
        ids = TOKENISER.encode(text, add_special=False)
        assert any(stop in TOKENISER.decode(ids[:num_ids]) for stop in stops)
        assert not any(stop in TOKENISER.decode(ids[: num_ids - 1]) for stop in stops)


def test_ids_behind_the_stop_are_void():
    before = TOKENISER.encode("hello ", add_special=False)
    ids = [*before, *TOKENISER.encode("end", add_special=False), *TOKENISER.encode(" more", add_special=False)]
    stream = TextStream(TOKENISER, ["end"])
    delta = stream.push(ids)
    assert delta == TextDelta("hello ", "end", len(before) + len(TOKENISER.encode("end", add_special=False)))
    assert stream.push(ids) == TextDelta("", "end", delta.num_ids)
    assert stream.finish() == ""


def test_stop_strings_count_from_min_tokens_on():
    ids = [TOKENISER.encode("a", add_special=False)[0]] * 3
    assert run(ids, ["a"], (3,), min_tokens=2) == ("a", "a", 2)


def test_the_token_that_ended_the_choice_is_no_text():
    letter = TOKENISER.encode("a", add_special=False)[0]
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(letter,))
    stream = TextStream.of_choice(TOKENISER, [], sampling)
    assert stream.push([*TOKENISER.encode("Hi", add_special=False), letter]).text + stream.finish() == "Hi"


def test_a_character_cut_at_the_end_is_shown_once():
    ids = TOKENISER.encode("x🙂", add_special=False)[:-1]
    stream = TextStream(TOKENISER, ["xy"])
    assert stream.push(ids).text == ""
    assert stream.finish() == "x\ufffd"
