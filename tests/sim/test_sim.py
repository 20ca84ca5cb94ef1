"""Random schedules of the whole system: nothing is found, and each rule that is taken out is missed."""

import os
from itertools import chain

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.running import run_in_processes, run_seeds

NUM_SCHEDULES = 70

KNOWN = {
    "placement-id": (114, 39),
    "open-compare-and-set": (7, 17),
    "read-back": (21,),
    "work-before-open": (152,),
    "ack-before-token": (10, 21),
    "finished-ids": (7, 18),
    "held-gaps": (6,),
    "blind-judge": (23, 17),
    "unseen-gone": (1193, 1299, 1349),
    "trusted-hints": (3,),
    "repayment": (122,),
    "left-jobs": (54, 39),
    "kept-work": (5,),
}
"""Seeds whose schedules miss the rule. What runs when changes with the services: then others do, and are looked for."""

NUM_OTHERS = 400


def test_nothing_is_lost_doubled_or_spliced():
    outcomes = list(run_in_processes(range(NUM_SCHEDULES), num_processes=os.cpu_count() or 1))
    assert {outcome.seed: outcome.findings for outcome in outcomes if outcome.findings} == {}
    assert sum(outcome.num_requests for outcome in outcomes) > 2 * NUM_SCHEDULES
    assert sum(outcome.num_faults for outcome in outcomes) > NUM_SCHEDULES


def test_a_schedule_goes_the_same_way_each_time():
    first, second = ([outcome.digest for outcome in run_seeds(range(4))] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_rule_is_missed(mutant):
    seeds = chain(KNOWN[mutant], range(NUM_OTHERS))
    assert any(outcome.findings for outcome in run_seeds(seeds, mutant)), "look further: python -m tests.sim --mutant"
