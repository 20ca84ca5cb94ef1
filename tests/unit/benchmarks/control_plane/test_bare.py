from collections import deque
from itertools import count

import pytest

from benchmarks.control_plane.bare import Driver, calibrate, decode_steps, run_closed, run_open
from benchmarks.control_plane.loads import Load, Setup
from loadgen.jobs import COMPLETIONS, JobMaker, RequestShape
from loadgen.prompts import IdPrompts, vocabulary_of_size
from loadgen.schedule import ScheduledRow
from shared.blocks import token_ids
from shared.engine.fake import FAKE_VOCAB_SIZE, fake_engine
from shared.engine.port import EngineRequest
from shared.request import SamplingParams

SETUP = Setup(
    model="unused",
    model_name="m",
    device="cpu",
    dtype="float32",
    num_pages=256,
    max_running=8,
    max_batch_tokens=256,
    input_tokens=20,
    output_tokens=6,
    seconds=0.1,
    seed=0,
)


@pytest.fixture
def driver():
    return Driver(fake_engine(num_pages=256))


def request(place: int, output_tokens: int = 4) -> EngineRequest:
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(f"r{place}", token_ids([place % 900 + 5] * 10), 10, sampling)


class Jobs:
    def __init__(self):
        shape = RequestShape(COMPLETIONS, "m", ignore_eos=True, temperature=0.0, stream=True)
        self.maker = JobMaker(shape, IdPrompts(0, vocabulary_of_size(FAKE_VOCAB_SIZE)), "test", 1.0)
        self.lengths = []

    def next(self, input_tokens, output_tokens):
        self.lengths.append((input_tokens, output_tokens))
        place = len(self.lengths)
        return self.maker.make(ScheduledRow(place, place, 0, input_tokens, output_tokens, ()))


def test_open_loop_runs_every_request_to_its_end(driver):
    samples = run_open(driver, deque([(0.0, request(0)), (0.0, request(1)), (0.02, request(2, 3))]))
    assert [sample.output_tokens for sample in samples] == [4, 4, 3]
    assert samples[2].at_s == pytest.approx(0.02)
    for sample in samples:
        assert sample.at_s <= sample.sent_s <= sample.first_token_s
        assert len(sample.gaps_s) == sample.output_tokens - 1
    assert not driver.running
    driver.engine.check()


def test_closed_loop_keeps_its_streams_and_ends_clean(driver):
    load = Load(name="full", streams=3, rate_per_s=None, lead_s=0, seconds=0.05, trail_s=0, pause_s=0, first_index=0)
    most = 0

    def requests():
        nonlocal most
        for place in count():
            most = max(most, len(driver.running) + 1)
            yield request(place)

    samples = run_closed(driver, load, requests())
    assert most == 3
    assert len(samples) > 3
    assert all(sample.output_tokens == 4 for sample in samples)
    assert not driver.running


def test_calibration_counts_tokens_and_leaves_nothing_behind(driver):
    jobs = Jobs()
    found = calibrate(driver, 3, lambda length: jobs.next(20, length), SETUP, 0.05)
    assert found.streams == 3
    assert found.tokens_per_s > 0
    assert [length for _, length in jobs.lengths[:4]] == [2, 4, 6, 6]
    assert driver.engine.stats().num_running == 0
    driver.engine.check()


def test_decode_steps_have_exactly_the_rows_and_the_mean_context(driver):
    jobs = Jobs()
    setup = Setup(**{name: getattr(SETUP, name) for name in SETUP.__slots__} | {"input_tokens": 200})
    found = decode_steps(driver, 4, jobs.next, setup)
    assert found["rows"] == 4
    assert found["step_ms"]["count"] == 64
    assert found["mean_context"] == pytest.approx(200 + 6 / 2, abs=3)
    assert driver.engine.stats().num_running == 0


def test_a_request_that_the_engine_fails_ends_the_run():
    driver = Driver(fake_engine(poison_token_id=7))
    driver.add(EngineRequest("bad", token_ids([7, 8]), 2, SamplingParams(max_tokens=2)), 0.0)
    with pytest.raises(RuntimeError, match="bad"):
        driver.step()
