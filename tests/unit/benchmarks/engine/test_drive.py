import pytest

from benchmarks.engine.build import SPEED_WEIGHTS, BenchPlan, start_engine
from benchmarks.engine.drive import DecodeRows, Work, greedy, run_all
from shared.blocks import PAGE_TOKENS
from shared.engine.fake import fake_engine


@pytest.fixture(scope="module")
def engine():
    plan = BenchPlan("cpu", "float32", "torch", num_pages=8, max_running=3, max_batch_tokens=128)
    built, start = start_engine("tiny", plan, SPEED_WEIGHTS)
    assert start.ready_s > 0
    return built.engine


@pytest.fixture
def work(engine):
    return Work(engine.model.vocab_size, seed=1)


def test_requests_share_no_block_and_no_key():
    requests = Work(1000, seed=1).requests(20, PAGE_TOKENS, greedy(1))
    assert len({request.ids.tobytes() for request in requests}) == 20
    assert len({request.key for request in requests}) == 20


def test_all_requests_are_run_to_their_last_token():
    tokens = []
    requests = Work(1000, seed=1).requests(3, 70, greedy(5))
    assert run_all(fake_engine(), requests, tokens.append) > 0
    assert sorted((token.key, token.index) for token in tokens) == [
        (f"r{i}", index) for i in range(3) for index in range(5)
    ]


def test_a_failed_request_ends_the_run():
    engine = fake_engine(poison_token_id=5)
    [request] = Work(1000, seed=1).requests(1, 3, greedy(5))
    request.ids[1] = 5
    with pytest.raises(RuntimeError, match="NaN"):
        run_all(engine, [request])


def test_decode_rows_begin_at_their_context_without_prefill(engine, work):
    rows = DecodeRows(engine, work, batch=2, context=70, sampling=greedy(10))
    before = engine.stats()
    assert rows.steps(3) > 0
    after = engine.stats()
    assert after.num_generated_tokens - before.num_generated_tokens == 6
    assert after.num_prompt_tokens == before.num_prompt_tokens
    rows.close()
    assert engine.stats().num_free_pages == engine.limits.num_pages
    engine.check()


def test_decode_rows_that_end_are_no_full_steps(engine, work):
    rows = DecodeRows(engine, work, batch=2, context=5, sampling=greedy(3))
    with pytest.raises(RuntimeError, match="0 tokens of 2"):
        rows.steps(3)


def test_too_many_decode_rows_are_refused(engine, work):
    with pytest.raises(RuntimeError, match="do not fit"):
        DecodeRows(engine, work, batch=4, context=5, sampling=greedy(3))
    for index in range(1000):
        engine.abort(f"r{index}")
