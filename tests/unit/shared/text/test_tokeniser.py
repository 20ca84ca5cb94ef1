import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.errors import InvalidRequest, UnsupportedCheckpoint
from shared.text.tokeniser import Tokeniser
from shared.wire.openai import ChatMessage
from tests.tiny_tokenizers import byte_level, sentencepiece_like, write_folder

NOW = datetime(2026, 1, 2, tzinfo=UTC)
HELLO = [ChatMessage("user", "hello")]
KINDS = {"byte_level": byte_level(), "sentencepiece_like": sentencepiece_like()}
TEXTS = ["hello world", " hello", "Grüße 你好 🙂👩‍👩‍👧 привет", "the mat\n\n\tsat", "\u0000x", "\ufffd", "a  b   c"]


@pytest.fixture(params=[byte_level, sentencepiece_like])
def folder(request, tmp_path):
    return write_folder(tmp_path, request.param())


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_encoded_text_back(folder, text):
    tokeniser = Tokeniser.load(folder)
    assert tokeniser.decode(tokeniser.encode(text)) == text


def test_ids_are_those_of_the_library_with_one_bos(folder):
    tokeniser = Tokeniser.load(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert list(tokeniser.encode("hello cat")) == reference.encode("hello cat").ids
    bos = reference.token_to_id("<s>")
    assert list(tokeniser.encode("<s>hello")).count(bos) == 1
    assert list(tokeniser.encode("hello", add_special=False)).count(bos) == 0


def test_a_bos_that_is_not_added_is_left_as_written(tmp_path):
    tokeniser = Tokeniser.load(write_folder(tmp_path, byte_level(), add_bos_token=False))
    assert list(tokeniser.encode("<s><s>"))[:2] == [0, 0]


def test_the_name_of_a_special_token_is_that_token(folder):
    tokeniser = Tokeniser.load(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert reference.token_to_id("<|im_end|>") in tokeniser.encode("a<|im_end|>")


def test_chat_is_templated_with_exactly_one_bos(folder):
    tokeniser = Tokeniser.load(folder)
    ids = tokeniser.encode_chat(HELLO, now=NOW)
    names = [tokeniser.token_text(i) for i in ids]
    assert names[:2] == ["<s>", "<|im_start|>"]
    assert names.count("<s>") == 1
    assert names.count("<|im_end|>") == 1
    assert tokeniser.decode(ids).replace(" ", "") == "user\nhello\nassistant\n"


def test_chat_without_a_template_names_messages(tmp_path):
    tokeniser = Tokeniser.load(write_folder(tmp_path, byte_level(), chat_template=None))
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        tokeniser.encode_chat(HELLO, now=NOW)
    assert caught.value.param == "messages"


@given(data=st.data())
def test_byte_level_decoding_equals_the_library_for_any_ids(data):
    library = KINDS["byte_level"]
    tokeniser = Tokeniser(Tokenizer.from_str(library.to_str()))
    ids = data.draw(st.lists(st.integers(0, tokeniser.vocab_size + 5)))
    assert tokeniser.decode(ids) == library.decode(ids, skip_special_tokens=True)


@given(text=st.text())
def test_sentencepiece_decoding_equals_the_library_for_any_text(text):
    library = KINDS["sentencepiece_like"]
    tokeniser = Tokeniser(Tokenizer.from_str(library.to_str()))
    ids = tokeniser.encode(text, add_special=False)
    assert tokeniser.decode(ids) == library.decode(list(ids), skip_special_tokens=True)


def test_the_bytes_of_the_tokens_make_up_the_text(folder):
    tokeniser = Tokeniser.load(folder)
    ids = tokeniser.encode("Grüße 🙂 hello", add_special=False)
    assert b"".join(map(tokeniser.token_bytes, ids)).decode().removeprefix(" ") == "Grüße 🙂 hello"


def test_special_and_unknown_tokens(folder):
    tokeniser = Tokeniser.load(folder)
    (eos,) = tokeniser.eos_ids
    assert tokeniser.token_text(eos) == "</s>"
    assert tokeniser.visible_bytes(eos) == b""
    assert tokeniser.token_bytes(tokeniser.vocab_size) == b""
    assert tokeniser.token_bytes(-1) == b""


def test_decoder_order_of_converted_gguf_files():
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    )
    tokeniser = Tokeniser(tokenizer)
    assert tokeniser.decode(tokeniser.encode("hello 你好")) == "hello 你好"


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_metaspace_decoder(scheme):
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokeniser = Tokeniser(tokenizer)
    assert tokeniser.decode(tokeniser.encode("hello cat")) == "hello cat"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(content=" ", left=0, right=1)]),
        decoders.Sequence([decoders.Strip(content=" ", left=1)]),
    ],
)
def test_a_decoder_that_does_not_work_on_single_tokens_is_refused(decoder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoder
    with pytest.raises(UnsupportedCheckpoint, match="decoder"):
        Tokeniser(tokenizer)


def test_eos_ids_come_from_generation_config_then_config_then_tokenizer(tmp_path):
    folder = write_folder(tmp_path, byte_level())
    assert Tokeniser.load(folder).eos_ids == (1,)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert Tokeniser.load(folder).eos_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    assert Tokeniser.load(folder).eos_ids == (3, 1)


def test_the_config_says_whether_bos_is_added(tmp_path):
    without = Tokeniser.load(write_folder(tmp_path, byte_level(), add_bos_token=False))
    assert 0 not in without.encode("hello")
    both = Tokeniser.load(write_folder(tmp_path, byte_level(), add_bos_token=True, add_eos_token=True))
    ids = both.encode("hello")
    assert (ids[0], ids[-1]) == (0, 1)


def test_special_tokens_map_is_read_for_older_folders(tmp_path):
    folder = write_folder(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert Tokeniser.load(folder).eos_ids == (3,)


def test_truncation_and_padding_of_the_file_are_off():
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    ids = Tokeniser(tokenizer).encode("hello world, the cat")
    assert list(ids) == byte_level().encode("hello world, the cat").ids


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json"),
        ("generation_config.json", '{"eos_token_id": "2"}', "generation_config.json: eos_token_id"),
        ("config.json", "{", "config.json"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, field):
    folder = write_folder(tmp_path, byte_level())
    (folder / name).write_text(content)
    with pytest.raises(UnsupportedCheckpoint) as caught:
        Tokeniser.load(folder)
    assert caught.value.field == field


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match="missing"):
        Tokeniser.load(tmp_path)


def test_threads_may_share_it(folder):
    tokeniser = Tokeniser.load(folder)
    texts = [f"hello {i} cat" for i in range(200)]

    def round_trip(text):
        ids = tokeniser.encode(text)
        return tokeniser.decode(ids), len(ids)

    alone = [round_trip(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(round_trip, texts)) == alone
    assert [text for text, _ in alone] == texts
