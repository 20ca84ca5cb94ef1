from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.arrivals import Arrivals
from loadgen.schedule import PromptBlock, ScheduleSettings, draw_schedule, prompt_blocks
from loadgen.traces import TraceRow
from shared.errors import StartupError
from tests.unit.loadgen.builders import scheduled

TRACE = [
    TraceRow(0, 0.0, 1000, 100, (0, 1)),
    TraceRow(1, 0.0, 1100, 100, (0, 1, 2)),
    TraceRow(2, 3.0, 600, 300, (0, 3)),
    TraceRow(3, 6.0, 200, 20, (0,)),
]
SHAPE = {"model": "m"}


def test_the_traces_clock_is_kept_and_sped_up():
    assert [row.at_s for row in draw_schedule(TRACE, ScheduleSettings()).rows] == [0, 0, 3, 6]
    assert [row.at_s for row in draw_schedule(TRACE, ScheduleSettings(speed=2)).rows] == [0, 0, 1.5, 3]


@pytest.mark.parametrize(
    ("settings", "indices"),
    [
        (ScheduleSettings(rows=(1, 3)), [1, 2]),
        (ScheduleSettings(rows=(2, None)), [2, 3]),
        (ScheduleSettings(window_s=(3.0, 6.0)), [2]),
        (ScheduleSettings(window_s=(0.0, None), num_prompts=3), [0, 1, 2]),
    ],
)
def test_a_slice_begins_at_once(settings, indices):
    rows = draw_schedule(TRACE, settings).rows
    assert [row.trace_index for row in rows] == indices
    assert [row.row for row in rows] == list(range(len(indices)))
    assert rows[0].at_s == 0


def test_an_empty_slice_is_refused():
    with pytest.raises(StartupError, match="empty"):
        draw_schedule(TRACE, ScheduleSettings(rows=(9, 12)))


@pytest.mark.parametrize("arrivals", [Arrivals.TRACE, Arrivals.POISSON, Arrivals.GAMMA, Arrivals.CONSTANT])
def test_the_same_arguments_are_the_same_bytes_and_the_seed_is_one_of_them(arrivals):
    settings = ScheduleSettings(
        arrivals=arrivals,
        jitter_ticks=arrivals is Arrivals.TRACE,
        request_rate_per_s=None if arrivals is Arrivals.TRACE else 5.0,
    )
    first, second = (draw_schedule(TRACE, settings) for _ in range(2))
    assert first.to_bytes(SHAPE) == second.to_bytes(SHAPE)
    assert first.digest(SHAPE) == second.digest(SHAPE)
    other = draw_schedule(TRACE, replace(settings, seed=1))
    assert other.digest(SHAPE) != first.digest(SHAPE)
    assert first.digest({"model": "another"}) != first.digest(SHAPE)
    times = [row.at_us for row in first.rows]
    assert times == sorted(times)


def test_a_digest_is_the_same_in_every_process_and_version():
    settings = ScheduleSettings(arrivals=Arrivals.POISSON, request_rate_per_s=2.0, length_scale=0.1, seed=7)
    assert draw_schedule(TRACE, settings).digest(SHAPE)[:16] == "ab0454db5286a5c2"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (ScheduleSettings(request_rate_per_s=1.0), "--speed"),
        (ScheduleSettings(arrivals=Arrivals.POISSON), "needs --request-rate"),
        (ScheduleSettings(arrivals=Arrivals.POISSON, request_rate_per_s=1, speed=2), "--speed"),
        (ScheduleSettings(arrivals=Arrivals.POISSON, request_rate_per_s=1, burstiness=2), "--burstiness"),
    ],
)
def test_options_that_exclude_each_other_are_refused(settings, complaint):
    with pytest.raises(StartupError, match=complaint):
        draw_schedule(TRACE, settings)


def test_lengths_are_scaled_and_clipped_and_counted():
    settings = ScheduleSettings(length_scale=0.1, max_input_tokens=100, max_output_tokens=20)
    schedule = draw_schedule([*TRACE, TraceRow(4, 7.0, 3, 2, (0,))], settings)
    assert [(row.input_tokens, row.output_tokens) for row in schedule.rows] == [
        (100, 10),
        (100, 10),
        (60, 20),
        (20, 2),
        (1, 1),
    ]
    assert (schedule.clipped_inputs, schedule.clipped_outputs, schedule.stretched) == (1, 1, 1)


@given(st.integers(1, 20_000), st.floats(0.001, 1.5), st.integers(1, 3000))
def test_blocks_make_up_the_prompt_and_begin_where_they_begin_in_every_other_prompt(tokens, scale, limit):
    ids = tuple(range(-(-tokens // 512)))
    length = min(limit, max(1, round(tokens * scale)))
    blocks = prompt_blocks(ids, length, scale)
    assert sum(block.num_tokens for block in blocks) == length
    longer = prompt_blocks((*ids, 999), max(1, round((len(ids) + 1) * 512 * scale)), scale)
    whole = {block.hash_id: block.num_tokens for block in longer}
    assert all(whole[block.hash_id] >= block.num_tokens for block in blocks)
    assert all(whole[block.hash_id] == block.num_tokens for block in blocks[:-1])


def test_unscaled_blocks_have_512_tokens_and_the_last_one_the_rest():
    assert prompt_blocks((4, 5, 6), 1030, 1.0) == (PromptBlock(4, 512), PromptBlock(5, 512), PromptBlock(6, 6))


def test_shared_tokens_are_those_an_earlier_prompt_began_with():
    schedule = draw_schedule(TRACE, ScheduleSettings())
    # 512 + 488 of the first row's prompt in the second; 512 in the third; 200 in the fourth.
    assert schedule.shared_input_tokens() == 1000 + 512 + 200
    apart = replace(schedule, rows=(scheduled(0), scheduled(1)))
    assert apart.shared_input_tokens() == 0
