import random
from collections import Counter, deque
from dataclasses import replace
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.policy.line import GIVEN_UP_AFTER_S, WAITS_LONG_S, Blocked, Claim, Line
from shared.request import Priority

INTERACTIVE, STANDARD, BATCH = Priority


def claim(tenant="t", num_tokens=100.0, deadline_s=600.0, priority=STANDARD, resumed=False):
    return Claim(priority, tenant, deadline_s, num_tokens, resumed)


def line_of(**claims):
    line = Line()
    for name, each in claims.items():
        line.add(name, each)
    return line


def place_all(line):
    """In which order they go, if there is room for all."""
    order = []
    while (entry := line.first()) is not None:
        line.place(entry)
        order.append(entry.item)
    return order


def test_classes_go_in_their_order_and_who_ran_before_goes_first():
    line = line_of(
        b=claim(priority=BATCH),
        lost_b=claim(priority=BATCH, resumed=True),
        s=claim(),
        i=claim(priority=INTERACTIVE),
        lost=claim(resumed=True),
        lost_later=claim(priority=INTERACTIVE, resumed=True, deadline_s=1),
    )
    assert (len(line), line.num_batch, line.num_standard) == (6, 2, 1)
    assert line.num_of == {INTERACTIVE: 2, STANDARD: 2, BATCH: 2}
    assert place_all(line) == ["lost", "lost_later", "i", "s", "lost_b", "b"]
    assert (len(line), line.num_batch, line.num_standard, line.first(), line.late(1e12)) == (0, 0, 0, None, None)
    assert line.num_of == {INTERACTIVE: 0, STANDARD: 0, BATCH: 0}


def test_inside_a_tenant_the_earliest_deadline_goes_first_and_of_equal_ones_who_came_first():
    line = line_of(a=claim(deadline_s=30), b=claim(deadline_s=20), c=claim(deadline_s=30), d=claim(deadline_s=20))
    assert place_all(line) == ["b", "d", "a", "c"]


def test_a_tenant_with_many_does_not_hold_up_one_with_few():
    line = Line()
    for number in range(50):
        line.add(f"many{number}", claim("many"))
    line.add("few", claim("few"))
    assert place_all(line).index("few") <= 1


def test_tokens_are_shared_and_not_requests():
    line = Line()
    for _ in range(100):
        line.add("long", claim("long", 900.0))
        line.add("short", claim("short", 100.0))
    first = place_all(line)[:100]
    assert Counter(first)["short"] == pytest.approx(90, abs=2)


def test_who_waited_for_nothing_saves_up_no_credit():
    line = Line()
    line.add("early", claim("idle"))
    for number in range(100):
        line.add(f"busy{number}", claim("busy"))
    for _ in range(60):
        line.place(line.first())
    for number in range(20):
        line.add(f"idle{number}", claim("idle"))
    after = [name[:4] for name in place_all(line)[:20]]
    assert Counter(after) == {"idle": 10, "busy": 10}


def test_whose_tenant_took_much_pays_for_it_though_it_left_the_line():
    line = line_of(a=claim("greedy", 5000.0), b=claim("other", 10.0))
    while len(line):
        line.place(line.first())
    line.add("other", claim("other", 10.0))
    line.add("greedy", claim("greedy", 10.0))
    assert place_all(line)[0] == "other"


def test_new_tenants_again_and_again_do_not_hold_up_one_that_waits():
    line = line_of(old=claim("old"))
    for number in range(100):
        line.add(number, claim(f"new{number}"))
    assert place_all(line)[0] == "old"


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5000), min_size=2, max_size=6), st.integers(0, 10**6))
def test_tenants_that_always_wait_get_equal_tokens(sizes, seed):
    """Within twice the largest request."""
    draw = random.Random(seed)
    line, got = Line(), Counter()
    for tenant in range(len(sizes)):
        line.add(tenant, claim(str(tenant), sizes[tenant]))
    for _ in range(200):
        entry = line.first()
        tenant = entry.item
        line.add(tenant, claim(str(tenant), max(1, int(sizes[tenant] * draw.random()))))
        line.place(entry)
        got[tenant] += entry.claim.num_tokens
    assert max(got.values()) - min(got.values()) <= 2 * max(sizes)


def test_late_ones_are_found_anywhere_and_leave_uncharged():
    line = line_of(a=claim(deadline_s=50), b=claim("u", deadline_s=10, priority=BATCH), c=claim(deadline_s=5))
    assert line.late(4.9) is None
    gone = []
    while (entry := line.late(10)) is not None:
        line.leave(entry)
        gone.append(entry.item)
    assert gone == ["c", "b"]
    assert place_all(line) == ["a"]


def test_who_was_placed_is_kept_nowhere():
    line = Line()
    for number in range(5000):
        line.add(number, claim(f"t{number}", deadline_s=1e9 - number))
        line.place(line.first())
    assert len(line._deadlines) < 1100
    lane = line._lanes[STANDARD]
    assert len(lane._order) < 1100
    assert not lane._tenants


def test_tenants_that_do_not_wait_are_forgotten_if_they_are_too_many(monkeypatch):
    monkeypatch.setattr("shared.policy.line.MAX_IDLE_COUNTERS", 100)
    line = Line()
    for number in range(1000):
        line.add(number, claim(f"t{number}"))
        line.place(line.first())
        assert len(line._lanes[STANDARD]._idle) <= 101


# Overtaking


def test_something_small_goes_by_until_as_much_went_by_as_the_first_has_itself():
    line = line_of(big=claim(num_tokens=1000), half=claim(num_tokens=600, deadline_s=650))
    for number in range(20):
        line.add(number, claim(num_tokens=150, deadline_s=700 + number))
    passed = []
    while candidates := line.overtakers():
        passed.append(candidates[0].item)
        line.place(candidates[0])
    assert passed == [0, 1, 2, 3, 4, 5], "by their deadlines; a seventh would make it more than 1000"
    assert line.first().item == "big"


def test_batch_overtakes_nobody_but_batch():
    line = line_of(i=claim(num_tokens=1000, priority=INTERACTIVE), b=claim(num_tokens=1, priority=BATCH))
    assert line.overtakers() == []
    line.add("s", claim(num_tokens=1))
    assert [each.item for each in line.overtakers()] == ["s"]
    line = line_of(b=claim(num_tokens=1000, priority=BATCH), c=claim(num_tokens=1, priority=BATCH, deadline_s=700))
    assert [each.item for each in line.overtakers()] == ["c"]


def test_who_ran_before_is_overtaken_as_the_others_are():
    line = line_of(lost=claim(num_tokens=1000, resumed=True), s=claim(num_tokens=10))
    assert [each.item for each in line.overtakers()] == ["s"]
    line.place(line.overtakers()[0])
    assert line.first().num_tokens_passed == 10


class Workers:
    """Room for tokens; who runs ends some steps later."""

    def __init__(self, room):
        self.room, self.running, self.step = room, deque(), count()

    def fits(self, entry):
        return entry.claim.num_tokens <= self.room

    def take(self, entry, until):
        self.room -= entry.claim.num_tokens
        self.running.append((until, entry.claim.num_tokens))

    def end(self, now):
        for each in [each for each in self.running if each[0] <= now]:
            self.running.remove(each)
            self.room += each[1]


arrival = st.tuples(st.integers(1, 100), st.sampled_from("abc"), st.sampled_from([5.0, 50.0, 500.0]), st.integers(1, 9))


@settings(max_examples=30)
@given(st.lists(arrival, min_size=20, max_size=60), st.integers(0, 3))
def test_nobody_starves(arrivals, rush):
    """Whoever becomes the first is placed before more than its own size went by, and as soon as the others end."""
    workers, line = Workers(100.0), Line()
    waits, since = Counter(), {}
    coming = deque(arrivals)
    for now in range(10_000):
        for _ in range(rush + 1):
            if coming:
                size, tenant, deadline_s, _ = coming[0]
                line.add(coming.popleft(), claim(tenant, size, now + deadline_s))
        workers.end(now)
        while (first := line.first()) is not None:
            fitting = [entry for entry in (first, *line.overtakers()) if workers.fits(entry)]
            if not fitting:
                break
            line.place(fitting[0])
            workers.take(fitting[0], now + fitting[0].item[3])
            assert first.num_tokens_passed <= first.claim.num_tokens
        if first is None and not coming:
            return
        if first is not None:
            since.setdefault(first.number, now)
            waits[first.number] = now - since[first.number]
            # While it is first, rounds with nobody going by last no longer than the longest answer.
            assert waits[first.number] <= 10 * (1 + first.claim.num_tokens)
    raise AssertionError(f"{len(line)} wait for ever")


def test_ten_thousand_that_wait_are_dealt_with_one_by_one():
    line, draw = Line(), random.Random(4)
    for number in range(10_000):
        deadline_s, size = draw.uniform(0, 1e4), draw.randint(1, 9000)
        line.add(number, claim(f"t{draw.randint(0, 300)}", size, deadline_s, draw.choice(list(Priority))))
    for number in range(10_000):
        if number % 30 == 0 and line.overtakers():
            line.place(line.overtakers()[0])
        elif number % 3 == 1 and (late := line.late(number / 2)) is not None:
            line.leave(late)
        else:
            line.place(line.first())
    assert (len(line), line.num_urgent, line.num_batch) == (0, 0, 0)


def test_of_two_lines_the_first_that_waits_longest_for_room_holds_back_the_other_for_a_while():
    def blocked(for_s, priority=Priority.STANDARD, *, is_resumed=False):
        return Blocked.of(Claim(priority, "t", 0.0, 1.0, is_resumed), for_s)

    longer, shorter = blocked(WAITS_LONG_S + 1), blocked(WAITS_LONG_S)
    assert longer.holds_back(shorter)
    assert not shorter.holds_back(longer)
    assert not longer.holds_back(longer), "of two alike none waits for the other"
    assert not blocked(WAITS_LONG_S - 1).holds_back(blocked(0.0)), "it may find room in a moment"
    assert not blocked(GIVEN_UP_AFTER_S).holds_back(blocked(0.0))
    for above, below in pairwise([blocked(6.0, is_resumed=True), *(blocked(6.0, priority) for priority in Priority)]):
        assert above.holds_back(replace(below, for_s=50.0))
        assert not below.holds_back(replace(above, for_s=0.0))


def test_who_is_aside_has_no_turn_and_is_told_of_when_late():
    line = Line()
    for number, priority in enumerate((Priority.STANDARD, Priority.BATCH, Priority.STANDARD)):
        line.add(number, claim("t", 10, 100.0 + number, priority))
    first = line.first()
    line.set_aside(first)
    assert (len(line), line.num_urgent, line.num_batch, line.first().item) == (3, 1, 1, 2)
    assert line.oldest(is_batch=False).item == 2
    assert line.late(100.0) is first
    line.bring_back(first)
    assert (line.num_urgent, line.first(), line.oldest(is_batch=False)) == (2, first, first)
    line.set_aside(first)
    line.leave(first)
    assert (len(line), first.is_aside, line.late(100.0)) == (2, False, None)
    line.leave(line.first())
    assert (line.oldest(is_batch=False), line.oldest(is_batch=True).item) == (None, 1)
