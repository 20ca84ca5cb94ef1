"""Text to token ids and back, from a Hugging Face model folder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self, cast

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from shared.blocks import TokenIds, token_ids
from shared.errors import InvalidRequest, UnsupportedCheckpoint
from shared.text.chat_template import ChatTemplate, read_template_source
from shared.text.token_bytes import read_token_bytes
from shared.wire.openai import ChatMessage


class Tokeniser:
    """One model's tokenizer. Nothing changes after construction: every method may run in any thread.

    Args:
        tokenizer: becomes this object's own.
        eos_ids: tokens that end an answer.
        bos_id: token that begins every text, if there is one.
        chat_template: None for a model without.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_ids: tuple[int, ...] = (),
        bos_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bytes = read_token_bytes(tokenizer)
        self._chat_template = chat_template
        self._added_bos = bos_id if bos_id in tokenizer.encode("").ids else None
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `tokenizer.json` and what lies beside it. Raises UnsupportedCheckpoint, naming file and field."""
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(folder)
        _set_bos_and_eos(tokenizer, config, special_tokens)
        source = read_template_source(folder, config)
        bos = special_tokens.get("bos_token")
        return cls(
            tokenizer,
            eos_ids=read_eos_ids(folder),
            bos_id=None if bos is None else tokenizer.token_to_id(bos),
            chat_template=None if source is None else ChatTemplate(source, special_tokens),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's own vocabulary may be padded beyond."""
        return len(self._bytes.raw)

    def encode(self, text: str, *, add_special: bool = True) -> TokenIds:
        """Ids of `text`; the name of a special token in it is that token.

        Args:
            add_special: put BOS (and what else the model wants) around it; never a second BOS.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        if add_special and self._added_bos is not None and ids[:2] == [self._added_bos] * 2:
            ids = ids[1:]
        return token_ids(ids)

    def encode_chat(self, messages: Sequence[ChatMessage], *, now: datetime) -> TokenIds:
        """Ids of the prompt that asks for the next assistant message. Raises InvalidRequest, naming `messages`.

        Templates write BOS themselves, so none is added.
        """
        if self._chat_template is None:
            raise InvalidRequest("the model has no chat template: send a prompt instead of messages", param="messages")
        return self.encode(self._chat_template.render(messages, now=now), add_special=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The whole text that `ids` stand for, without special tokens. `Detokeniser` does answers as they grow."""
        text = b"".join(map(self.visible_bytes, ids)).decode("utf-8", "replace")
        num_spaces = len(text) - len(text.lstrip(" "))
        return text[min(num_spaces, self._bytes.leading_spaces) :]

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, perhaps half a character; a special token's name; nothing for an unknown id."""
        return self._bytes.raw[token_id] if 0 <= token_id < len(self._bytes.raw) else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def visible_bytes(self, token_id: int) -> bytes:
        """`token_bytes`, but nothing for a special token: what the token adds to a text."""
        return b"" if token_id in self._bytes.special else self.token_bytes(token_id)


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer of the model in `folder`, for its engine as for its texts.

    From `generation_config.json`, else `config.json`, else the tokenizer; empty if none names one. Raises
    UnsupportedCheckpoint, naming file and field.
    """
    for name in ("generation_config.json", "config.json"):
        match _read_json(folder / name).get("eos_token_id"):
            case None:
                continue
            case int(token_id) if not isinstance(token_id, bool):
                return (token_id,)
            case [*ids] if all(type(token_id) is int for token_id in ids):
                return tuple(ids)
            case _:
                raise UnsupportedCheckpoint(f"{name}: eos_token_id", "must be a token id or a list of them")
    eos = _special_tokens(folder).get("eos_token")
    token_id = None if eos is None else _read_tokenizer(folder / "tokenizer.json").token_to_id(eos)
    return () if token_id is None else (token_id,)


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.exists():
        raise UnsupportedCheckpoint("tokenizer.json", f"missing in {file.parent}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise UnsupportedCheckpoint("tokenizer.json", str(error)) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise UnsupportedCheckpoint(file.name, f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(file.name, "must hold an object")
    return cast("dict[str, Any]", value)


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and the like, by name; a token is given as text or as an object with `content`."""
    tokens: dict[str, str] = {}
    stated = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    for name, value in stated.items():
        if not name.endswith("_token"):
            continue
        match value:
            case str(content) | {"content": str(content)}:
                tokens[name] = content
            case _:
                continue
    return tokens


def _set_bos_and_eos(tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Where the config says itself whether to add BOS and EOS, its word replaces that of `tokenizer.json`."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = _added_token(tokenizer, config, special_tokens, "bos_token")
    eos = _added_token(tokenizer, config, special_tokens, "eos_token")
    template = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[*bos, *eos])


def _added_token(
    tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str], name: str
) -> list[tuple[str, int]]:
    """Text and id of the token, if the config wants it added."""
    if not config.get(f"add_{name}") or name not in special_tokens:
        return []
    token = special_tokens[name]
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise UnsupportedCheckpoint(f"tokenizer_config.json: {name}", f"{token!r} is not in the vocabulary")
    return [(token, token_id)]
