"""What ingest learns from `results`, on the twins."""

import asyncio
import json
import math
import random
from array import array
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.ingest.lengths import MAX_READ_BYTES, Ended, Lengths, read_ended
from services.ingest.results import NUM_READ_BACK, follow_results
from services.ingest.work import Waiting
from shared.bus.memory import MemoryBus, MemoryLog
from shared.observe.metrics import IngestMetrics
from shared.policy.lengths import GUESSED_MEAN_TOKENS, RESERVE_QUANTILE, LengthKey
from shared.request import FinishReason, SamplingParams
from shared.wire.codec import encode
from shared.wire.openai_answers import AnswerChoice, AnswerHead, Usage, chat_completion, completion
from shared.wire.results import Result
from shared.wire.topics import RESULTS

SILENT = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


def a_result(*finishes, num_tokens=90, build=completion, **changes):
    choices = [AnswerChoice(index, "text", finish) for index, finish in enumerate(finishes)]
    response = build(AnswerHead("r", 1, "m"), choices, Usage(7, num_tokens))
    return encode(Result(**{"request_id": "r", "status": "completed", "tenant": "t", "response": response, **changes}))


def test_what_a_result_tells():
    assert read_ended(a_result(FinishReason.STOP)) == Ended(LengthKey("t", "m", "completion", 7), 1, 90, False)
    chat = a_result(FinishReason.LENGTH, build=chat_completion)
    assert read_ended(chat) == Ended(LengthKey("t", "m", "chat", 7), 1, 90, True)
    several = a_result(FinishReason.LENGTH, FinishReason.STOP, FinishReason.LENGTH)
    assert read_ended(several) == Ended(LengthKey("t", "m", "completion", 7), 3, 30, False)


@pytest.mark.parametrize(
    "record",
    [
        encode(Result("r", "cancelled", "t")),
        b"",
        b"no json",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"response": {}}',
        b'{"response": []}',
        a_result(),
        a_result(FinishReason.STOP, tenant="two words"),
        a_result(FinishReason.STOP, num_tokens=2**40),
        a_result(FinishReason.STOP, num_tokens=-3),
        a_result(FinishReason.STOP).replace(b"90", b"1e999"),
        a_result(FinishReason.STOP).replace(b'"text_completion"', b"[]"),
        a_result(FinishReason.STOP).replace(b'"m"', b'"' + b"m" * 300 + b'"'),
        a_result(FinishReason.STOP) + b" " * MAX_READ_BYTES,
    ],
)
def test_what_nothing_is_learnt_from(record):
    assert read_ended(record) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["tenant", "response", "usage", "choices", "model", "object", "completion_tokens"]), json_values)
def test_strangers_may_write_what_they_want(field, value):
    body = json.loads(a_result(FinishReason.STOP))
    for part in (body, body["response"], body["response"]["usage"]):
        if field in part:
            part[field] = value
    ended = read_ended(json.dumps(body).encode())
    assert ended is None or 0 <= ended.num_tokens <= 2**31


def a_choice(max_tokens=2000, *, stop=(), num_made=0, **sampling):
    admitted = SimpleNamespace(
        job=SimpleNamespace(tenant="t"),
        spec=SimpleNamespace(model="m", chat=False, stop=stop),
        prompt_ids=array("i", range(7)),
        sampling=SamplingParams(max_tokens, **sampling),
    )
    return Waiting(None, admitted, 0, 1, array("i", range(num_made)), 0.0)


class World:
    def __init__(self):
        self.log = MemoryLog(clock=lambda: 0.0, random=random.Random(1))
        self.metrics = IngestMetrics(CollectorRegistry())
        self.lengths = Lengths(self.metrics)
        self.bus = MemoryBus(self.log, client_id="ingest")

    async def write(self, *records, partition=3):
        async with MemoryBus(self.log, client_id="edge").producer() as producer:
            for record in records:
                await producer.send(RESULTS.name, partition, record, key=b"r")

    async def learn(self, num):
        """Follow until so many answers were learnt."""
        following = asyncio.create_task(follow_results(self.bus, self.lengths.learn, asyncio.Event(), SILENT))
        async with asyncio.timeout(10):
            while self.metrics.answers_learnt._value.get() < num:
                await asyncio.sleep(0.001)
        return following


async def test_a_new_ingest_learns_from_what_ended_before_and_goes_on():
    world = World()
    assert world.lengths.expect(a_choice(10**6)).new_tokens == pytest.approx(GUESSED_MEAN_TOKENS, rel=0.01)
    await world.write(*[a_result(FinishReason.STOP, num_tokens=1000)] * 500)
    await world.write(*[a_result(FinishReason.STOP, num_tokens=30)] * (NUM_READ_BACK - 1), b"a stranger's")
    following = await world.learn(NUM_READ_BACK - 1)
    assert world.lengths.expect(a_choice()).reserve_tokens in range(28, 40), "of the last ones only"
    assert world.metrics.results_passed_over._value.get() == 1
    await world.write(*[a_result(FinishReason.STOP, num_tokens=300)] * 900, partition=5)
    async with asyncio.timeout(10):
        while world.metrics.answers_learnt._value.get() < NUM_READ_BACK - 1 + 900:
            await asyncio.sleep(0.001)
    assert world.lengths.expect(a_choice()).reserve_tokens in range(280, 320)
    following.cancel()


def test_it_is_told_how_many_answers_are_within_what_was_predicted():
    world, rng = World(), random.Random(1)
    assert RESERVE_QUANTILE in world.metrics.answers_within
    for _ in range(1000):
        record = SimpleNamespace(value=a_result(FinishReason.STOP, num_tokens=math.ceil(rng.expovariate(1 / 200))))
        world.lengths.learn(record)
    for quantile, answers_within in world.metrics.answers_within.items():
        assert answers_within._value.get() == pytest.approx(1000 * quantile, abs=60)


def test_an_answer_that_was_cut_is_within_if_it_was_expected_to_come_so_far():
    """Its limit is what placements expect at most, so no answer is longer."""
    world = World()
    for num_tokens, within in ((10, [1, 1, 1]), (300, [1, 2, 2]), (3000, [1, 2, 2])):
        world.lengths.learn(SimpleNamespace(value=a_result(FinishReason.LENGTH, num_tokens=num_tokens)))
        assert [each._value.get() for each in world.metrics.answers_within.values()] == within


def test_what_may_not_end_before_is_expected_to_be_so_long():
    lengths = World().lengths
    assert lengths.expect(a_choice(500, ignore_eos=True)).new_tokens == 500
    assert lengths.expect(a_choice(500, ignore_eos=True, num_made=100)).reserve_tokens == 400
    assert lengths.expect(a_choice(500, ignore_eos=True, stop=("x",))).new_tokens < 300, "a stop string ends it"
    assert lengths.expect(a_choice(500, min_tokens=450)).new_tokens > 450
