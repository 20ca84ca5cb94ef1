from shared.bus.kafka_reader import STALL_S, WATCH_INTERVAL_S, Sign, StallWatch

STEP_S = 1.0
PATIENCE = int(STALL_S / STEP_S) + 1


def looks(signs):
    """What each look at the next sign of partition 7 finds, with STEP_S of polling before each."""
    watch = StallWatch()
    found = []
    for sign in signs:
        assert watch.is_due(STEP_S)
        found.append(watch.look({7: sign}))
    return found


def test_an_idle_partition_whose_fetches_are_answered_lives():
    assert not any(looks([Sign(5, answered_ms, behind=False) for answered_ms in range(3 * PATIENCE)]))


def test_a_busy_partition_lives_though_it_is_always_behind():
    assert not any(looks([Sign(position, position, behind=True) for position in range(3 * PATIENCE)]))


def test_a_partition_whose_fetches_are_not_answered_stalls():
    found = looks([Sign(5, 100, behind=False)] * (PATIENCE + 2))
    assert found == [[]] * (PATIENCE) + [[7]] * 2


def test_a_partition_that_is_behind_and_does_not_move_stalls():
    assert looks([Sign(5, answered_ms, behind=True) for answered_ms in range(PATIENCE + 1)])[-1] == [7]


def test_a_sign_of_life_starts_the_wait_anew():
    silent = [Sign(5, 100, behind=False)] * PATIENCE
    assert not any(looks([*silent, Sign(6, 100, behind=False), *silent[1:]]))


def test_only_polling_counts():
    watch = StallWatch()
    assert not watch.is_due(WATCH_INTERVAL_S / 2)
    assert watch.is_due(WATCH_INTERVAL_S / 2)
    watch.look({7: Sign(5, 100, behind=False)})
    assert not watch.is_due(0.0)
