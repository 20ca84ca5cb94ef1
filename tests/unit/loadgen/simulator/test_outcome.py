import pytest

from loadgen.simulator.outcome import keeps, lru_hit_rate, outcome_of
from loadgen.simulator.policies import Goals
from tests.unit.loadgen.simulator.small import INSTANTLY, hardware, run, workload


def test_a_run_in_numbers():
    load = workload((0.0, 64, 11), (60.0, 64, 11), (120.0, 99_000, 5))
    finished = run(load, speed=1.0, hardware=hardware(), max_new_tokens=11)
    outcome = outcome_of(finished, Goals(ttft_s=1.0, tpot_s=1.0))
    assert (outcome.num_requests, outcome.num_refused) == (3, 1)
    assert outcome.attainment == pytest.approx(2 / 3), "one without an answer kept nothing"
    assert outcome.ttft_s[0] == pytest.approx(finished.jobs[0].ttft_s)
    assert outcome.rate_per_s == pytest.approx(2 / (finished.jobs[2].arrived_s - finished.jobs[0].arrived_s))


def test_both_goals_are_kept_or_none():
    (job,) = run(workload((0.0, 64, 11)), speed=INSTANTLY).jobs
    assert keeps(job, Goals(job.ttft_s, job.tpot_s))
    assert not keeps(job, Goals(job.ttft_s * 0.99, job.tpot_s))
    assert not keeps(job, Goals(job.ttft_s, job.tpot_s * 0.99))
    (short,) = run(workload((0.0, 64, 1)), speed=INSTANTLY).jobs
    assert keeps(short, Goals(short.ttft_s, 0.0)), "a single token has no next one"


def test_one_lru_keeps_what_fits():
    prompts = [(60.0 * place, 512, 1, (hash_id,)) for place, hash_id in enumerate((1, 2, 1))]
    assert lru_hit_rate(workload(*prompts), 16) == pytest.approx(7 * 64 / (3 * 512)), "the last token is computed"
    assert lru_hit_rate(workload(*prompts), 8) == 0
