import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text.detokenise import Detokeniser
from shared.text.tokeniser import Tokeniser
from tests.tiny_tokenizers import byte_level, sentencepiece_like

BYTE_LEVEL = Tokeniser(byte_level())
SENTENCEPIECE = Tokeniser(sentencepiece_like())
KINDS = pytest.mark.parametrize("tokeniser", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
LEADING_SPACE = {BYTE_LEVEL: "", SENTENCEPIECE: " "}

chunk_sizes = st.lists(st.integers(1, 5), min_size=1)


def chunks(items, sizes):
    position = 0
    while position < len(items):
        for size in sizes:
            yield items[position : position + size]
            position += size


def streamed(tokeniser, ids, sizes=(1,)):
    detokeniser = Detokeniser(tokeniser)
    return "".join(detokeniser.push(chunk) for chunk in chunks(ids, sizes)) + detokeniser.flush()


@KINDS
@given(data=st.data(), sizes=chunk_sizes)
def test_any_ids_in_any_chunks_give_the_whole_decode(tokeniser, data, sizes):
    ids = data.draw(st.lists(st.integers(0, tokeniser.vocab_size)))
    text = streamed(tokeniser, ids, sizes)
    assert text.removeprefix(LEADING_SPACE[tokeniser]) == tokeniser.decode(ids)
    assert text == streamed(tokeniser, ids)


@KINDS
@given(text=st.text())
def test_no_push_shows_half_a_character(tokeniser, text):
    text = text.replace("\ufffd", "?")
    detokeniser = Detokeniser(tokeniser)
    shown = [detokeniser.push([token_id]) for token_id in tokeniser.encode(text, add_special=False)]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == (LEADING_SPACE[tokeniser] + text if text else "")
    assert detokeniser.flush() == ""


@KINDS
def test_an_emoji_of_several_tokens_appears_with_its_last_one(tokeniser):
    ids = tokeniser.encode("🙂", add_special=False)
    detokeniser = Detokeniser(tokeniser)
    assert "".join(detokeniser.push([token_id]) for token_id in ids[:-1]).strip() == ""
    assert detokeniser.push(ids[-1:]) == "🙂"


@KINDS
def test_a_cut_character_shows_at_the_end(tokeniser):
    detokeniser = Detokeniser(tokeniser)
    detokeniser.push(tokeniser.encode("🙂", add_special=False)[:-1])
    assert detokeniser.flush() == "\ufffd"


def test_an_answer_keeps_the_space_it_begins_with():
    ids = SENTENCEPIECE.encode("hello", add_special=False)
    assert streamed(SENTENCEPIECE, ids) == " hello"
    assert SENTENCEPIECE.decode(ids) == "hello"


def test_special_tokens_are_no_text_even_inside_a_character():
    first, *rest = BYTE_LEVEL.encode("é", add_special=False)
    assert streamed(BYTE_LEVEL, [first, 1, *rest]) == "é"
