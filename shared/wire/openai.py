"""Bodies of `/v1/chat/completions` and `/v1/completions`, which are also the jobs on the topic `ingest`.

    raw bytes ── parse_body ──> ParsedBody ── .spec ──> GenerationSpec ── .sampling() ──> SamplingParams

Known parameters are checked strictly, known but unsupported ones are refused, unknown ones are ignored and listed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json

from shared.blocks import TokenIds, token_ids
from shared.errors import BodyTooLarge, InvalidRequest
from shared.request import MAX_CHOICES, MAX_INT32, SamplingParams

MAX_BODY_BYTES = 1_000_000
"""Size of a body; leaves room for headers under Kafka's usual 1 MiB a record."""

MAX_DEPTH = 32
"""Objects and lists that a body may have inside each other, itself among them."""

MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 1024
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 128
MAX_STOP_TOKEN_IDS = 64
MAX_CHAT_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5

MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: a far smaller one would take them beyond float32."""

COMPLETION_MAX_TOKENS = 16
"""What `/v1/completions` takes for a missing `max_tokens`, as OpenAI does, or what is left of the context if that is
less; a chat may fill the context."""

MAX_UNKNOWN_FIELDS = 32
"""Unknown fields listed of one body."""

MAX_FIELD_CHARS = 64
"""Characters kept of an unknown field's name."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; text parts are joined by newlines, role `developer` has become `system`."""

    role: str
    content: str


Prompt = tuple[ChatMessage, ...] | str | TokenIds
"""What to continue: a chat, a text, or token ids taken as they are."""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What a request wishes, whichever endpoint or topic it came by.

    Attributes:
        chat: whether the answer has the chat shape.
        max_tokens: None: COMPLETION_MAX_TOKENS, in a chat as many as the context holds.
        top_k: 0 keeps all tokens.
        stop: stop strings; the answer ends before the first.
        n: choices wanted.
        seed: None: the caller of `sampling` picks one.
        logprobs: alternatives to report per token beside the chosen one; None reports nothing.
    """

    chat: bool
    model: str
    prompt: Prompt
    max_tokens: int | None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None

    def sampling(self, *, room: int, default_seed: int) -> SamplingParams:
        """Complete parameters for the engine; a seed becomes one of [0, 2**63), negative ones modulo 2**63.

        Args:
            room: tokens that the context leaves for the answer.
        """
        default_max_tokens = room if self.chat else min(room, COMPLETION_MAX_TOKENS)
        return SamplingParams(
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            seed=(default_seed if self.seed is None else self.seed) % 2**63,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """A body that is right.

    Attributes:
        unknown_fields: paths of fields that mean nothing here, to be counted; array indices are left out.
    """

    spec: GenerationSpec
    unknown_fields: tuple[str, ...]


def parse_body(raw: bytes, *, chat: bool | None) -> ParsedBody:
    """Check a body and say what it wishes.

    Args:
        chat: the endpoint's kind; None (a job from Kafka) tells it by `messages` or `prompt`.

    Raises:
        BodyTooLarge: over MAX_BODY_BYTES.
        InvalidRequest: names the first wrong field and its limit.
    """
    if len(raw) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has {len(raw)} bytes, the limit is {MAX_BODY_BYTES}")
    fields = _read_object(raw)
    is_chat = _is_chat(fields) if chat is None else chat
    _refuse_unsupported(fields, _UNSUPPORTED)
    body = _validate(ChatCompletionRequest if is_chat else CompletionRequest, fields)
    return ParsedBody(body.to_spec(), tuple(_unknown_fields(body))[:MAX_UNKNOWN_FIELDS])


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(_Part):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32)]

# Read by hand, for errors that say more than a union's; the schemas tell of the same limits.
_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _TEXT_PART_SCHEMA, "minItems": 1, "maxItems": MAX_CONTENT_PARTS},
    ]
}
_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT32},
    "minItems": 1,
}
_PROMPT_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_PROMPT_SCHEMA = {
    "description": "A text, token ids, or a list of one of these.",
    "anyOf": [
        _PROMPT_TEXT_SCHEMA,
        _IDS_SCHEMA,
        {"type": "array", "items": {"anyOf": [_PROMPT_TEXT_SCHEMA, _IDS_SCHEMA]}, "minItems": 1, "maxItems": 1},
    ],
}
_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {
    "anyOf": [
        _STOP_STRING_SCHEMA,
        {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS},
        {"type": "null"},
    ]
}


class Message(_Part):
    """One of `messages`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)]
    name: str | None = None


_Penalty = Annotated[float, Field(ge=-2, le=2)]
_MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]


class _Body(_Part):
    """What both endpoints share. None stands for the default everywhere, as clients send it so."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: _MaxTokens | None = None
    max_completion_tokens: _MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[Any, WithJsonSchema(_STOP_SCHEMA)] = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    def to_spec(self) -> GenerationSpec:
        """Raises InvalidRequest where fields do not go together."""
        raise NotImplementedError

    def _spec(self, *, chat: bool, prompt: Prompt, logprobs: int | None) -> GenerationSpec:
        max_tokens = self._max_tokens()
        min_tokens = self.min_tokens or 0
        most = COMPLETION_MAX_TOKENS if max_tokens is None and not chat else max_tokens
        if most is not None and min_tokens > most:
            raise InvalidRequest(f"min_tokens must be at most max_tokens, {most}", param="min_tokens")
        n = 1 if self.n is None else self.n
        if self.best_of is not None and self.best_of != n:
            raise InvalidRequest(f"best_of is not supported: leave it out or set it to n, {n}", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is allowed only with stream true", param="stream_options")
        return GenerationSpec(
            chat=chat,
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=_stop_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            seed=self.seed,
            n=n,
            stream=bool(self.stream),
            include_usage=self.stream_options is not None and bool(self.stream_options.include_usage),
            logprobs=logprobs,
        )

    def _max_tokens(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in {None, self.max_completion_tokens}:
            raise InvalidRequest(
                f"max_tokens and max_completion_tokens differ: {self.max_tokens} and {self.max_completion_tokens}",
                param="max_tokens",
            )
        return self.max_completion_tokens


class ChatCompletionRequest(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS)] | None = None

    def to_spec(self) -> GenerationSpec:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is allowed only with logprobs true", param="top_logprobs")
        return self._spec(
            chat=True,
            prompt=tuple(_message(message, index) for index, message in enumerate(self.messages)),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Body):
    """Body of `/v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None

    def to_spec(self) -> GenerationSpec:
        return self._spec(
            chat=False,
            prompt=_prompt(self.prompt),
            logprobs=self.logprobs,
        )


_AnyRequest = ChatCompletionRequest | CompletionRequest

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that would change the answer and are not served: the values (beside null) that ask for nothing."""

_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"audio": (), "function_call": (), "tool_calls": ([],)}


def body_schemas(refs: str) -> dict[str, dict[str, Any]]:
    """JSON schemas of both bodies and of their parts, by name: what `parse_body` checks, but for rules that tie fields
    together.

    Args:
        refs: where the schemas will stand, as `#/components/schemas/{model}`.
    """
    models = (ChatCompletionRequest, CompletionRequest)
    _, document = models_json_schema([(model, "validation") for model in models], ref_template=refs)
    schemas: dict[str, dict[str, Any]] = document["$defs"]
    for model in models:
        schemas[model.__name__]["properties"] |= _unsupported_schemas(_UNSUPPORTED)
    schemas[Message.__name__]["properties"] |= _unsupported_schemas(_UNSUPPORTED_IN_MESSAGE)
    return schemas


def _unsupported_schemas(unsupported: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {
        name: {"description": "Not served: only what asks for nothing is allowed.", "enum": [None, *allowed]}
        for name, allowed in unsupported.items()
    }


def _read_object(raw: bytes) -> dict[str, Any]:
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):  # the parser's own, far over ours
            raise _too_deep() from error
        raise InvalidRequest(f"the body is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    fields = cast("dict[str, Any]", value)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:  # else no look at half a million token ids is needed
        for name, field in fields.items():
            if _is_too_deep(field):
                raise _too_deep(name[:MAX_FIELD_CHARS])
    return fields


def _too_deep(field: str | None = None) -> InvalidRequest:
    return InvalidRequest(
        f"{field or 'the body'} is nested too deeply: JSON may have {MAX_DEPTH} objects and lists in each other",
        param=field,
    )


def _is_too_deep(field: object) -> bool:
    """Whether a field of the body takes it beyond MAX_DEPTH."""
    level: list[object] = [field] if isinstance(field, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [child for parent in level for child in _members(parent) if isinstance(child, dict | list)]
    return True


def _members(parent: object) -> Iterable[object]:
    if isinstance(parent, dict):
        return cast("dict[str, object]", parent).values()
    return cast("list[object]", parent)


def _is_chat(fields: Mapping[str, Any]) -> bool:
    has_messages, has_prompt = (fields.get(name) is not None for name in ("messages", "prompt"))
    if has_messages and has_prompt:
        raise InvalidRequest("messages and prompt exclude each other", param="messages")
    if not has_messages and not has_prompt:
        raise InvalidRequest("messages or prompt is required", param="messages")
    return has_messages


def _refuse_unsupported(fields: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], path: str = "") -> None:
    for name, value in fields.items():
        if value is None or name not in unsupported:
            continue
        if not any(type(value) is type(default) and value == default for default in unsupported[name]):
            raise InvalidRequest(f"{path}{name} is not supported", param=f"{path}{name}")


def _validate(model: type[_AnyRequest], fields: dict[str, Any]) -> _AnyRequest:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError, root: tuple[str, ...] = ()) -> InvalidRequest:
    """The first thing that pydantic found, without the value it found."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path((*root, *first["loc"]))
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    if first["type"] == "model_type":
        return InvalidRequest(f"{param} must be an object", param=param)
    return InvalidRequest(f"{param} {re.sub(r'^[A-Z][a-z]+ should', 'must', first['msg'])}", param=param)


def _path(loc: Iterable[str | int]) -> str:
    """`messages[0].content`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).removeprefix(".")


def _message(message: Message, index: int) -> ChatMessage:
    path = f"messages[{index}]"
    _refuse_unsupported(message.model_extra or {}, _UNSUPPORTED_IN_MESSAGE, f"{path}.")
    role = "system" if message.role == "developer" else message.role
    return ChatMessage(role, _content(message.content, f"{path}.content"))


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be a text or a list of text parts", param=path)
    parts = cast("list[Any]", content)
    if not 1 <= len(parts) <= MAX_CONTENT_PARTS:
        raise InvalidRequest(f"{path} must have 1 to {MAX_CONTENT_PARTS} parts, not {len(parts)}", param=path)
    return "\n".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(parts))


def _part_text(part: Any, path: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "text"}:
            raise InvalidRequest(f"{path}.text must be a text", param=f"{path}.text")
        case dict():
            raise InvalidRequest(f"{path}.type must be 'text': other parts are not supported", param=f"{path}.type")
        case _:
            raise InvalidRequest(f"{path} must be an object", param=path)


_IDS = TypeAdapter(list[_TokenId])


def _prompt(prompt: Any) -> str | TokenIds:
    """A text, a list of ids, or a list of one of these."""
    match prompt:
        case [str() | list()]:
            return _prompt_text_or_ids(prompt[0])
        case [str() | list(), *_]:
            raise InvalidRequest(
                f"prompt must be one prompt, not {len(cast('list[Any]', prompt))}: send one request for each",
                param="prompt",
            )
        case _:
            return _prompt_text_or_ids(prompt)


def _prompt_text_or_ids(prompt: Any) -> str | TokenIds:
    if not isinstance(prompt, str | list):
        raise InvalidRequest("prompt must be a text or a list of token ids", param="prompt")
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(prompt, str):
        return prompt
    try:
        return token_ids(_IDS.validate_python(prompt))
    except ValidationError as error:
        raise _first_error(error, root=("prompt",)) from error


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (_stop_string(stop, "stop"),)
    if not isinstance(stop, list):
        raise InvalidRequest("stop must be a text or a list of texts", param="stop")
    stops = cast("list[Any]", stop)
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop must have at most {MAX_STOP_STRINGS} texts, not {len(stops)}", param="stop")
    return tuple(_stop_string(text, f"stop[{index}]") for index, text in enumerate(stops))


def _stop_string(text: Any, path: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"{path} must be a text", param=path)
    if not 1 <= len(text) <= MAX_STOP_CHARS:
        raise InvalidRequest(f"{path} must have 1 to {MAX_STOP_CHARS} characters, not {len(text)}", param=path)
    return text


def _unknown_fields(body: _AnyRequest) -> list[str]:
    names = [name for name in body.model_extra or {} if name not in _UNSUPPORTED]
    if body.stream_options is not None:
        names += [f"stream_options.{name}" for name in body.stream_options.model_extra or {}]
    if isinstance(body, ChatCompletionRequest):
        extras = {name for message in body.messages for name in message.model_extra or {}}
        names += [f"messages.{name}" for name in extras - _UNSUPPORTED_IN_MESSAGE.keys()]
    return sorted(name[:MAX_FIELD_CHARS] for name in names)
