from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.prompts import prompt_ids
from loadgen.schedule import ScheduleSettings, draw_schedule
from loadgen.simulator.sent import is_schedule, read_schedule, workload_of_schedule
from loadgen.traces import TraceRow
from shared.blocks import hash_chain, root_hash, token_ids
from shared.errors import StartupError
from tests.unit.loadgen.simulator.small import rows


@st.composite
def traces(draw):
    """Rows whose blocks form a tree, as Mooncake's do."""
    rng = Random(draw(st.integers(0, 999)))
    paths, next_id, made = [[]], 0, []
    for index in range(draw(st.integers(1, 5))):
        path = list(rng.choice(paths))
        for _ in range(rng.randint(1, 3)):
            path.append(next_id)
            next_id += 1
        paths.append(path)
        length = 512 * len(path) - rng.choice([0, 1, 100, 511])
        made.append(TraceRow(index, float(index), length, rng.randint(1, 90), tuple(path)))
    return made


@settings(max_examples=30, deadline=None)
@given(traces(), st.sampled_from([1.0, 0.25, 0.37]))
def test_prompts_share_in_the_simulator_what_their_token_ids_share(trace, length_scale):
    scheduled = draw_schedule(trace, ScheduleSettings(length_scale=length_scale)).rows
    load = workload_of_schedule(list(scheduled))
    root = root_hash("model", "")
    chains = [hash_chain(root, token_ids(prompt_ids(row, 0, range(1000)))) for row in scheduled]
    for one, chain in zip(load.rows, chains, strict=True):
        assert len(one.prompt) == len(chain)
        for other, other_chain in zip(load.rows, chains, strict=True):
            shared = set(one.prompt.segments) & set(other.prompt.segments)
            num_shared = sum(load.segment_pages[segment] for segment in shared)
            assert num_shared == len(set(chain) & set(other_chain))


def test_a_saved_schedule_is_read_as_it_was_sent(tmp_path):
    path = tmp_path / "sent.jsonl"
    schedule = draw_schedule(rows((0.0, 600, 7, (1, 2)), (2.0, 64, 1)), ScheduleSettings(speed=2.0))
    path.write_bytes(schedule.to_bytes({}))
    assert is_schedule(path)
    load = read_schedule(path)
    assert load.times(seed=5, speed=1.0) == [0.0, 1.0], "nothing is spread"
    assert [(row.num_input, row.num_output) for row in load.rows] == [(600, 7), (64, 1)]
    assert load.states_lengths


def test_a_schedule_with_a_bad_line_is_refused_with_its_number(tmp_path):
    path = tmp_path / "sent.jsonl"
    path.write_bytes(b'{"version":1,"seed":0,"request":{}}\n{"row":0}\n')
    with pytest.raises(StartupError, match="line 2: trace_index: Field required"):
        read_schedule(path)
    path.write_bytes(b'{"version":2,"seed":0,"request":{}}\n')
    with pytest.raises(StartupError, match="line 1: version"):
        read_schedule(path)
    path.write_bytes(b'{"version":1,"seed":0,"request":{}}\n')
    with pytest.raises(StartupError, match="without a row"):
        read_schedule(path)
