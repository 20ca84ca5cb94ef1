from collections import Counter

import pytest

from shared.blocks import BlockHash, BlockKey, name_of
from shared.kv.host_slots import HostSlots


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def filled(num_slots: int, *numbers: int, is_spare: bool = False) -> HostSlots:
    """Slots that hold the copies of these blocks, the first one used longest ago."""
    slots = HostSlots(num_slots)
    for number in numbers:
        put(slots, number, is_spare=is_spare)
    return slots


def put(slots: HostSlots, number: int, *, is_spare: bool = False) -> BlockHash | None:
    """Store a copy; the block that had to go for it."""
    taken = slots.take()
    assert taken is not None
    slot, dropped = taken
    slots.put(name(number), slot, is_spare=is_spare)
    slots.check((), ())
    return dropped


def test_it_never_holds_more_than_its_slots():
    slots = filled(3, 1, 2, 3, 4, 5)
    assert slots.num_used == 3
    assert [number for number in range(9) if name(number) in slots] == [3, 4, 5]


def test_spare_copies_go_before_kept_ones_and_the_least_recently_used_first():
    slots = filled(4, 1, 2, 3, 4)
    slots.spare(name(3))
    slots.spare(name(2))
    slots.keep(name(1))
    assert [put(slots, number) for number in (5, 6, 7, 8)] == [name(3), name(2), name(4), name(1)]


def test_a_spare_copy_whose_block_goes_from_the_device_is_kept():
    slots = filled(2, 1, 2, is_spare=True)
    slots.keep(name(1))
    assert put(slots, 3) == name(2)
    assert put(slots, 4) == name(1)


def test_find_gives_the_run_from_the_first_block_on():
    slots = filled(3, 1, 3)
    assert len(slots.find([name(1), name(2), name(3)])) == 1
    assert slots.find([name(2)]) == ()


def test_pinned_slots_are_not_taken():
    slots = filled(2, 1, 2)
    pinned = slots.pin([name(1), name(2)])
    slots.pin([name(1)])
    assert slots.take() is None
    slots.unpin(pinned)
    slots.check((), pinned[:1])
    assert slots.take() == (pinned[1], name(2))
    assert slots.take() is None


def test_who_looks_for_a_slot_does_not_meet_what_is_pinned_first():
    """A long conversation that comes back has the copies used least recently, thousands of them."""
    slots = filled(200, *range(1, 201))
    slots.pin([name(number) for number in range(1, 101)])
    slots._pins = CountedPins(slots._pins)
    assert [slots.take()[1] for _ in range(5)] == [name(number) for number in range(101, 106)]
    assert slots._pins.num_looks == 5


def test_of_a_run_that_was_pinned_the_last_block_goes_first():
    slots = filled(4, 1, 2, 3, 4)
    slots.unpin(slots.pin([name(1), name(2), name(3)]))
    assert [slots.take()[1] for _ in range(4)] == [name(4), name(3), name(2), name(1)]


class CountedPins(Counter):
    """Counts who looks whether a slot is pinned."""

    num_looks = 0

    def __contains__(self, slot):
        self.num_looks += 1
        return super().__contains__(slot)


def test_a_forgotten_block_frees_its_slot_when_nobody_reads_it():
    slots = filled(1, 1)
    pinned = slots.pin([name(1)])
    slots.forget(name(1))
    slots.forget(name(1))
    assert name(1) not in slots
    assert slots.take() is None
    slots.check((), pinned)
    slots.unpin(pinned)
    assert put(slots, 2) is None


def test_what_is_written_in_vain_is_free_again():
    slots = HostSlots(1)
    taken = slots.take()
    assert taken == (0, None)
    slots.check((0,), ())
    slots.give_back(0)
    slots.check((), ())


def test_changes_are_net():
    slots = filled(1, 1, 2)
    assert slots.take_changes() == ((name(2),), ())
    put(slots, 3)
    put(slots, 2)
    assert slots.take_changes() == ((), ())


def test_a_block_has_one_copy():
    slots = filled(2, 1)
    taken = slots.take()
    assert taken is not None
    with pytest.raises(ValueError, match="two copies"):
        slots.put(name(1), taken[0], is_spare=False)


def test_there_is_a_slot():
    with pytest.raises(ValueError, match="num_slots is 0"):
        HostSlots(0)


def test_check_notices_a_lost_slot():
    slots = HostSlots(2)
    slots.take()
    with pytest.raises(AssertionError, match="in two states or in none"):
        slots.check((), ())


def test_blocks_are_found_by_what_they_are_announced_as():
    keys = [BlockKey(BlockHash(bytes([number]) * 32)) for number in range(3)]
    slots = HostSlots(2)
    for key in keys:
        taken = slots.take()
        assert taken is not None
        slots.put(key, taken[0], is_spare=False)
    assert slots.find_named([name_of(key) for key in (keys[1], keys[2], keys[0])]) == (keys[1], keys[2])
