import pytest

from benchmarks.kv_transfer.engines import EngineUnderTest

BATCH_TOKENS = 70


@pytest.fixture
async def engine():
    built = EngineUnderTest("tiny", "cpu", batch_tokens=BATCH_TOKENS, num_travelling=4)
    with built.running():
        yield built


async def test_an_engine_is_measured_again_and_again(engine):
    assert len(set(engine.travelling)) == 4
    assert max(engine.travelling) < engine.cache.num_pages
    assert (await engine.describe())["ready_s"] > 0
    for _ in range(2):
        steps_ms = await engine.decode(batch=2, context=30, steps=5)
        assert len(steps_ms) == 5
        assert min(steps_ms) > 0
        prompts_ms = await engine.prefill(num_tokens=BATCH_TOKENS, number=3)
        assert len(prompts_ms) == 3
        assert min(prompts_ms) > 0


async def test_an_engine_that_fails_fails_the_measurement(engine):
    with pytest.raises(RuntimeError, match="do not fit"):
        await engine.decode(batch=65, context=70, steps=1)
