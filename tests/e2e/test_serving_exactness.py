"""Greedy tokens through the whole system equal those of transformers' generate, in float32."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.stack import CHUNK_TOKENS, MODEL

pytestmark = pytest.mark.asyncio(loop_scope="session")

NUM_NEW = 8
LENGTHS = (1, 63, 64, 65, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1)
TEXT = (
    "A lighthouse keeper wrote down each ship that passed the cape. In spring there were many, and their sails were "
    "white; in autumn few came by, and those that did kept far from the rocks. One evening a small boat without any "
    "light drifted towards the shore. The keeper rang the bell, took his lantern and went down the long stairs to the "
    "water. Nobody was in the boat, but on its bench lay a book, and in the book stood the names of all the ships that "
    "he had ever seen, each with the day and the hour, in a hand that looked very much like his own. He read until the "
    "lantern went out, and then he went on reading by the light of the stars. "
)


@pytest.fixture(scope="module")
def prompts(tokeniser) -> list[list[int]]:
    """One prompt of each length; none begins as another does."""
    ids = list(tokeniser.encode(TEXT))
    assert len(ids) > max(LENGTHS) + len(LENGTHS)
    return [ids[begin : begin + length] for begin, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(smollm2, prompts) -> list[tuple[list[int], list[float]]]:
    """The new ids of each prompt, and their log probabilities."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return [generate(model, prompt) for prompt in prompts]


def generate(model, prompt) -> tuple[list[int], list[float]]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, len(prompt) :].tolist()
    logprobs = [torch.log_softmax(step[0], -1)[token].item() for step, token in zip(output.logits, new, strict=True)]
    return new, logprobs


async def ask(serving, prompt, tenant, edge=0) -> dict:
    answer = await serving.http.post(
        f"{serving.edge(edge)}/v1/completions",
        headers={"x-baton-tenant": tenant},
        json={
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": NUM_NEW,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
        },
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(answer, prompt, expected, tokeniser, *, cached: bool) -> None:
    ids, logprobs = expected
    (choice,) = answer["choices"]
    assert choice["logprobs"]["tokens"] == [tokeniser.token_text(token) for token in ids], len(prompt)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-3)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    cached_tokens = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached_tokens == (64 * ((len(prompt) - 1) // 64) if cached else 0)


async def test_alone_then_with_a_cached_prefix(serving, prompts, expected, tokeniser):
    for prompt, wanted in zip(prompts, expected, strict=True):
        check(await ask(serving, prompt, "alone"), prompt, wanted, tokeniser, cached=False)
    # All at once, of the same tenant: each finds the pages that its prompt left.
    answers = await asyncio.gather(*[ask(serving, prompt, "alone", edge=1) for prompt in prompts])
    for answer, prompt, wanted in zip(answers, prompts, expected, strict=True):
        check(answer, prompt, wanted, tokeniser, cached=True)


async def num_failed_pulls(serving):
    return await serving.metric_of_all("decode", "baton_local_prefills_total", cause="pull failed")


async def test_all_at_once_without_a_cached_prefix(serving, prompts, expected, tokeniser):
    before = await num_failed_pulls(serving)
    answers = await asyncio.gather(*[ask(serving, prompt, "together") for prompt in prompts])
    for answer, prompt, wanted in zip(answers, prompts, expected, strict=True):
        check(answer, prompt, wanted, tokeniser, cached=False)
    assert await num_failed_pulls(serving) == before
