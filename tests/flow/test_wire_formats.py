"""KV over a slow link: lossy only where the operator allows it, told in usage and metrics, and never found again."""

import contextlib

import pytest
import torch

from services.ingest.admission import ModelFacts
from services.ingest.wire_loss import WireLoss
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineLimits
from shared.engine.torch_runner import TorchRunner
from shared.engine.weights import load_checkpoint
from shared.request import FinishReason
from shared.wire.wire_format import WireFormat
from tests.flow.system import MODEL, System
from tests.flow.test_whole import a_body
from tests.tiny_checkpoints import VOCAB_SIZE, TinyCheckpoint, write_tiny_checkpoint

NUM_PAGES = 32
PROMPT_PAGES = 4
SLOW_BYTES_PER_S = 1e6
"""A prompt of a tiny model takes far longer on it than to compute."""


def a_prompt(seed):
    """PROMPT_PAGES whole pages and one token."""
    return [3 + (seed * 7 + place * 11) % (VOCAB_SIZE - 3) for place in range(PROMPT_PAGES * 64 + 1)]


@contextlib.asynccontextmanager
async def a_slow_system(tmp_path, wire_loss):
    folder = write_tiny_checkpoint(tmp_path, TinyCheckpoint())
    checkpoint = load_checkpoint(folder, "float32", torch.device("cpu"))
    limits = EngineLimits(checkpoint.config.max_context, NUM_PAGES, max_running=8, max_batch_tokens=128)

    def make_engine():
        return PagedEngine(TorchRunner(checkpoint, NUM_PAGES), checkpoint.model(MODEL), limits)

    system = System(make_engine=make_engine, facts=ModelFacts(MODEL, 1024, VOCAB_SIZE), wire_loss=wire_loss)
    try:
        await system.start(decodes=1)
        await set_speed(system, None)
        await usage_of(system, a_prompt(0))  # tells the prefill worker how fast it is
        await set_speed(system, SLOW_BYTES_PER_S)
        yield system
    finally:
        await system.close()


async def set_speed(system, bytes_per_s):
    """Exchange the wire, and let decode measure it."""
    prefill, decode = system.workers
    system.network.bytes_per_s = bytes_per_s
    await decode.transfer.connect(prefill.transfer.address, prefill.incarnation)


async def usage_of(system, prompt, tenant="default", num_new=8):
    headers = [("tenant", tenant.encode())]
    job = await system.submit(a_body(prompt, num_new), headers=headers)
    state = await system.ended(job)
    assert (state.choice(0).end.finish, len(state.choice(0).ids)) == (FinishReason.LENGTH, num_new)
    return (await system.result(job)).response["usage"]


def pulled(system, wire_format):
    """(transfers, bytes on the wire, KV bytes of all formats) of the decode worker."""
    metrics = system.workers[-1].service._parts.metrics
    counts = [counter.labels(MODEL, wire_format)._value.get() for counter in (metrics.transfers, metrics.wire_bytes)]
    return (*counts, metrics.transfer_bytes._value.get())


@pytest.mark.parametrize("wire_format", [WireFormat.INT8, WireFormat.INT4])
async def test_what_would_come_late_comes_lossy_where_that_is_allowed(tmp_path, wire_format):
    async with a_slow_system(tmp_path, WireLoss(wire_format)) as system:
        _, _, kv_bytes_before = pulled(system, wire_format)
        usage = await usage_of(system, a_prompt(1))
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "kv_wire_format": wire_format}
        transfers, wire_bytes, kv_bytes = pulled(system, wire_format)
        assert transfers == 1
        assert 0 < wire_bytes < (kv_bytes - kv_bytes_before) / 2
        await system.quiet()


async def test_lossy_pages_are_pulled_again_by_whoever_asks_next(tmp_path):
    async with a_slow_system(tmp_path, WireLoss(WireFormat.INT8)) as system:
        assert "kv_wire_format" in (await usage_of(system, a_prompt(1)))["prompt_tokens_details"]
        _, once, _ = pulled(system, WireFormat.INT8)
        await set_speed(system, None)
        _, before, kv_before = pulled(system, WireFormat.NATIVE)
        usage = await usage_of(system, a_prompt(1))
        assert usage["prompt_tokens_details"] == {"cached_tokens": PROMPT_PAGES * 64}
        _, native, kv_bytes = pulled(system, WireFormat.NATIVE)
        page_bytes = system.workers[-1].engine.model.layout.page_bytes
        assert native - before == kv_bytes - kv_before == (PROMPT_PAGES + 1) * page_bytes, "the lossy ones were no hit"
        usage = await usage_of(system, a_prompt(1))
        _, native_again, _ = pulled(system, WireFormat.NATIVE)
        assert native_again - native == page_bytes, "the exact ones were"
        assert once == pulled(system, WireFormat.INT8)[1]
        await system.quiet()


async def test_native_is_the_default_and_a_tenant_may_have_its_own_word(tmp_path):
    async with a_slow_system(tmp_path, WireLoss(tenants={"frugal": WireFormat.INT8})) as system:
        plain = await usage_of(system, a_prompt(1))
        assert plain["prompt_tokens_details"] == {"cached_tokens": 0}
        frugal = await usage_of(system, a_prompt(2), tenant="frugal")
        assert frugal["prompt_tokens_details"]["kv_wire_format"] == WireFormat.INT8
        await system.quiet()
