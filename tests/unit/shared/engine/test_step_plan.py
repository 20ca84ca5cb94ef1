"""Plans of steps: which row lies where, and what is padded to which shape."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch

from shared.blocks import pages_for, token_ids
from shared.engine.batch import BatchRow
from shared.engine.step_plan import (
    ALIGNMENT_WORDS,
    Draw,
    StepInputs,
    StepPlanner,
    begin_step,
    decode_buckets,
    num_words,
    padding_words,
)
from shared.request import SamplingParams

NOBODY = 40
TOKENS_PER_BLOCK = 16


def row(start, end, seat=0, *, sample=True, forbid_end=False, **sampling):
    return BatchRow(
        key="k",
        sequence=seat,
        seat=seat,
        ids=token_ids(range(1000 * seat, 1000 * seat + end)),
        start=start,
        end=end,
        pages=tuple(range(100 * seat, 100 * seat + pages_for(end))),
        prompt_len=1,
        sample=sample,
        sampling=SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **sampling}),
        choice=0,
        forbid_end=forbid_end,
    )


@pytest.fixture
def planner():
    return StepPlanner(max_running=40, max_batch_tokens=600, nobody=NOBODY, tokens_per_block=lambda _: TOKENS_PER_BLOCK)


def inputs_of(plan):
    return StepInputs.of(plan.words, plan.shape)


@pytest.mark.parametrize("max_running", [1, 2, 3, 24, 40, 250, 256, 300])
def test_buckets_end_with_all_seats_and_pad_little(max_running):
    buckets = decode_buckets(max_running)
    assert buckets == sorted(set(buckets))
    assert (buckets[0], buckets[-1]) == (1, max_running)
    assert all(after - before <= max(2, 8, before / 4) for before, after in pairwise(buckets))


def test_decode_rows_are_their_seats_alone(planner):
    plan = planner.plan([row(70, 71, seat) for seat in (5, 3, 9)])
    assert plan.words.tolist() == [5, 3, 9, NOBODY]
    assert plan.shape.is_decode
    assert plan.shape in planner.decode_shapes
    assert plan.drawn == [(0, 0), (1, 1), (2, 2)]
    words = np.arange(num_words(plan.shape), dtype=np.int32)
    inputs = StepInputs.of(words, plan.shape)
    assert inputs.sampled_seats.tolist() == inputs.seats.tolist()
    assert len(inputs.sampled_rows) == len(inputs.blocks) == 0


def test_chunks_lie_behind_decode_rows(planner):
    """In batch order: a chunk that ends a prompt, two decode rows, a chunk that does not, a last id as a chunk."""
    rows = [row(0, 580, 1), row(9, 10, 2), row(5, 6, 3), row(64, 67, 4, sample=False), row(6, 7, 5, sample=False)]
    plan = planner.plan(rows)
    inputs = inputs_of(plan)
    shape = plan.shape
    assert (shape.num_decode, shape.num_tokens, shape.num_sampled) == (2, 586, 3)
    assert inputs.seats.tolist() == [2, 3] + [1] * 580 + [4] * 3 + [5]
    assert inputs.ids[2:].tolist() == [*range(1000, 1580), *range(4064, 4067), 5006]
    assert inputs.positions[2:].tolist() == [*range(580), *range(64, 67), 6]
    assert inputs.sampled_rows.tolist() == [0, 1, 581]
    assert inputs.sampled_seats.tolist() == [2, 3, 1]
    assert inputs.ends[2] == 580
    assert len(inputs.blocks) == 37 + 2
    assert {(2, 16, 0, 1), (578, 4, 576, 1), (582, 3, 64, 4), (585, 1, 6, 5)} <= set(map(tuple, inputs.blocks.tolist()))
    assert plan.drawn == [(1, 0), (2, 1), (0, 2)]


def test_small_chunks_beside_decode_rows_are_padded(planner):
    plan = planner.plan([row(60, 80, 1), row(9, 10, 2), row(5, 6, 3), row(64, 67, 4, sample=False)])
    inputs = inputs_of(plan)
    shape = plan.shape
    assert shape in planner.prefill_shapes
    assert (shape.num_decode, shape.num_tokens) == (8, 8 + 64)
    assert inputs.seats.tolist() == [2, 3, *[NOBODY] * 6, *[1] * 20, *[4] * 3, *[NOBODY] * 41]
    assert inputs.positions[8:].tolist() == [*range(60, 80), *range(64, 67), *[-1] * 41]
    assert inputs.sampled_rows.tolist() == [*range(8), 27, *[0] * 7]
    assert inputs.sampled_seats.tolist() == [2, 3, *[NOBODY] * 6, 1, *[NOBODY] * 7]
    assert inputs.ends.tolist() == [0] * 8 + [80] + [0] * 7
    assert [block for block in inputs.blocks.tolist() if block[1]] == [[24, 4, 76, 1], [8, 16, 60, 1], [28, 3, 64, 4]]
    assert plan.drawn == [(1, 0), (2, 1), (0, 8)]


def test_a_small_step_of_64_rows_beyond_a_multiple_of_128_gets_more_padding():
    planner = StepPlanner(64, 600, NOBODY, lambda _: TOKENS_PER_BLOCK)
    for num_decode, num_tokens in [(33, 576 + 8), (32, 544), (0, 512)]:
        plan = planner.plan([*(row(9, 10, seat) for seat in range(num_decode)), row(0, 500, 64)])
        assert plan.shape.num_tokens == num_tokens
        assert plan.shape in planner.prefill_shapes
        inputs = inputs_of(plan)
        first = plan.shape.num_decode
        assert inputs.positions[first:].tolist() == [*range(500)] + [-1] * (num_tokens - first - 500)
        assert inputs.seats[first + 500 :].tolist() == [NOBODY] * (num_tokens - first - 500)
        assert inputs.blocks[:, 1].sum() == 500
        assert num_tokens <= planner.largest_shape.num_tokens


def test_more_chunks_than_shapes_have_room_for_are_not_padded(planner):
    plan = planner.plan([row(9, 10, 0), *(row(0, 3, seat) for seat in range(1, 10))])
    assert plan.shape not in planner.prefill_shapes
    assert plan.shape.num_tokens == 1 + 27


@pytest.mark.parametrize(("length", "padded"), [(2, 64), (64, 64), (65, 128), (512, 512), (513, 513)])
def test_small_prefills_are_padded(planner, length, padded):
    plan = planner.plan([row(0, length, 7)])
    assert plan.shape.num_tokens == padded
    assert (plan.shape in planner.prefill_shapes) == (padded <= 512)
    inputs = inputs_of(plan)
    assert inputs.positions.tolist() == [*range(length)] + [-1] * (padded - length)
    assert set(inputs.seats[length:].tolist()) <= {NOBODY}
    assert inputs.sampled_rows[0] == length - 1
    assert inputs.sampled_seats.tolist() == [7] + [NOBODY] * (plan.shape.num_sampled - 1)
    assert inputs.ends.tolist() == [length] + [0] * (plan.shape.num_sampled - 1)
    assert inputs.blocks[:, 1].sum() == length


def test_no_step_exceeds_the_largest_shape(planner):
    rng = Random(3)
    largest = planner.largest_shape
    for _ in range(200):
        rows = []
        budget = 600
        for seat in range(rng.randrange(1, 41)):
            length = rng.choice([1, 1, 1, rng.randrange(1, 100)])
            if length <= budget:
                start = rng.randrange(200)
                rows.append(row(start, start + length, seat, sample=rng.random() < 0.8))
                budget -= length
        plan = planner.plan(rows)
        assert len(plan.words) <= num_words(largest)
        for size in ("num_decode", "num_tokens", "num_blocks", "num_sampled"):
            assert getattr(plan.shape, size) <= getattr(largest, size)
        assert sorted(index for index, _ in plan.drawn) == [index for index, each in enumerate(rows) if each.sample]


def test_parts_are_aligned(planner):
    plan = planner.plan([row(0, 33, 1), row(9, 10, 2), row(0, 3, 3)])
    words = torch.from_numpy(plan.words)
    inputs = StepInputs.of(words, plan.shape)
    for part in (inputs.seats, inputs.sampled_rows, inputs.sampled_seats, inputs.ends, inputs.ids, inputs.blocks):
        assert (part.storage_offset() - words.storage_offset()) % ALIGNMENT_WORDS == 0


@pytest.mark.parametrize(
    ("rows", "draw"),
    [
        ([row(3, 4)], Draw.GREEDY),
        ([row(3, 4, top_k=3)], Draw.GREEDY),
        ([row(3, 4), row(3, 4, temperature=1.0)], Draw.SAMPLED),
        ([row(3, 4), row(0, 9, temperature=1.0, sample=False)], Draw.GREEDY),
        ([row(3, 4), row(3, 4, logprobs=0)], Draw.EXTRAS),
        ([row(3, 4, presence_penalty=0.1)], Draw.EXTRAS),
        ([row(3, 4, forbid_end=True)], Draw.EXTRAS),
    ],
)
def test_the_simplest_draw_that_serves_all(planner, rows, draw):
    assert planner.plan(rows).draw is draw


def test_decode_rows_begin_where_their_seats_say(planner):
    plan = planner.plan([row(70, 71, seat) for seat in (5, 3, 9)])
    seat_words = torch.zeros((NOBODY + 1, 128), dtype=torch.int32)
    seat_words[:, 0] = -1
    for seat in (3, 5, 9):
        seat_words[seat, :2] = torch.tensor([10 * seat, 7 * seat])
    words = torch.from_numpy(padding_words(plan.shape, NOBODY))
    words[: len(plan.words)] = torch.from_numpy(plan.words)
    inputs = StepInputs.of(words, plan.shape)
    begin_step(seat_words, inputs, plan.shape.num_decode)
    assert inputs.ids.tolist() == [35, 21, 63, 0]
    assert inputs.positions.tolist() == [50, 30, 90, -1]
    assert inputs.ends.tolist() == [51, 31, 91, 0]
