"""Workers that leave in the middle of answers: streams go on elsewhere with the tokens that they would have had."""

import asyncio
import signal

import pytest

from tests.e2e.stack import MODEL, TIMEOUT_S, Event, events_of, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

NUM_TOKENS = 32
WISH = {"model": MODEL, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
PROMPTS = ("The sea was calm that", "Three things are needed to", "In the year 1900 the", "My favourite dish is")


async def stream(serving, prompt: str, started: asyncio.Event) -> list[Event]:
    """All events of an answer; `started` is set at the third."""
    url, told = f"{serving.edge()}/v1/completions", []
    async with serving.http.stream("POST", url, json=WISH | {"prompt": prompt, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for event in events_of(response):
            told.append(event)
            if len(told) == 3:
                started.set()
    return told


async def undisturbed(serving, prompt: str, num_tokens: int = NUM_TOKENS) -> list[str]:
    body = WISH | {"prompt": prompt, "max_tokens": num_tokens}
    answer = await serving.http.post(f"{serving.edge()}/v1/completions", json=body)
    return answer.json()["choices"][0]["logprobs"]["tokens"]


async def busiest(serving, role: str) -> str:
    """The worker of a role that runs most."""
    addresses = serving.stack.addresses(role)
    running = [(await serving.metrics(address))["vllm:num_requests_running"] for address in addresses]
    return f"{role}-{running.index(max(running))}"


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_worker_that_is_drained_hands_its_requests_over(serving, role):
    await serving.all_ready()
    again = await serving.metric_of_all("edge", "baton_placed_again_total")
    started = [asyncio.Event() for _ in PROMPTS]
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream(serving, *pair)) for pair in zip(PROMPTS, started, strict=True)]
        await asyncio.gather(*[one.wait() for one in started])
        name = await busiest(serving, role)
        pid = serving.stack.pid(name)
        serving.stack.send_signal(name, signal.SIGTERM)
    told = [each.result() for each in streams]
    handed_over = await serving.metric_of_all("edge", "baton_placed_again_total") - again
    if role == "decode":
        assert handed_over >= 1
    wanted = await asyncio.gather(*[undisturbed(serving, prompt) for prompt in PROMPTS])
    assert [tokens_of(events) for events in told] == wanted
    for events in told:
        assert (await serving.result_of(events[0].data["id"]))["status"] == "completed"
    await serving.all_ready()
    assert serving.stack.pid(name) != pid
    await serving.pages_free()


async def test_a_worker_may_join_and_leave(serving):
    name = await serving.stack.add("decode")
    try:
        await serving.all_ready()
        before = await serving.metrics(serving.stack.addresses("decode")[-1])
        for other in ("decode-0", "decode-1"):
            serving.stack.send_signal(other, signal.SIGTERM)  # until they are back it decodes alone
        told = await asyncio.gather(*[undisturbed(serving, prompt, 6) for prompt in PROMPTS])
        after = await serving.metrics(serving.stack.addresses("decode")[-1])
        assert after["vllm:generation_tokens_total"] > before["vllm:generation_tokens_total"]
        assert all(len(tokens) == 6 for tokens in told)
        await serving.all_ready()
    finally:
        await serving.stack.remove(name)
    assert len(await undisturbed(serving, PROMPTS[0], 2)) == 2
