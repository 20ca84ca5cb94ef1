"""Answers in the OpenAI shapes, as plain dicts ready for JSON. Pure functions; ids and times are arguments."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shared.errors import RequestError
from shared.request import FinishReason
from shared.wire.wire_format import WireFormat

Json = dict[str, Any]

FINISH_REASONS: Final[Mapping[FinishReason, str]] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""Ends that OpenAI has a word for."""

ENDS_AS_ERROR: Final = frozenset(FinishReason) - FINISH_REASONS.keys()
"""Ends that clients see as an error object."""

LOWEST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all objects of one answer begin with.

    Attributes:
        created: unix seconds of the request's acceptance.
        null_usage: chunks carry `usage: null`, as the client asked for a usage chunk at the end.
    """

    id: str
    created: int
    model: str
    null_usage: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that was, or could have been, picked.

    Attributes:
        text: the token as text, U+FFFD where it is no whole character.
        raw: its bytes.
        logprob: natural.
    """

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLine:
    """One token of the answer and its likeliest rivals, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerChoice:
    """One whole choice.

    Attributes:
        finish: STOP or LENGTH.
        tokens: with logprobs; None where the client asked for none.
        stop_reason: the stop string or the id in `stop_token_ids` that ended it; no OpenAI field, but widely read.
    """

    index: int
    text: str
    finish: FinishReason
    tokens: Sequence[TokenLine] | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the whole request, all choices together.

    Attributes:
        cached_tokens: prompt tokens whose KV was found rather than computed.
        wire_format: the most lossy form in which the prompt's KV came to where the answer was made.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    wire_format: WireFormat = WireFormat.NATIVE


def error_body(error: RequestError) -> Json:
    """The body of an error answer; its status is `error.http_status`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def usage_body(usage: Usage) -> Json:
    """The `usage` object. `kv_wire_format` is ours: there only if the answer was made from KV that is not exact."""
    prompt_details: Json = {"cached_tokens": usage.cached_tokens}
    if usage.wire_format is not WireFormat.NATIVE:
        prompt_details["kv_wire_format"] = usage.wire_format
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": prompt_details,
    }


def model_list(names: Iterable[str], *, created: int) -> Json:
    """The answer of `/v1/models`."""
    return {"object": "list", "data": [model_card(name, created=created) for name in names]}


def model_card(name: str, *, created: int) -> Json:
    """The answer of `/v1/models/{name}`; `root` is what load generators look up the tokenizer by."""
    return {"id": name, "object": "model", "created": created, "owned_by": "baton", "root": name}


def chat_completion(head: AnswerHead, choices: Sequence[AnswerChoice], usage: Usage) -> Json:
    """A whole chat answer."""
    return _answer(
        head,
        "chat.completion",
        [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None if choice.tokens is None else chat_logprobs(choice.tokens),
                **_finish(choice.finish, choice.stop_reason),
            }
            for choice in choices
        ],
        usage,
    )


def chat_role_chunk(head: AnswerHead, index: int) -> Json:
    """The first chunk of a choice."""
    return _chat_chunk(head, index, {"role": "assistant", "content": ""})


def chat_delta_chunk(head: AnswerHead, index: int, text: str, tokens: Sequence[TokenLine] | None = None) -> Json:
    """More text of a choice, and the tokens it came with if logprobs are wanted."""
    return _chat_chunk(head, index, {"content": text}, tokens=tokens)


def chat_finish_chunk(head: AnswerHead, index: int, finish: FinishReason, stop_reason: str | int | None = None) -> Json:
    """The last chunk of a choice."""
    return _chat_chunk(head, index, {}, finish=_finish(finish, stop_reason))


def chat_usage_chunk(head: AnswerHead, usage: Usage) -> Json:
    """The last chunk of the answer, if `include_usage` was set."""
    return _answer(head, "chat.completion.chunk", [], usage)


def completion(head: AnswerHead, choices: Sequence[AnswerChoice], usage: Usage) -> Json:
    """A whole text completion."""
    return _answer(
        head,
        "text_completion",
        [
            _completion_choice(
                choice.index,
                choice.text,
                None if choice.tokens is None else completion_logprobs(choice.tokens),
                _finish(choice.finish, choice.stop_reason),
            )
            for choice in choices
        ],
        usage,
    )


def completion_delta_chunk(
    head: AnswerHead, index: int, text: str, tokens: Sequence[TokenLine] | None = None, *, text_offset: int = 0
) -> Json:
    """More text of a choice.

    Args:
        text_offset: characters begun by the choice's earlier tokens (`num_chars`), for the logprobs.
    """
    logprobs = None if tokens is None else completion_logprobs(tokens, text_offset=text_offset)
    return _chunk(head, "text_completion", _completion_choice(index, text, logprobs, _UNFINISHED))


def completion_finish_chunk(
    head: AnswerHead, index: int, finish: FinishReason, stop_reason: str | int | None = None
) -> Json:
    """The last chunk of a choice."""
    return _chunk(head, "text_completion", _completion_choice(index, "", None, _finish(finish, stop_reason)))


def completion_usage_chunk(head: AnswerHead, usage: Usage) -> Json:
    """The last chunk of the answer, if `include_usage` was set."""
    return _answer(head, "text_completion", [], usage)


def chat_logprobs(tokens: Sequence[TokenLine]) -> Json:
    """Log probabilities in the chat shape."""
    content = [
        {**_chat_candidate(token.chosen), "top_logprobs": [_chat_candidate(rival) for rival in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLine], *, text_offset: int = 0) -> Json:
    """Log probabilities in the completions shape; `text_offset` counts characters of the choice's text."""
    offsets: list[int] = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += num_chars(token.chosen.raw)
    return {
        "tokens": [token.chosen.text for token in tokens],
        "token_logprobs": [_finite(token.chosen.logprob) for token in tokens],
        "top_logprobs": [{rival.text: _finite(rival.logprob) for rival in token.top} for token in tokens],
        "text_offset": offsets,
    }


def num_chars(raw: bytes) -> int:
    """Characters that begin in a piece of UTF-8, which may itself begin or end inside one."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)


def _chat_candidate(candidate: Candidate) -> Json:
    return {"token": candidate.text, "logprob": _finite(candidate.logprob), "bytes": list(candidate.raw)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


_UNFINISHED: Json = {"finish_reason": None}


def _finish(finish: FinishReason, stop_reason: str | int | None) -> Json:
    return {"finish_reason": FINISH_REASONS[finish], "stop_reason": stop_reason}


def _completion_choice(index: int, text: str, logprobs: Json | None, finish: Json) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, **finish}


def _chat_chunk(
    head: AnswerHead,
    index: int,
    delta: Json,
    *,
    tokens: Sequence[TokenLine] | None = None,
    finish: Json = _UNFINISHED,
) -> Json:
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": None if tokens is None else chat_logprobs(tokens),
        **finish,
    }
    return _chunk(head, "chat.completion.chunk", choice)


def _chunk(head: AnswerHead, kind: str, choice: Json) -> Json:
    usage = {"usage": None} if head.null_usage else {}
    return {**_begin(head, kind), "choices": [choice], **usage}


def _answer(head: AnswerHead, kind: str, choices: list[Json], usage: Usage) -> Json:
    return {**_begin(head, kind), "choices": choices, "usage": usage_body(usage)}


def _begin(head: AnswerHead, kind: str) -> Json:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model}
