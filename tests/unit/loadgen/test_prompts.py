import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loadgen.prompts import (
    IdPrompts,
    TextPrompts,
    draw_ids,
    load_tokenizer,
    prompt_ids,
    vocabulary_of,
    vocabulary_of_size,
)
from shared.errors import StartupError
from tests.unit.loadgen.builders import scheduled

CORPUS = ["the quick brown fox jumps over the lazy dog again and again while a small bird sings"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE like those of real models, with a BOS that it puts before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def test_drawing_is_a_function_of_the_key_and_longer_draws_begin_with_shorter_ones():
    ids = range(1000, 2000)
    assert draw_ids("a", 5, ids) == draw_ids("a", 50, ids)[:5]
    assert draw_ids("a", 5, ids) != draw_ids("b", 5, ids)
    assert set(draw_ids("a", 500, ids)) <= set(ids)
    assert draw_ids("0/block/7", 4, range(50_000)) == [32569, 34517, 983, 26838]


def test_equal_hash_ids_are_equal_tokens_and_a_partial_block_is_a_prefix():
    ids = range(5000)
    first = prompt_ids(scheduled(0, input_tokens=15, blocks=[(7, 10), (8, 5)]), 0, ids)
    second = prompt_ids(scheduled(1, input_tokens=30, blocks=[(7, 10), (8, 10), (9, 10)]), 0, ids)
    assert len(first) == 15
    assert second[:15] == first
    assert prompt_ids(scheduled(2, input_tokens=10, blocks=[(6, 10)]), 0, ids) != first[:10]
    assert prompt_ids(scheduled(0, input_tokens=10, blocks=[(7, 10)]), 1, ids) != first[:10]


def test_rows_without_hash_ids_share_nothing():
    first, second = (prompt_ids(scheduled(row, input_tokens=20), 0, range(5000)) for row in (0, 1))
    assert len(first) == len(second) == 20
    assert first[0] != second[0]


def test_special_tokens_are_never_drawn(tokenizer):
    prompts = IdPrompts(0, vocabulary_of(tokenizer))
    prompt = prompts.make(scheduled(0, input_tokens=2000))
    assert prompt.num_tokens == len(prompt.content) == 2000
    assert not {0, 1} & set(prompt.content)
    assert max(prompt.content) < tokenizer.get_vocab_size()


def test_a_vocabulary_size_stands_for_all_ids_below_it():
    assert list(vocabulary_of_size(3).ids) == [0, 1, 2]
    assert vocabulary_of_size(3).fingerprint != vocabulary_of_size(4).fingerprint


@pytest.mark.parametrize("num_tokens", [2, 3, 17, 400])
def test_text_prompts_have_the_exact_count_with_what_the_tokeniser_puts_around_them(tokenizer, num_tokens):
    prompt = TextPrompts(0, tokenizer).make(scheduled(0, input_tokens=num_tokens))
    assert prompt.num_tokens == num_tokens
    assert len(tokenizer.encode(prompt.content).ids) == num_tokens


def test_text_prompts_of_equal_blocks_begin_with_the_same_words(tokenizer):
    prompts = TextPrompts(0, tokenizer)
    first = prompts.make(scheduled(0, input_tokens=40, blocks=[(7, 30), (8, 10)])).content.split()
    second = prompts.make(scheduled(1, input_tokens=40, blocks=[(7, 30), (9, 10)])).content.split()
    assert first[:28] == second[:28]
    assert first != second


def test_a_text_prompt_that_cannot_be_exact_says_its_true_length(tokenizer):
    prompt = TextPrompts(0, tokenizer).make(scheduled(0, input_tokens=1))
    assert prompt.content
    assert prompt.num_tokens == len(tokenizer.encode(prompt.content).ids) > 1


def test_a_tokeniser_without_words_of_one_token_is_refused():
    bytes_only = Tokenizer(models.BPE(vocab={"\u0120": 0, "1": 1}, merges=[]))
    with pytest.raises(StartupError, match="no word"):
        TextPrompts(0, bytes_only)


def test_a_tokeniser_is_loaded_from_its_folder(tmp_path, tokenizer):
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_of(load_tokenizer(tmp_path)) == vocabulary_of(tokenizer)
