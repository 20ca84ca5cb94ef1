import json

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from shared.errors import ContextTooLong, Overloaded
from shared.request import FinishReason
from shared.wire import openai_answers as answers
from shared.wire.openai_answers import AnswerChoice, AnswerHead, Candidate, TokenLine, Usage
from shared.wire.wire_format import WireFormat

HEAD = AnswerHead("request-1", 1_700_000_000, "smol")
STREAMING = AnswerHead("request-1", 1_700_000_000, "smol", null_usage=True)
USAGE = Usage(prompt_tokens=100, completion_tokens=3, cached_tokens=64)
TOKENS = (
    TokenLine(
        Candidate("Hé", "Hé".encode(), -0.5),
        (Candidate("Hé", "Hé".encode(), -0.5), Candidate("\ufffd", b"\xf0\x9f", float("-inf"))),
    ),
    TokenLine(Candidate("\ufffd", b"\xf0\x9f", -1.0)),
    TokenLine(Candidate("\ufffd", b"\x99\x82", -0.25)),
    TokenLine(Candidate("!", b"!", -2.0)),
)
CHOICES = (
    AnswerChoice(0, "Hé🙂!", FinishReason.STOP, TOKENS),
    AnswerChoice(1, "", FinishReason.LENGTH),
)


def checked(model, body):
    """`body` as the official client reads it, after a trip through strict JSON; nothing is lost or added."""
    wired = json.loads(json.dumps(body, allow_nan=False))
    parsed = model.model_validate(wired, strict=True)
    assert parsed.model_dump(exclude_unset=True) == wired
    return parsed


def test_chat_completion():
    parsed = checked(ChatCompletion, answers.chat_completion(HEAD, CHOICES, USAGE))
    assert (parsed.id, parsed.created, parsed.model, parsed.object) == (
        "request-1",
        1_700_000_000,
        "smol",
        "chat.completion",
    )
    assert [choice.message.content for choice in parsed.choices] == ["Hé🙂!", ""]
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]
    assert parsed.usage.total_tokens == 103
    assert parsed.usage.prompt_tokens_details.cached_tokens == 64
    first, second, *_ = parsed.choices[0].logprobs.content
    assert (first.token, first.logprob, bytes(first.bytes)) == ("Hé", -0.5, "Hé".encode())
    assert [rival.logprob for rival in first.top_logprobs] == [-0.5, -9999.0]
    assert second.bytes == [0xF0, 0x9F]
    assert parsed.choices[1].logprobs is None


def test_chat_chunks():
    chunks = [
        answers.chat_role_chunk(STREAMING, 1),
        answers.chat_delta_chunk(STREAMING, 1, "Hé", TOKENS[:1]),
        answers.chat_delta_chunk(STREAMING, 1, "🙂!"),
        answers.chat_finish_chunk(STREAMING, 1, FinishReason.LENGTH),
    ]
    parsed = [checked(ChatCompletionChunk, chunk) for chunk in chunks]
    assert [chunk.choices[0].delta.content for chunk in parsed] == ["", "Hé", "🙂!", None]
    assert [chunk.choices[0].delta.role for chunk in parsed] == ["assistant", None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in parsed] == [None, None, None, "length"]
    assert parsed[1].choices[0].logprobs.content[0].token == "Hé"
    assert all(chunk.choices[0].index == 1 for chunk in parsed)
    assert all(chunk["usage"] is None for chunk in chunks)

    last = checked(ChatCompletionChunk, answers.chat_usage_chunk(STREAMING, USAGE))
    assert last.choices == []
    assert last.usage.completion_tokens == 3


def test_chunks_say_nothing_of_usage_unless_asked():
    assert "usage" not in answers.chat_role_chunk(HEAD, 0)
    assert "usage" not in answers.completion_delta_chunk(HEAD, 0, "x")


def test_completion():
    parsed = checked(Completion, answers.completion(HEAD, CHOICES, USAGE))
    assert [choice.text for choice in parsed.choices] == ["Hé🙂!", ""]
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]
    logprobs = parsed.choices[0].logprobs
    assert logprobs.tokens == ["Hé", "\ufffd", "\ufffd", "!"]
    assert logprobs.token_logprobs == [-0.5, -1.0, -0.25, -2.0]
    assert logprobs.top_logprobs[0] == {"Hé": -0.5, "\ufffd": -9999.0}
    assert logprobs.text_offset == [0, 2, 3, 3]
    assert parsed.usage.total_tokens == 103


def test_completion_chunks():
    delta = answers.completion_delta_chunk(STREAMING, 2, "!", TOKENS[3:], text_offset=3)
    finish = answers.completion_finish_chunk(STREAMING, 2, FinishReason.STOP)
    usage = answers.completion_usage_chunk(STREAMING, USAGE)
    assert delta["choices"][0]["logprobs"]["text_offset"] == [3]
    assert delta["choices"][0]["finish_reason"] is None
    assert checked(Completion, finish).choices[0].finish_reason == "stop"
    assert checked(Completion, usage).usage.prompt_tokens == 100
    assert delta["usage"] is None


@pytest.mark.parametrize("cut", range(5))
def test_text_offsets_go_on_across_chunks(cut):
    whole = answers.completion_logprobs(TOKENS)["text_offset"]
    offset = sum(answers.num_chars(token.chosen.raw) for token in TOKENS[:cut])
    first = answers.completion_logprobs(TOKENS[:cut])["text_offset"]
    assert first + answers.completion_logprobs(TOKENS[cut:], text_offset=offset)["text_offset"] == whole


def test_model_list():
    body = answers.model_list(["a", "b"], created=5)
    assert body["object"] == "list"
    assert [checked(Model, card).id for card in body["data"]] == ["a", "b"]


def test_error_body():
    assert answers.error_body(ContextTooLong("too long, at most 8192", param="messages")) == {
        "error": {
            "message": "too long, at most 8192",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    }
    assert answers.error_body(Overloaded("later"))["error"]["type"] == "server_error"


def test_every_end_is_a_finish_reason_or_an_error():
    assert answers.FINISH_REASONS.keys() | answers.ENDS_AS_ERROR == set(FinishReason)
    assert FinishReason.CANCELLED in answers.ENDS_AS_ERROR


def test_usage_names_the_wire_format_of_kv_that_is_not_exact():
    exact = answers.usage_body(Usage(10, 3, 4))
    assert exact["prompt_tokens_details"] == {"cached_tokens": 4}
    lossy = answers.usage_body(Usage(10, 3, 4, WireFormat.INT8))
    assert lossy["prompt_tokens_details"] == {"cached_tokens": 4, "kv_wire_format": "int8"}
