from dataclasses import replace
from itertools import count

import pytest
import torch

from shared.blocks import token_ids
from shared.engine.models.config import read_config
from shared.engine.port import BlockChanges, EngineRequest
from shared.engine.start import EnginePlan, largest_batches, refuse_small_processors, start_engine
from shared.engine.torch_runner import TorchRunner
from shared.engine.triton_runner import TritonRunner, refuse_large_groups
from shared.engine.weights import load_checkpoint
from shared.errors import StartupError, UnsupportedCheckpoint
from shared.request import SamplingParams
from tests.tiny_checkpoints import TinyCheckpoint

CPU = torch.device("cpu")


def plan(folder, **changes):
    fields = {
        "folder": folder,
        "name": "m",
        "device": CPU,
        "dtype": "float32",
        "kernels": "torch",
        "num_pages": 8,
        "gpu_memory_share": 0.9,
        "reserved_bytes": 0,
        "max_running": 4,
        "max_batch_tokens": 64,
    }
    return EnginePlan(**{**fields, **changes})


def answer(engine):
    engine.add(
        EngineRequest("r", token_ids(range(3, 80)), prompt_len=77, sampling=SamplingParams(max_tokens=5, temperature=0))
    )
    tokens = []
    while engine.has_work():
        tokens += [output.token_id for output in engine.step().tokens]
    return tokens


def test_a_started_engine_answers_and_says_what_it_took(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint())
    told = []
    clock = count()
    started = start_engine(plan(folder), lambda read, all_: told.append((read, all_)), lambda: float(next(clock)))
    assert len(answer(started.engine)) == 5
    limits = started.engine.limits
    assert (limits.num_pages, limits.max_running, limits.max_batch_tokens) == (8, 4, 64)
    assert limits.max_context == 1024
    assert started.kv_bytes == started.engine.cache.pages.nbytes
    assert told[-1] == (started.weight_bytes, started.weight_bytes)
    assert started.load_s == 1.0
    assert started.measured_steps == (), "by this clock there was no time for it"
    assert started.peak_bytes is None
    assert started.late_work is None


def test_measured_steps_leave_no_trace_in_an_engine(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint())
    in_a_hurry = count()
    unmeasured = start_engine(plan(folder), lambda _read, _all: None, lambda: float(next(in_a_hurry)))
    measured = start_engine(plan(folder), lambda _read, _all: None, lambda: 0.0)
    works = [step.work for step in measured.measured_steps]
    assert {work.num_rows for work in works} == {0, 1, 4}
    assert max(work.num_prompt_tokens for work in works) == 60
    engine = measured.engine
    assert engine.stats() == unmeasured.engine.stats()
    assert engine.take_all_blocks() == BlockChanges()
    assert answer(engine) == answer(unmeasured.engine)
    engine.check()


def test_host_memory_holds_as_many_pages_as_it_has_room_for(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint())
    clock = count()

    def started(num_bytes):
        wanted = plan(folder, host_cache_bytes=num_bytes)
        return start_engine(wanted, lambda *_: None, lambda: float(next(clock))).engine

    engine = started(0)
    page_bytes = engine.model.layout.page_bytes
    assert engine.limits.num_host_pages == 0
    assert started(3 * page_bytes + 1).limits.num_host_pages == 3
    with pytest.raises(StartupError, match="BATON_HOST_CACHE_GB"):
        started(page_bytes - 1)


def test_a_cpu_is_not_asked_how_many_pages_fit(tiny_checkpoints):
    with pytest.raises(StartupError, match="num_pages"):
        start_engine(plan(tiny_checkpoints.get(TinyCheckpoint()), num_pages=None), lambda _read, _all: None, float)


@pytest.mark.parametrize("max_batch_tokens", [4, 63, 2000])
def test_the_largest_batches_take_all_seats_and_all_tokens_and_run(tiny_checkpoints, max_batch_tokens):
    folder = tiny_checkpoints.get(TinyCheckpoint())
    many, one = largest_batches(read_config(folder), 4, max_batch_tokens)
    assert [row.seat for row in many] == [0, 1, 2, 3]
    assert max_batch_tokens - 4 < sum(row.end for row in many) <= max_batch_tokens
    assert [row.end for row in one] == [min(max_batch_tokens, 1023)]
    runner = TorchRunner(load_checkpoint(folder, "float32", CPU), 2)
    for batch in (many, one):
        assert [sampled.error for sampled in runner.launch(batch).wait()] == [None] * len(batch)


def test_the_largest_batches_run_before_the_warm_up(tiny_checkpoints):
    """On a GPU they are the first thing that a runner computes, in a cache of two pages."""
    checkpoint = load_checkpoint(tiny_checkpoints.get(TinyCheckpoint()), "float32", CPU)
    config = checkpoint.config
    runner = TritonRunner(checkpoint, 2, max_running=2, max_batch_tokens=16, max_context=config.max_context)
    for batch in largest_batches(config, 2, 16):
        assert [sampled.error for sampled in runner.launch(batch).wait()] == [None] * len(batch)


def test_a_gpu_with_less_shared_memory_than_the_kernels_take_is_refused():
    for gpu, shared_bytes in (("A100", 166912), ("H200", 232448)):
        refuse_small_processors(gpu, shared_bytes)
    with pytest.raises(StartupError, match=r"163 KB.*RTX 4090 has 99 KB.*BATON_KERNELS"):
        refuse_small_processors("RTX 4090", 101376)


def test_more_heads_that_share_keys_than_the_kernels_take_are_refused_before_weights_are_read(tiny_checkpoints):
    heads = (("num_attention_heads", 32), ("num_key_value_heads", 1), ("head_dim", 64))
    folder = tiny_checkpoints.get(TinyCheckpoint(overrides=heads))
    told = []
    with pytest.raises(UnsupportedCheckpoint, match=r"num_attention_heads / num_key_value_heads: 32 .* 16 .*float32"):
        start_engine(plan(folder, kernels="triton"), lambda *progress: told.append(progress), lambda: 0.0)
    assert not told
    start_engine(plan(folder, kernels="torch"), lambda *progress: told.append(progress), lambda: 0.0)
    assert told


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_a_block_holds_at_least_one_token(tiny_checkpoints, dtype, most):
    config = replace(read_config(tiny_checkpoints.get(TinyCheckpoint())), num_kv_heads=1)
    refuse_large_groups(replace(config, num_heads=most), dtype)
    with pytest.raises(UnsupportedCheckpoint, match=f"{most} at most"):
        refuse_large_groups(replace(config, num_heads=most + 1), dtype)


def test_steps_that_do_not_fit_are_told_with_the_settings_that_matter(tiny_checkpoints, monkeypatch):
    def run_out(_runner):
        raise torch.OutOfMemoryError("tried to allocate 9 GB")

    monkeypatch.setattr(TritonRunner, "warm_up", run_out)
    folder = tiny_checkpoints.get(TinyCheckpoint())
    with pytest.raises(StartupError, match=r"64 max_batch_tokens, 4 max_running.*num_pages.*9 GB"):
        start_engine(plan(folder, kernels="triton"), lambda _read, _all: None, lambda: 0.0)
