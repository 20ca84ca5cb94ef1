"""The official client against an edge on a real port, the log and the store being twins."""

import asyncio
from contextlib import asynccontextmanager
from random import Random

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from shared.bus.memory import MemoryLog
from shared.runtime.run import serve_http, unix_clock_s
from shared.state.memory import MemoryStore
from shared.wire.to_stream_out import Cut, Detach, ErrorBody
from tests.flow.edges import IDS, TEXT, Node, World

MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def serving(**settings):
    """A world by the real clock, its one edge, and a client of it."""
    made = World()
    made.clock_s = unix_clock_s
    made.log = MemoryLog(clock=unix_clock_s, random=Random(7))
    made.store = MemoryStore(clock=unix_clock_s)
    node = Node(made, "a", settings)
    async with node.edge.running():
        await made.ready(node)
        async with (
            serve_http(node.app.routes, host="127.0.0.1", port=0) as port,
            AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
        ):
            yield made, node, client


async def test_the_official_client_chats_with_and_without_a_stream():
    async with serving() as (made, _, client):

        async def serve(num_jobs):
            for _ in range(num_jobs):
                job = await made.job()
                job.open()
                job.serve()

        serving_jobs = asyncio.create_task(serve(3))
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == TEXT
        assert len(answer.choices[0].logprobs.content) == len(IDS)
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
        assert chunks[-1].usage.completion_tokens == len(IDS)
        completion = await client.completions.create(model="tiny", prompt="hi", stream=False)
        assert completion.choices[0].text == TEXT
        await serving_jobs


async def test_the_official_client_raises_its_own_errors():
    async with serving() as (made, _, client):
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
        asking = asyncio.create_task(client.chat.completions.create(model="wrong", messages=MESSAGES, stream=True))
        job = await made.job()
        job.refuse(ErrorBody("no such model", "invalid_request_error", 404, "model", "model_not_found"))
        with pytest.raises(openai.NotFoundError, match="no such model"):
            await asking
        asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        job = await made.job()
        job.open()
        job.frame(0, IDS[:3])
        stream = await asking
        made.write(Cut(job.id, 0, 2, "test", "failed", ErrorBody("broken", "server_error", 500)))
        with pytest.raises(openai.APIError, match="broken"):
            [chunk async for chunk in stream]
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="tiny", prompt="x" * 2_000_000)
        assert caught.value.status_code == 413


async def test_a_client_that_hangs_up_is_noticed():
    async with serving() as (made, _, client):
        asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        job = await made.job()
        job.open()
        job.frame(0, IDS[:3])
        stream = await asking
        await anext(aiter(stream))
        await stream.close()
        async with asyncio.timeout(5):
            while not made.story(job.id, Detach):
                await asyncio.sleep(0.02)
        await stream.response.aclose()


async def test_health_and_metrics_stand_beside():
    async with serving() as (_, _, client), httpx.AsyncClient(base_url=str(client.base_url)[:-3]) as http:
        assert (await http.get("health")).json()["status"] == "ok"
        assert (await http.get("ready")).json() == {
            "ready": True,
            "bus": True,
            "state": True,
            "partitions": True,
            "accepting": True,
        }
        assert "baton_stream_out_partitions 16.0" in (await http.get("metrics")).text
        assert (await http.get("nothing")).json()["error"]["code"] == "unknown_url"
