import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_user_message_param import ChatCompletionUserMessageParam
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from shared.blocks import token_ids
from shared.errors import BodyTooLarge, InvalidRequest
from shared.request import SamplingParams
from shared.wire.openai import (
    MAX_BODY_BYTES,
    MAX_DEPTH,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationSpec,
    body_schemas,
    parse_body,
)

ChatParams = chat_params.CompletionCreateParamsBase
MessageParams = (ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}


def parse(body, *, chat=None):
    return parse_body(body if isinstance(body, bytes) else json.dumps(body).encode(), chat=chat)


def refusal(body, *, chat=None):
    with pytest.raises(InvalidRequest) as caught:
        parse(body, chat=chat)
    return caught.value


def test_a_bare_chat():
    parsed = parse(CHAT)
    assert parsed.spec == GenerationSpec(chat=True, model="m", prompt=(ChatMessage("user", "Hi"),), max_tokens=None)
    assert parsed.unknown_fields == ()


def test_a_bare_completion_makes_sixteen_tokens():
    spec = parse(COMPLETION).spec
    assert spec == GenerationSpec(chat=False, model="m", prompt="Hi", max_tokens=None)
    assert spec.sampling(room=17, default_seed=0).max_tokens == 16
    assert spec.sampling(room=15, default_seed=0).max_tokens == 15


def test_everything_that_can_be_wished():
    wishes = {
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "seed": -1,
        "n": 3,
        "best_of": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "someone",
    }
    spec = parse(CHAT | wishes | {"logprobs": True, "top_logprobs": 4}).spec
    assert spec == GenerationSpec(
        chat=True,
        model="m",
        prompt=(ChatMessage("user", "Hi"),),
        max_tokens=5,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        stop=("a", "b"),
        stop_token_ids=(7, 8),
        ignore_eos=True,
        seed=-1,
        n=3,
        stream=True,
        include_usage=True,
        logprobs=4,
    )
    assert spec.sampling(room=99, default_seed=98) == SamplingParams(
        max_tokens=5,
        seed=2**63 - 1,
        min_tokens=2,
        temperature=0,
        top_k=40,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        stop_token_ids=(7, 8),
        ignore_eos=True,
        logprobs=4,
    )
    assert parse(COMPLETION | wishes | {"logprobs": 5}).spec.logprobs == 5


def test_defaults_of_sampling_come_from_the_caller():
    sampling = parse(CHAT).spec.sampling(room=100, default_seed=7)
    assert sampling == SamplingParams(max_tokens=100, seed=7)


def test_null_is_the_default_everywhere():
    names = ["max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n"]
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty", "best_of", "stop", "stop_token_ids"]
    names += ["ignore_eos", "seed", "stream", "stream_options", "user", "logprobs", "tools", "response_format"]
    assert parse(CHAT | dict.fromkeys(names) | {"top_logprobs": None}) == parse(CHAT)
    assert parse(COMPLETION | dict.fromkeys(names)) == parse(COMPLETION)


def test_falsy_values_are_not_taken_for_missing():
    assert parse(CHAT | {"temperature": 0.0}).spec.temperature == 0
    assert parse(CHAT | {"seed": 0}).spec.sampling(room=1, default_seed=7).seed == 0
    assert parse(CHAT | {"top_k": -1}).spec.top_k == 0
    assert parse(CHAT | {"stop": []}).spec.stop == ()
    assert parse(CHAT | {"logprobs": True}).spec.logprobs == 0
    assert parse(CHAT | {"logprobs": False}).spec.logprobs is None
    assert parse(COMPLETION | {"logprobs": 0}).spec.logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", "Hi"),
        (["Hi"], "Hi"),
        ([1, 2, 3], token_ids([1, 2, 3])),
        ([5], token_ids([5])),
        ([[1, 2, 3]], token_ids([1, 2, 3])),
    ],
)
def test_prompts_come_as_text_or_ids(prompt, expected):
    assert parse(COMPLETION | {"prompt": prompt}).spec.prompt == expected


def test_text_parts_are_joined():
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": content, "name": "n"}, {"role": "assistant", "content": ""}]
    spec = parse(CHAT | {"messages": messages}).spec
    assert spec.prompt == (ChatMessage("system", "one\ntwo"), ChatMessage("assistant", ""))


def test_an_answer_of_the_openai_client_can_be_sent_back():
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "audio": None, "tool_calls": None}
    parsed = parse(CHAT | {"messages": [*CHAT["messages"], answer, *CHAT["messages"]]})
    assert len(parsed.spec.prompt) == 3
    assert parsed.unknown_fields == ("messages.refusal",)


WRONG_ANYWHERE = [
    ({"model": None}, "model", "valid string"),
    ({"model": ""}, "model", "at least 1 character"),
    ({"model": 3}, "model", "valid string"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": 10**30}, "max_tokens", "less than or equal to 2147483647"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "4 and 5"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "at most max_tokens, 4"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 9}, "n", "less than or equal to 8"),
    ({"best_of": 2}, "best_of", "set it to n, 1"),
    ({"seed": 2**63}, "seed", "less than or equal to 9223372036854775807"),
    ({"seed": 1.0}, "seed", "valid integer"),
    ({"stop": ""}, "stop", "1 to 128 characters, not 0"),
    ({"stop": "x" * 129}, "stop", "1 to 128 characters, not 129"),
    ({"stop": 3}, "stop", "a text or a list of texts"),
    ({"stop": ["a", 3]}, "stop[1]", "must be a text"),
    ({"stop": ["a", ""]}, "stop[1]", "1 to 128 characters"),
    ({"stop": list("abcde")}, "stop", "at most 4 texts, not 5"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "greater than or equal to 0"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]", "valid integer"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids", "at most 64"),
    ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
    ({"stream": "true"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream true"),
    ({"stream": True, "stream_options": 1}, "stream_options", "must be an object"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
    ({"user": 3}, "user", "valid string"),
]


@pytest.mark.parametrize("base", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize(("wrong", "param", "limit"), WRONG_ANYWHERE)
def test_a_wrong_field_is_named_with_its_limit(base, wrong, param, limit):
    error = refusal(base | wrong)
    assert error.param == param
    assert limit in error.message
    assert error.message.startswith((param, "stream_options", "max_tokens"))


@pytest.mark.parametrize(
    ("wrong", "param", "limit"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": {}}, "messages", "valid list"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a text or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "1 to 1024 parts, not 0"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]", "an object"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type", "'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
            "'text'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "a text"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs true"),
    ],
)
def test_a_wrong_chat_field_is_named_with_its_limit(wrong, param, limit):
    error = refusal(CHAT | wrong, chat=True)
    assert error.param == param
    assert limit in error.message


@pytest.mark.parametrize(
    ("wrong", "param", "limit"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [""]}, "prompt", "must not be empty"),
        ({"prompt": [[]]}, "prompt", "must not be empty"),
        ({"prompt": 3}, "prompt", "a text or a list of token ids"),
        ({"prompt": {"text": "Hi"}}, "prompt", "a text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt", "one prompt, not 2"),
        ({"prompt": [[1], [2], [3]]}, "prompt", "one prompt, not 3"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": [1, -1]}, "prompt[1]", "greater than or equal to 0"),
        ({"prompt": [2**31]}, "prompt[0]", "less than or equal to 2147483647"),
        ({"prompt": [True]}, "prompt[0]", "valid integer"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ],
)
def test_a_wrong_completion_field_is_named_with_its_limit(wrong, param, limit):
    error = refusal(COMPLETION | wrong, chat=False)
    assert error.param == param
    assert limit in error.message


@pytest.mark.parametrize(
    "unsupported",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"50256": -100}},
        {"functions": [{}]},
        {"audio": {}},
        {"modalities": ["text", "audio"]},
        {"suffix": "end"},
        {"echo": True},
        {"echo": 0},
        {"guided_json": {}},
        {"prediction": {}},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_a_known_but_unsupported_field_is_refused_by_name(unsupported):
    (name,) = unsupported
    for base in (CHAT, COMPLETION):
        error = refusal(base | unsupported)
        assert (error.param, error.message) == (name, f"{name} is not supported")


def test_of_several_unsupported_fields_the_first_is_named():
    assert refusal(CHAT | {"tools": [{}], "echo": True}).param == "tools"
    assert refusal(CHAT | {"echo": True, "tools": [{}]}).param == "echo"


def test_unsupported_fields_that_ask_for_nothing_are_taken():
    harmless = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "modalities": ["text"],
        "suffix": "",
        "echo": False,
        "best_of": 1,
    }
    assert parse(CHAT | harmless) == parse(CHAT)


def test_unknown_fields_are_ignored_and_listed():
    messages = [{"role": "user", "content": "Hi", "weight": 1}] * 2
    body = {"zeta": 1, "alpha": {}, "stream": True, "stream_options": {"hurry": 1}, "messages": messages}
    assert parse(CHAT | body).unknown_fields == ("alpha", "messages.weight", "stream_options.hurry", "zeta")


def test_the_list_of_unknown_fields_is_bounded():
    unknown = parse(CHAT | {f"{i:03}" + "x" * 1000: 1 for i in range(100)}).unknown_fields
    assert len(unknown) == 32
    assert max(map(len, unknown)) == 64


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe", b'{"model": NaN}', b'{"model": "\\ud800"}', b"{'model': 1}"],
)
@pytest.mark.parametrize("chat", [True, False, None])
def test_what_is_no_json_object_is_refused(raw, chat):
    error = refusal(raw, chat=chat)
    assert error.param is None
    assert "JSON" in error.message


def test_deep_nesting_is_refused():
    raw = b'{"model": "m", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert f"{MAX_DEPTH} objects and lists" in refusal(raw, chat=False).message


def nested(depth):
    """A list of so many lists in each other."""
    return [nested(depth - 1)] if depth > 1 else []


def test_depth_is_counted_to_the_limit():
    assert parse(COMPLETION | {"x_extra": nested(MAX_DEPTH - 1)}).unknown_fields == ("x_extra",)
    too_deep = refusal(COMPLETION | {"x_extra": nested(MAX_DEPTH)})
    assert (too_deep.param, str(MAX_DEPTH) in too_deep.message) == ("x_extra", True)
    objects = {"a": {"b": [1, nested(MAX_DEPTH - 2)]}}
    assert refusal(COMPLETION | {"metadata": objects}).param == "metadata"


def test_wide_bodies_are_not_deep():
    assert len(parse(CHAT | {"messages": CHAT["messages"] * 4096}).spec.prompt) == 4096
    assert len(parse(COMPLETION | {"prompt": [5] * 300_000}).spec.prompt) == 300_000


def test_of_a_field_that_comes_twice_the_last_counts():
    raw = b'{"model": "a", "prompt": "x", "model": "b"}'
    assert parse(raw).spec.model == "b"


IGNORED_OF_OPENAI = {
    "metadata",
    "parallel_tool_calls",  # of tools, which are refused
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
}
"""Fields of OpenAI's API that do not change the answer: counted, as any unknown field."""


@pytest.mark.parametrize(("params", "body"), [(ChatParams, CHAT), (CompletionParams, COMPLETION)])
def test_every_field_of_openais_api_is_known_refused_or_counted(params, body):
    for field in params.__annotations__.keys() - body.keys():
        schema = body_schemas("{model}")[(ChatCompletionRequest if body is CHAT else CompletionRequest).__name__]
        if field in IGNORED_OF_OPENAI:
            assert parse(body | {field: {"any": "thing"}}).unknown_fields == (field,)
        else:
            assert field in schema["properties"], f"{field} is new: is it to be served, refused or ignored?"
            assert refusal(body | {field: {"no": ["sense"]}}).param == field


def test_every_field_of_openais_messages_is_known_refused_or_counted():
    known = {"role": "user", "content": "Hi", "name": "n"}
    for params in MessageParams:
        for field in params.__annotations__.keys() - known.keys():
            message = known | {field: {"some": "thing"}}
            if field in {"refusal", "tool_call_id"}:
                assert parse(CHAT | {"messages": [message]}).unknown_fields == (f"messages.{field}",)
            else:
                assert refusal(CHAT | {"messages": [message]}).param == f"messages[0].{field}"
    for role in ("tool", "function"):
        assert refusal(CHAT | {"messages": [known | {"role": role}]}).param == "messages[0].role"


def test_schemas_tell_of_the_limits():
    schemas = body_schemas("{model}")
    chat, completion = schemas["ChatCompletionRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    assert chat["messages"]["maxItems"] == 4096
    assert chat["tools"]["enum"] == [None, []]
    assert completion["suffix"]["enum"] == [None, ""]
    assert schemas["Message"]["properties"]["tool_calls"]["enum"] == [None, []]


def test_a_body_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(BodyTooLarge, match="1000000"):
        parse_body(b"x" * (MAX_BODY_BYTES + 1), chat=True)


def test_a_job_is_told_by_its_fields():
    assert parse(CHAT | {"prompt": None}, chat=None).spec.chat
    assert not parse(COMPLETION, chat=None).spec.chat
    assert "exclude each other" in refusal(CHAT | COMPLETION, chat=None).message
    assert "messages or prompt is required" in refusal({"model": "m"}, chat=None).message


def test_the_endpoint_decides_where_there_is_one():
    assert refusal(COMPLETION, chat=True).param == "messages"
    assert refusal(CHAT, chat=False).param == "prompt"
    assert parse(CHAT | COMPLETION, chat=True).unknown_fields == ("prompt",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
field_names = st.sampled_from(
    ["model", "messages", "prompt", "n", "stop", "logprobs", "seed", "stream", "stream_options", "tools", "max_tokens"]
)


@given(base=st.sampled_from([CHAT, COMPLETION]), fields=st.dictionaries(field_names, json_values), chat=st.none())
def test_no_value_of_any_field_raises_anything_else(base, fields, chat):
    with suppress(InvalidRequest):
        assert parse(base | fields, chat=chat).spec.n in range(1, 9)


@given(raw=st.binary())
def test_no_bytes_raise_anything_else(raw):
    with pytest.raises(InvalidRequest):
        parse_body(raw, chat=None)
