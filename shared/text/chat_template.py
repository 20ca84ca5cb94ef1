"""A model's chat template: messages to prompt text, as `transformers` renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest, UnsupportedCheckpoint
from shared.wire.openai import ChatMessage

MAX_PROMPT_CHARS = 8_000_000
"""Longest text a template may render: well over what any body under the size limit becomes."""


class ChatTemplate:
    """A compiled template; rendering is pure and thread-safe.

    Templates come with the model and are foreign code: they run in jinja's sandbox, on copies, and their output is
    cut off where it grows past `max_chars`.

    Args:
        source: jinja text.
        special_tokens: `bos_token` and the like, by the names under which templates use them.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, max_chars: int = MAX_PROMPT_CHARS) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
        environment.globals["raise_exception"] = _raise_exception  # pyright: ignore[reportUnknownMemberType]
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise UnsupportedCheckpoint("chat_template", f"line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars

    def render(self, messages: Sequence[ChatMessage], *, now: datetime) -> str:
        """The prompt that asks for the next assistant message.

        Args:
            now: what `strftime_now` tells.

        Raises:
            InvalidRequest: the template refuses the messages, fails on them or renders too much.
        """
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": now.strftime,
        }
        try:
            return self._render_bounded(variables)
        except TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {error.message}", param="messages"
            ) from error
        except InvalidRequest:
            raise
        except Exception as error:  # a foreign template can raise anything, and its words may quote the prompt
            reason = type(error).__name__
            raise InvalidRequest(f"the chat template fails on the messages: {reason}", param="messages") from error

    def _render_bounded(self, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(variables):
            num_chars += len(piece)
            if num_chars > self._max_chars:
                raise InvalidRequest(
                    f"the chat template renders the messages to more than {self._max_chars} characters",
                    param="messages",
                )
            pieces.append(piece)
        return "".join(pieces)


def read_template_source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of a model folder: `chat_template.jinja`, else the one in `tokenizer_config.json`, else None.

    Raises UnsupportedCheckpoint if there are several named templates and none is called `default`.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    match tokenizer_config.get("chat_template"):
        case None:
            return None
        case str(source):
            return source
        case [*entries]:
            for entry in entries:
                match entry:
                    case {"name": "default", "template": str(source)}:
                        return source
                    case _:
                        continue
            raise UnsupportedCheckpoint("tokenizer_config.json: chat_template", "no template is named default")
        case _:
            raise UnsupportedCheckpoint("tokenizer_config.json: chat_template", "neither a text nor a list")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; for serving only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
