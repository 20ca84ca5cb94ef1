import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.simulator.lengths import PlainLengths
from loadgen.simulator.policies import Contender, policy_names
from shared.policy.placement import Chosen, Fetch
from shared.policy.profile import LinkRate
from shared.wire.explanation import Explanation
from tests.unit.loadgen.simulator.small import HOPS, INSTANTLY, PAGE_BYTES, PULL, SPEEDS, hardware, kind, run, workload

INSTANT_LINK = LinkRate(latency_s=0.0, bytes_per_s=1e15)


def close(value):
    return pytest.approx(value, abs=1e-9)


class Fixed:
    """Sends every request to the same workers, by place in the cluster; `local`: to the decode worker alone."""

    def __init__(self, *, local=False, prefill=0, fetch_from=None, num_pages=0, first_elsewhere=False):
        self.local = local
        self.prefill = prefill
        self.fetch_from = fetch_from
        self.num_pages = num_pages
        self.first_elsewhere = first_elsewhere

    def decide(self, request, cluster, holders, *, tie_break):
        decode = cluster.decode[0].ref
        elsewhere = self.first_elsewhere and tie_break == 0
        prefill = decode if self.local else cluster.prefill[0 if elsewhere else self.prefill].ref
        fetch = None
        if self.fetch_from is not None and not elsewhere:
            fetch = Fetch(cluster.prefill[self.fetch_from].ref, self.num_pages)
        pages = -(-(request.num_tokens + request.reserve_new_tokens) // 64)
        return Chosen(prefill, decode, 0 if self.local else 2, pages, 0.5, fetch, lambda: Explanation("fixed", 1))


def fixed(**options):
    return Contender(Fixed(**options), PlainLengths())


def test_one_request_takes_its_hops_its_prefill_its_pull_and_its_steps():
    (job,) = run(workload((0.0, 200, 5)), speed=INSTANTLY).jobs
    prefill_s = SPEEDS.token_s * 200
    ttft_s = HOPS.placed_s + HOPS.work_s + prefill_s + HOPS.frame_s
    assert job.ttft_s == close(ttft_s)
    # 4 pages are pulled behind the only chunk: 5 ms, longer than the token's way of 3 ms. Then 4 steps, each longer by
    # what one more position costs; the first reads 201 positions.
    pull_s = PULL.latency_s + 4 * PAGE_BYTES / PULL.bytes_per_s
    steps_s = sum(SPEEDS.decode_step_s(1, 201 + step) for step in range(4))
    assert job.last_token_s - job.first_token_s == close(pull_s + steps_s)
    assert job.tpot_s == close((pull_s + steps_s) / 4)


def test_an_answer_of_one_token_ends_in_prefill():
    (job,) = run(workload((0.0, 200, 1)), speed=INSTANTLY).jobs
    assert job.last_token_s == job.first_token_s
    assert job.tpot_s is None


def test_a_long_prompt_goes_in_chunks_and_only_its_last_pages_are_pulled_late():
    (job,) = run(workload((0.0, 1000, 2)), speed=INSTANTLY).jobs
    # 512 tokens, then 488; of 16 pages 8 are on their way before the second chunk ends.
    prefill_s = SPEEDS.token_s * 1000
    assert job.ttft_s == close(HOPS.placed_s + HOPS.work_s + prefill_s + HOPS.frame_s)
    assert job.tpot_s == close(PULL.latency_s + 8 * PAGE_BYTES / PULL.bytes_per_s + SPEEDS.decode_step_s(1, 1001))


def test_two_that_do_not_fit_into_one_step_queue():
    jobs = run(workload((0.0, 512, 1), (0.0, 512, 1)), speed=INSTANTLY).jobs
    first, second = sorted(job.ttft_s for job in jobs)
    assert second - first == close(SPEEDS.token_s * 512)


def test_a_row_joins_behind_the_step_that_runs_when_it_is_ready():
    jobs = run(workload((0.0, 512, 20), (0.0, 512, 20)), speed=INSTANTLY).jobs
    first, second = sorted(jobs, key=lambda job: job.first_token_s)
    pull_s = PULL.latency_s + 8 * PAGE_BYTES / PULL.bytes_per_s
    now_s = first.first_token_s - HOPS.frame_s + pull_s
    ready_s = second.first_token_s - HOPS.frame_s + pull_s
    num_done = 0
    while now_s < ready_s:
        now_s += SPEEDS.decode_step_s(1, 513 + num_done)
        num_done += 1
    assert now_s - ready_s > 1e-3, "it waits"
    for step in range(19 - num_done):
        now_s += SPEEDS.decode_step_s(2, 2 * (513 + step) + num_done)
    assert first.last_token_s - HOPS.frame_s == close(now_s)
    for step in range(num_done):
        now_s += SPEEDS.decode_step_s(1, 513 + 19 - num_done + step)
    assert second.last_token_s - HOPS.frame_s == close(now_s)


def ends_step_by_step(ready: list[tuple[float, int, int]]) -> list[float]:
    """When each answer ends that joins when it is ready (ready_s, context, tokens left), one step after another."""
    waiting = sorted((ready_s, place, context, left) for place, (ready_s, context, left) in enumerate(ready))
    rows, ends, now_s = {}, [0.0] * len(ready), 0.0
    while waiting or rows:
        if not rows:
            now_s = max(now_s, waiting[0][0])
        while waiting and waiting[0][0] <= now_s + 1e-9:
            _, place, context, left = waiting.pop(0)
            rows[place] = [context, left]
        now_s += SPEEDS.decode_step_s(len(rows), sum(context for context, _ in rows.values()))
        for place, row in list(rows.items()):
            row[0] += 1
            row[1] -= 1
            if not row[1]:
                ends[place] = now_s
                del rows[place]
    return ends


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 600), st.integers(2, 120)), min_size=1, max_size=12),
)
def test_jumping_from_change_to_change_ends_answers_when_steps_one_by_one_do(requests):
    load = workload(*((at_s * INSTANTLY, num_input, num_output) for at_s, num_input, num_output in sorted(requests)))
    instant = hardware(decode=kind(max_running=64)).model_copy(update={"page_bytes": 1, "peer_link": INSTANT_LINK})
    jobs = run(load, hardware=instant, speed=INSTANTLY).jobs
    ready = [
        (job.first_token_s - HOPS.frame_s + HOPS.token_s, job.row.num_input + 1, job.row.num_output - 1) for job in jobs
    ]
    for job, end_s in zip(jobs, ends_step_by_step(ready), strict=True):
        assert job.last_token_s == pytest.approx(end_s + HOPS.frame_s, abs=1e-6)


def test_the_second_of_equal_prompts_finds_the_first_ones_pages():
    load = workload((0.0, 1024, 1, (1, 2)), (60.0, 1024, 1, (1, 2)))
    first, second = run(load, speed=1.0).jobs
    assert (first.num_cached, second.num_cached) == (0, 15 * 64), "the last token is always computed"
    assert second.ttft_s == close(HOPS.placed_s + HOPS.work_s + SPEEDS.base_s + HOPS.frame_s)


def test_of_equal_prompts_at_once_the_later_waits_for_the_first_ones_pages():
    finished = run(workload((0.0, 512, 1, (1,)), (0.0, 512, 1, (1,))), speed=INSTANTLY)
    assert sorted(job.num_cached for job in finished.jobs) == [0, 7 * 64]


def test_a_small_cache_forgets_the_oldest_prompt():
    small = hardware(prefill=kind(num_pages=16))
    prompts = [(60.0 * place, 512, 1, (hash_id,)) for place, hash_id in enumerate((1, 2, 3, 1))]
    assert [job.num_cached for job in run(workload(*prompts), speed=1.0, hardware=small).jobs][-1] == 0
    large = hardware(prefill=kind(num_pages=32))
    assert [job.num_cached for job in run(workload(*prompts), speed=1.0, hardware=large).jobs][-1] == 7 * 64


def test_what_fell_out_of_the_cache_is_read_back_from_host_memory():
    tiered = hardware(prefill=kind(num_pages=16, num_host_pages=100))
    prompts = [(60.0 * place, 512, 1, (hash_id,)) for place, hash_id in enumerate((1, 2, 3, 1))]
    job = run(workload(*prompts), speed=1.0, hardware=tiered).jobs[-1]
    assert (job.num_cached, job.num_fetched) == (7 * 64, 7 * 64)
    load_s = PULL.latency_s + 7 * PAGE_BYTES / PULL.bytes_per_s
    assert job.ttft_s == close(HOPS.placed_s + HOPS.work_s + load_s + SPEEDS.base_s + HOPS.frame_s)


def test_pages_come_from_a_peer():
    load = workload((0.0, 512, 1, (1,)), (60.0, 512, 1, (1,)))
    policy = fixed(prefill=1, fetch_from=0, num_pages=7, first_elsewhere=True)
    job = run(load, policy, num_prefill=2, speed=1.0).jobs[1]
    assert (job.num_cached, job.num_fetched) == (7 * 64, 7 * 64)
    # It is asked first, then sends.
    fetch_s = 2 * PULL.latency_s + 7 * PAGE_BYTES / PULL.bytes_per_s
    assert job.ttft_s == close(HOPS.placed_s + HOPS.work_s + fetch_s + SPEEDS.base_s + HOPS.frame_s)


def test_a_peer_without_the_pages_costs_a_count():
    finished = run(workload((0.0, 512, 1, (1,))), fixed(prefill=1, fetch_from=0, num_pages=7), num_prefill=2)
    assert finished.jobs[0].num_fetched == 0
    assert [counts.num_poor_fetches for counts in finished.prefill] == [0, 1]


def test_a_decode_worker_computes_a_prompt_beside_its_rows():
    (job,) = run(workload((0.0, 200, 3)), fixed(local=True), speed=INSTANTLY).jobs
    assert job.is_local
    assert job.ttft_s == close(HOPS.placed_s + HOPS.work_s + SPEEDS.token_s * 200 + HOPS.frame_s)
    assert job.tpot_s == close((SPEEDS.decode_step_s(1, 201) + SPEEDS.decode_step_s(1, 202)) / 2)


def test_running_rows_wait_for_a_prompt_beside_them():
    at_s = 0.2 * INSTANTLY
    alone = run(workload((0.0, 64, 50)), fixed(local=True), speed=INSTANTLY).jobs[0]
    beside = run(workload((0.0, 64, 50), (at_s, 500, 1)), fixed(local=True), speed=INSTANTLY).jobs[0]
    # One of its 49 steps computes 500 tokens as well, which takes longer than reading the weights.
    assert beside.last_token_s - alone.last_token_s == close(SPEEDS.token_s * 500 - SPEEDS.base_s)


def test_prompts_that_end_in_one_step_beside_one_whose_answer_ends_with_it():
    jobs = run(workload((0.0, 100, 1), (0.0, 100, 1), (0.0, 100, 1)), fixed(local=True), speed=INSTANTLY).jobs
    # The first one's step has begun when the others come; these share the next.
    waits_s = sorted(job.ttft_s - HOPS.placed_s - HOPS.work_s - HOPS.frame_s for job in jobs)
    assert waits_s == [close(SPEEDS.base_s), close(SPEEDS.base_s + 0.02), close(SPEEDS.base_s + 0.02)]


def test_who_finds_no_pages_for_its_next_token_is_computed_again_and_all_ends_well():
    tight = hardware(decode=kind(num_pages=6))
    load = workload((0.0, 100, 150), (0.0, 100, 150))
    policy = fixed()
    finished = run(load, policy, hardware=tight, speed=INSTANTLY)
    assert sum(counts.num_preemptions for counts in finished.decode) >= 1
    assert [job.num_made for job in finished.jobs] == [150, 150]


def test_nobody_is_placed_beyond_the_pages_there_are_and_the_first_in_line_waits():
    tight = hardware(decode=kind(num_pages=12))
    load = workload((0.0, 300, 100), (0.0, 300, 100))
    finished = run(load, hardware=tight, speed=INSTANTLY, max_new_tokens=400)
    first, second = sorted(finished.jobs, key=lambda job: job.placed_s)
    assert finished.num_no_room >= 1
    assert 0 <= second.placed_s - first.last_token_s <= 0.02 + HOPS.frame_s


def test_a_request_that_never_fits_is_refused():
    finished = run(workload((0.0, 70_000, 5), (0.0, 10, 5)), speed=INSTANTLY)
    assert sorted(job.refusal or "" for job in finished.jobs) == ["", "it can have 64000 tokens"]


def test_a_next_turn_waits_for_its_parents_answer():
    load = workload((0.0, 1100, 100, (1, 2, 3)), (60.0, 2000, 10, (1, 2, 4, 5)))
    finished = run(load, speed=1000.0)
    parent, child = finished.jobs
    assert finished.num_held_back == 1
    assert child.arrived_s == parent.last_token_s


MANY = workload(
    *((place * 0.1, 100 + 37 * (place % 40), 1 + place * 7 % 60, ()) for place in range(150)),
    *((15.0 + place * 0.1, 1024 + 512 * (place % 3), 20, (1, 2, 3, 4)[: 2 + place % 3]) for place in range(60)),
)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_ends_every_request_and_gives_all_back(name):
    tight = hardware(
        prefill=kind(num_pages=120, num_host_pages=50, max_running=4), decode=kind(num_pages=100, max_running=6)
    )
    finished = run(MANY, name, hardware=tight, num_prefill=2, num_decode=2, speed=2.0)
    assert all(job.num_made == job.row.num_output for job in finished.jobs)


def test_a_seed_decides_everything():
    def latencies(seed):
        finished = run(MANY, "ours", num_prefill=2, num_decode=2, seed=seed)
        return [(job.ttft_s, job.tpot_s) for job in finished.jobs]

    assert latencies(4) == latencies(4)
    assert latencies(4) != latencies(5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 700), st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=25
    ),
    st.sampled_from(["ours", "prefix-affinity", "gauges"]),
    st.integers(14, 40),
    st.integers(1, 4),
)
def test_nothing_is_lost_under_any_load(requests, name, num_pages, max_running):
    requests = sorted(requests)
    load = workload(
        *(
            (at_s, num_input, num_output, tuple(shared * 10 + place for place in range(-(-num_input // 512))))
            for at_s, num_input, num_output, shared in requests
        )
    )
    tight = hardware(
        prefill=kind(num_pages=num_pages, num_host_pages=5, max_running=max_running),
        decode=kind(num_pages=num_pages, max_running=max_running, max_batch_tokens=64),
    )
    finished = run(load, name, hardware=tight, num_prefill=2, num_decode=2, max_new_tokens=90)
    for job in finished.jobs:
        assert job.refusal is not None or job.num_made == job.row.num_output
        assert job.refusal is not None or job.first_token_s <= job.last_token_s
        assert job.num_cached < job.row.num_input
