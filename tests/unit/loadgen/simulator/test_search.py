import pytest

from loadgen.simulator.outcome import Interval, Outcome, interval
from loadgen.simulator.search import find_speed
from loadgen.simulator.sizing import Sizing, Split


@pytest.mark.parametrize("first", [0.1, 1.0, 3.0, 40.0])
def test_the_speed_at_which_attainment_falls_through_the_share_is_found(first):
    probed = []

    def attainment_at(speed):
        probed.append(speed)
        return 1 / (1 + (speed / 6) ** 4)  # 0.9 at 6 / 3 ** 0.5

    found = find_speed(attainment_at, 0.9, first)
    assert found.is_bracketed
    assert found.speed == pytest.approx(6 / 3**0.5, rel=0.01)
    assert [probe.speed for probe in found.probes] == probed
    assert len(probed) <= 14


def test_a_share_that_is_never_crossed_is_said_so():
    assert not find_speed(lambda _: 1.0, 0.9, 1.0).is_bracketed
    assert not find_speed(lambda _: 0.0, 0.9, 1.0).is_bracketed


def test_a_step_in_attainment_is_closed_in_on():
    found = find_speed(lambda speed: 1.0 if speed < 2 else 0.0, 0.9, 0.5)
    assert found.speed == pytest.approx(2, rel=0.02)


def outcome(attainment) -> Outcome:
    return Outcome(10, 1.0, attainment, (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), 0.0, 0, 0, 0, 0, 0, 0.5, 0.5)


def sizing(capacity, max_workers=64):
    """Attainment falls with the load of the fuller role; `capacity`: (prefill, decode) workers that just do."""
    simulated = []

    def simulate(split):
        simulated.append(split)
        load = max(capacity[0] / split.num_prefill, capacity[1] / split.num_decode)
        return outcome(min(1.0, 0.9 / load))

    return Sizing(simulate, 0.9, max_workers), simulated


@pytest.mark.parametrize("capacity", [(1, 1), (3, 2), (1, 6), (9, 2), (5, 5), (20, 4)])
def test_the_fewest_workers_that_do_are_found_with_their_split(capacity):
    search, simulated = sizing(capacity)
    plan = search.plan()
    assert plan.chosen.split == Split(*capacity)
    assert len(simulated) == len(set(simulated)), "nothing is simulated twice"
    if sum(capacity) > 2:
        assert plan.best_of_fewer.split.num == sum(capacity) - 1
        assert plan.best_of_fewer.outcome.attainment < 0.9
    else:
        assert plan.best_of_fewer is None


def test_too_few_workers_are_said_so():
    search, _ = sizing((20, 20), max_workers=16)
    plan = search.plan()
    assert plan.chosen is None
    assert plan.best_of_fewer.split == Split(8, 8)


def test_an_interval_of_few_seeds_is_wide():
    assert interval([3.0]) == Interval(3.0, 0.0)
    of_three = interval([1.0, 2.0, 3.0])
    assert (of_three.mean, of_three.half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert str(of_three) == "2±2.5"
