"""OpenAI's own client, sync and async, and curl get right answers from the whole system."""

import asyncio
import json
from itertools import pairwise

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from infra.local.programs import require_program
from tests.e2e.stack import MODEL, TIMEOUT_S, Serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
GREEDY = {"model": MODEL, "temperature": 0}


def sync_client(serving: Serving) -> OpenAI:
    return OpenAI(base_url=f"{serving.edge()}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


def async_client(serving: Serving, edge: int = 0) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{serving.edge(edge)}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


async def chunks_of(stream) -> list:
    return [chunk async for chunk in await stream]


def text_of_choice(chunks, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((choice.delta.content or "") if hasattr(choice, "delta") else choice.text for choice in choices)


async def test_sync_client_gets_the_same_answer_whole_and_streamed(serving):
    def ask():
        with sync_client(serving) as client:
            whole = client.chat.completions.create(messages=MESSAGES, max_tokens=6, **GREEDY)
            chunks = list(client.chat.completions.create(messages=MESSAGES, max_tokens=6, stream=True, **GREEDY))
            completion = client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY)
            pieces = list(client.completions.create(prompt=PROMPT, max_tokens=4, stream=True, **GREEDY))
            return whole, chunks, completion, pieces

    whole, chunks, completion, pieces = await asyncio.to_thread(ask)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert whole.choices[0].message.content == text_of_choice(chunks) != ""
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 6
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 6
    assert completion.object == "text_completion"
    assert completion.choices[0].text == text_of_choice(pieces)
    assert completion.choices[0].text.startswith(" Paris")
    assert completion.usage.prompt_tokens == 5
    for answer in (whole, completion):
        result = await serving.result_of(answer.id)
        assert result["status"] == "completed"
        assert result["response"] == answer.model_dump(exclude_unset=True)
    for streamed, answer in ((chunks, whole), (pieces, completion)):
        result = await serving.result_of(streamed[0].id)
        assert result["response"]["choices"] == answer.model_dump(exclude_unset=True)["choices"]


async def test_async_client_gets_one_answer_for_text_and_ids_on_both_edges(serving, tokeniser):
    ids = list(tokeniser.encode(PROMPT))
    async with async_client(serving) as one, async_client(serving, 1) as other:
        answers = await asyncio.gather(
            one.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY),
            other.completions.create(prompt=ids, max_tokens=4, **GREEDY),
            one.completions.create(prompt=[ids], max_tokens=4, **GREEDY),
        )
        streams = await asyncio.gather(
            chunks_of(one.completions.create(prompt=ids, max_tokens=4, stream=True, **GREEDY)),
            chunks_of(other.completions.create(prompt=[PROMPT], max_tokens=4, stream=True, **GREEDY)),
            chunks_of(other.chat.completions.create(messages=MESSAGES, max_tokens=4, stream=True, **GREEDY)),
        )
    texts = {answer.choices[0].text for answer in answers} | {text_of_choice(chunks) for chunks in streams[:2]}
    assert len(texts) == 1
    assert texts.pop().startswith(" Paris")
    assert text_of_choice(streams[2]) != ""
    assert len({answer.id for answer in answers}) == 3


async def test_two_choices_differ_and_stream_as_they_are_whole(serving):
    wish = {"model": MODEL, "prompt": "Once upon a time", "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 11}
    async with async_client(serving) as client:
        whole, chunks = await asyncio.gather(
            client.completions.create(**wish), chunks_of(client.completions.create(**wish, stream=True))
        )
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert [text_of_choice(chunks, index) for index in (0, 1)] == texts
    assert texts[0] != texts[1]
    assert whole.usage.completion_tokens == 12


async def test_a_seed_fixes_a_sampled_answer(serving):
    wish = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 1.2}
    async with async_client(serving) as one, async_client(serving, 1) as other:
        first, again, another = await asyncio.gather(
            one.completions.create(**wish, seed=5),
            other.completions.create(**wish, seed=5),
            one.completions.create(**wish, seed=6),
        )
    assert first.choices[0].text == again.choices[0].text
    assert first.choices[0].text != another.choices[0].text


async def test_logprobs_in_both_shapes(serving, tokeniser):
    async with async_client(serving) as client:
        chat, chat_chunks, plain, plain_chunks = await asyncio.gather(
            client.chat.completions.create(messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, **GREEDY),
            chunks_of(
                client.chat.completions.create(
                    messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, stream=True, **GREEDY
                )
            ),
            client.completions.create(prompt=PROMPT, max_tokens=3, logprobs=2, **GREEDY),
            chunks_of(client.completions.create(prompt=PROMPT, max_tokens=3, logprobs=2, stream=True, **GREEDY)),
        )
    lines = chat.choices[0].logprobs.content
    assert len(lines) == 3
    assert "".join(line.token for line in lines) == chat.choices[0].message.content
    assert b"".join(bytes(line.bytes) for line in lines).decode() == chat.choices[0].message.content
    for line in lines:
        assert line.top_logprobs[0].token == line.token  # greedy: the chosen one is the likeliest
        assert [rival.logprob for rival in line.top_logprobs] == sorted(
            (rival.logprob for rival in line.top_logprobs), reverse=True
        )
        assert len(line.top_logprobs) == 2
    streamed = [
        line for chunk in chat_chunks for choice in chunk.choices if choice.logprobs for line in choice.logprobs.content
    ]
    assert [line.token for line in streamed] == [line.token for line in lines]
    assert [line.logprob for line in streamed] == pytest.approx([line.logprob for line in lines], abs=1e-3)

    logprobs = plain.choices[0].logprobs
    assert "".join(logprobs.tokens) == plain.choices[0].text
    assert [
        plain.choices[0].text[begin:end] for begin, end in pairwise([*logprobs.text_offset, None])
    ] == logprobs.tokens
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx(logprobs.token_logprobs)
    pieces = [choice.logprobs for chunk in plain_chunks for choice in chunk.choices if choice.logprobs]
    assert [token for piece in pieces for token in piece.tokens] == logprobs.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == logprobs.text_offset


async def test_stop_strings_within_and_across_tokens(serving):
    wish = {"prompt": "One, two, three, four,", "max_tokens": 10, **GREEDY}
    async with async_client(serving) as client:
        free = (await client.completions.create(**wish, logprobs=0)).choices[0]
        tokens, text = free.logprobs.tokens, free.text
        within = tokens[3].strip()
        across = next(
            stop
            for left, right in pairwise(tokens[2:])
            if (stop := left[-2:] + right[:2])
            and text.find(stop) == text.find(left + right) + len(left) - len(left[-2:])
        )
        first = tokens[0]
        answers = await asyncio.gather(
            *[client.completions.create(**wish, stop=stop) for stop in (within, [across, "never said"], first)],
            client.completions.create(**wish, stop="never said"),
        )
        chunks = await chunks_of(client.completions.create(**wish, stop=[across], stream=True))
    for stop, answer in zip((within, across, first), answers, strict=False):
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 10
    assert text_of_choice(chunks) == answers[1].choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert answers[3].choices[0].text == text
    assert answers[3].choices[0].finish_reason == "length"


async def test_lengths_and_ends(serving, tokeniser):
    async with async_client(serving) as client:
        new_name, both, one, ended = await asyncio.gather(
            client.chat.completions.create(messages=MESSAGES, max_completion_tokens=3, **GREEDY),
            client.chat.completions.create(messages=MESSAGES, max_completion_tokens=2, max_tokens=2, **GREEDY),
            client.completions.create(prompt=PROMPT, max_tokens=1, **GREEDY),
            client.completions.create(
                prompt=PROMPT,
                max_tokens=4000,  # all that the context leaves but a little: what it stops at ends it long before
                extra_body={"stop_token_ids": list(tokeniser.encode("."))},
                **GREEDY,
            ),
        )
    assert [answer.usage.completion_tokens for answer in (new_name, both, one)] == [3, 2, 1]
    assert one.choices[0].finish_reason == "length"
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (" Paris", "stop")


async def test_usage_tells_cached_tokens_by_whole_pages(serving):
    async with async_client(serving) as client:
        for num_tokens, cached in ((128, 64), (129, 128)):
            prompt = list(range(3000 + num_tokens, 3000 + 2 * num_tokens))
            asked = [await client.completions.create(prompt=prompt, max_tokens=1, **GREEDY) for _ in range(2)]
            details = [answer.usage.prompt_tokens_details.cached_tokens for answer in asked]
            assert details == [0, cached]
            assert asked[0].choices[0].text == asked[1].choices[0].text


async def test_a_stream_tells_its_usage_only_if_asked(serving):
    wish = {"messages": MESSAGES, "max_tokens": 3, "stream": True, **GREEDY}
    async with async_client(serving) as client:
        asked, plain = await asyncio.gather(
            chunks_of(client.chat.completions.create(**wish, stream_options={"include_usage": True})),
            chunks_of(client.chat.completions.create(**wish)),
        )
    assert asked[-1].choices == []
    assert asked[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in [*asked[:-1], *plain])
    assert text_of_choice(asked) == text_of_choice(plain)


async def test_models_and_errors_as_the_client_knows_them(serving):
    async with async_client(serving) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(BadRequestError) as hot:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3, stream=True)
        assert hot.value.param == "temperature"
        with pytest.raises(NotFoundError):
            await client.models.retrieve("gpt-9")


async def curl(*arguments: str) -> str:
    program = require_program("curl", package="curl", purpose="asks an edge as people do")
    process = await asyncio.create_subprocess_exec(
        *(program, "--silent", "--show-error", "--fail", "--no-buffer", "--max-time", str(TIMEOUT_S), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_curl_whole_and_streamed(serving):
    url = f"{serving.edge()}/v1/completions"
    body = {"prompt": PROMPT, "max_tokens": 3, **GREEDY}
    whole = json.loads(await curl(url, "--json", json.dumps(body)))
    streamed = await curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body | {"stream": True}))
    blocks = streamed.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks[:-1]]
    assert all(event["id"].startswith("req-") for event in events)
    chunks = [json.loads(event["data"]) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    models = json.loads(await curl(f"{serving.edge(1)}/v1/models"))
    assert [model["id"] for model in models["data"]] == [MODEL]
