"""Tokens through the whole disaggregated path equal those of transformers' generate, in fp32.

Ingest, prefill and decode are the real services, KV goes through real UCX; log and store are the twins. Where there is
a GPU the engines run on it, once with each kind of kernels.
"""

import asyncio
import contextlib
import os
import random

import pytest
import torch

from services.ingest.admission import ModelFacts
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineLimits
from shared.engine.torch_runner import TorchRunner
from shared.engine.triton_runner import TritonRunner
from shared.engine.weights import load_checkpoint
from shared.state.port import Role
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from tests.flow.system import MODEL, System
from tests.oracle import Oracle
from tests.tiny_checkpoints import FAMILIES, VOCAB_SIZE, TinyCheckpoint, write_tiny_checkpoint

CHUNK = 128
BORDER_LENGTHS = (1, 2, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1)
NUM_NEW = 12
MAX_RUNNING = 16
HEAD_DIM_64 = (("head_dim", 64),)  # the smallest that the Triton kernels take

BACKENDS = [("cuda", "torch"), ("cuda", "triton")] if torch.cuda.is_available() else [("cpu", "torch")]
"""(device, kernels)"""


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend(request):
    return request.param


def a_prompt(length, seed=0):
    rng = random.Random(f"{seed} {length}")
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def an_engine(folder, backend, num_pages):
    device, kernels = backend
    checkpoint = load_checkpoint(folder, "float32", torch.device(device))
    config = checkpoint.config
    model = checkpoint.model(MODEL)
    limits = EngineLimits(config.max_context, num_pages, MAX_RUNNING, max_batch_tokens=CHUNK)
    if kernels == "torch":
        return PagedEngine(TorchRunner(checkpoint, num_pages), model, limits)
    runner = TritonRunner(
        checkpoint, num_pages, max_running=MAX_RUNNING, max_batch_tokens=CHUNK, max_context=config.max_context
    )
    runner.warm_up()
    return PagedEngine(runner, model, limits)


@contextlib.asynccontextmanager
async def a_system(folder, backend, *, num_pages=64, num_decode=2):
    engines = [an_engine(folder, backend, num_pages) for _ in range(1 + num_decode)]  # before any lease begins

    async with UcxContext() as context:

        def transfer(engine, incarnation):
            staging = Staging(engine.cache, os.environ, arena_bytes=16 * engine.model.layout.page_bytes)
            return UcxTransfer(context, staging, incarnation=incarnation, clock=asyncio.get_running_loop().time)

        system = System(make_engine=engines.pop, make_transfer=transfer, facts=ModelFacts(MODEL, 1024, VOCAB_SIZE))
        try:
            await system.start_ingest()
            await system.start_worker(Role.PREFILL)
            for _ in range(num_decode):
                await system.start_worker(Role.DECODE)
            yield system
        finally:
            await system.close()


async def answers(system, prompts, num_new, **fields):
    """All prompts at once."""
    common = {"model": MODEL, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, **fields}
    bodies = [{**common, "prompt": ids} for ids in prompts]
    requests = [await system.submit(body) for body in bodies]
    states = [await system.ended(request, timeout_s=60) for request in requests]
    return states, [list(state.choice(0).ids) for state in states]


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_alone_mixed_and_with_a_cached_prefix(family, backend, tmp_path):
    tiny = TinyCheckpoint(family=family, tied=family == "qwen3", overrides=HEAD_DIM_64)
    folder = write_tiny_checkpoint(tmp_path, tiny)
    oracle = Oracle(folder)
    prompts = [a_prompt(length) for length in BORDER_LENGTHS]
    expected = [oracle.answer(ids, NUM_NEW) for ids in prompts]
    async with a_system(folder, backend) as system:
        for ids, answer in list(zip(prompts, expected, strict=True))[4:7]:
            assert (await answers(system, [ids], NUM_NEW))[1] == [answer]
        fresh, together = await answers(system, prompts, NUM_NEW)
        assert together == expected
        again, cached = await answers(system, prompts, NUM_NEW)
        assert cached == expected
        hits = [state.choice(0).num_cached_tokens for state in again]
        assert hits == [64 * ((length - 1) // 64) for length in BORDER_LENGTHS]
        assert sum(state.choice(0).num_cached_tokens for state in fresh) < sum(hits)
        await system.quiet()


async def test_tokens_survive_preemption_on_the_decode_worker(backend, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, TinyCheckpoint(overrides=HEAD_DIM_64))
    oracle = Oracle(folder)
    prompts = [a_prompt(65, seed) for seed in range(2)]
    async with a_system(folder, backend, num_pages=14, num_decode=1) as system:
        # What may end at any time gets room for 7 pages, and comes to need 8.
        _, found = await answers(system, prompts, 400, stop=["what it never says"])
        decode = system.workers[-1].engine
        assert decode.stats().num_preemptions > 0
        assert found == [oracle.answer(ids, 400) for ids in prompts]
        await system.quiet()
