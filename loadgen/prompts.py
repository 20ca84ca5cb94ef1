"""Prompts of exact token counts, made from a seed alone: the same on every machine and in every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256, shake_256
from pathlib import Path
from struct import unpack
from typing import Protocol

from tokenizers import Tokenizer

from loadgen.schedule import ScheduledRow
from shared.errors import StartupError

MAX_TEXT_ADJUSTMENTS = 8


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids that prompts may hold.

    Attributes:
        fingerprint: names the set; part of the schedule's hash.
        ids: the ids, ascending; special and added tokens are not among them.
    """

    fingerprint: str
    ids: Sequence[int]


def vocabulary_of_size(vocab_size: int) -> Vocabulary:
    """All ids below `vocab_size`, special ones included: a size says nothing of them."""
    return Vocabulary(f"size {vocab_size}", range(vocab_size))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a model folder. Raises StartupError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StartupError(f"--tokenizer {folder}: no tokenizer.json in this folder")
    return Tokenizer.from_file(str(path))


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """All ids of the tokeniser but its added (special) ones."""
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()) - set(tokenizer.get_added_tokens_decoder()))
    return Vocabulary(f"tokenizer {sha256(tokenizer.to_str().encode()).hexdigest()[:16]}", ids)


def draw_ids(key: str, count: int, ids: Sequence[int]) -> list[int]:
    """`count` of `ids`, uniformly; a pure function of `key` whose shorter results are prefixes of its longer ones."""
    words = unpack(f"<{count}I", shake_256(key.encode()).digest(4 * count))
    num_ids = len(ids)
    return [ids[word % num_ids] for word in words]


def prompt_ids(row: ScheduledRow, seed: int, ids: Sequence[int]) -> list[int]:
    """The `row.input_tokens` token ids of a row's prompt."""
    if not row.blocks:
        return draw_ids(f"{seed}/row/{row.trace_index}", row.input_tokens, ids)
    prompt: list[int] = []
    for block in row.blocks:
        prompt += draw_ids(f"{seed}/block/{block.hash_id}", block.num_tokens, ids)
    return prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks the model to go on with.

    Attributes:
        content: token ids, or text.
        num_tokens: its length by the local tokeniser.
    """

    content: list[int] | str
    num_tokens: int


class PromptMaker(Protocol):
    """Makes the prompt of a row, each time the same."""

    @property
    def fingerprint(self) -> str:
        """Names all that prompts depend on beside the row and the seed."""
        ...

    def make(self, row: ScheduledRow) -> Prompt:
        """The prompt of `row`."""
        ...


@dataclass(frozen=True, slots=True)
class IdPrompts:
    """Prompts as lists of token ids: exact by construction."""

    seed: int
    vocabulary: Vocabulary

    @property
    def fingerprint(self) -> str:
        return f"ids of {self.vocabulary.fingerprint}"

    def make(self, row: ScheduledRow) -> Prompt:
        return Prompt(prompt_ids(row, self.seed, self.vocabulary.ids), row.input_tokens)


class TextPrompts:
    """Prompts as text of words that are one token each, counted with the local tokeniser.

    The count includes what the tokeniser puts around a text (a BOS, say), as a completions endpoint counts it. Words
    are added or taken away at the end until the count is right; a tokeniser that merges words may leave a prompt that
    is not exact, which shows in `Prompt.num_tokens`.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer) -> None:
        self._seed = seed
        self._tokenizer = tokenizer
        vocabulary = vocabulary_of(tokenizer)
        self._words = single_token_words(tokenizer, vocabulary.ids)
        self._word_ids = sorted(self._words)
        self.fingerprint = f"text of {vocabulary.fingerprint}"
        if not self._words:
            raise StartupError("--prompt-as text: no word of this tokeniser is one token; send ids instead")
        # Many tokenisers know a word only with the blank before it: then the first one needs its blank too.
        with_blank = tokenizer.encode(f" {self._words[self._word_ids[0]]}", add_special_tokens=False).ids
        self._lead = " " if with_blank == [self._word_ids[0]] else ""

    def make(self, row: ScheduledRow) -> Prompt:
        words = [self._words[token] for token in prompt_ids(row, self._seed, self._word_ids)]
        count = self._count(words)
        for attempt in range(MAX_TEXT_ADJUSTMENTS):
            missing = row.input_tokens - count
            if missing == 0:
                break
            if missing < 0:
                # One word stays: a server refuses an empty prompt, and BOS alone may fill the count.
                words = words[: max(1, len(words) + missing)]
            else:
                key = f"{self._seed}/filler/{row.trace_index}/{attempt}"
                words += [self._words[token] for token in draw_ids(key, missing, self._word_ids)]
            count = self._count(words)
        return Prompt(self._text(words), count)

    def _count(self, words: Sequence[str]) -> int:
        return len(self._tokenizer.encode(self._text(words)).ids)

    def _text(self, words: Sequence[str]) -> str:
        return self._lead + " ".join(words)


def single_token_words(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """Words of letters that stay one token, this token, behind another word."""
    lead = "a"
    lead_length = len(tokenizer.encode(lead, add_special_tokens=False).ids)
    texts = {token: tokenizer.decode([token]).strip() for token in ids}
    words = {token: text for token, text in texts.items() if text.isascii() and text.isalpha()}
    encodings = tokenizer.encode_batch([f"{lead} {word}" for word in words.values()], add_special_tokens=False)
    return {
        token: word
        for (token, word), encoding in zip(words.items(), encodings, strict=True)
        if encoding.ids[lead_length:] == [token]
    }
