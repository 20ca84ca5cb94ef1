import asyncio

from services.ingest.hands import Hands
from services.ingest.parked import Parked
from services.ingest.work import InHand
from shared.wire.to_ingest import LogPosition


def in_hand(offset=0, num_bytes=10, partition=0):
    return InHand("ingest", LogPosition(partition, offset), num_bytes)


async def test_who_finds_no_room_waits_for_records_or_bytes():
    for hands, num in ((Hands(3, 10**6), 3), (Hands(10**6, 25), 3)):
        for _ in range(num):
            assert not hands.full
            await hands.take(in_hand())
        assert hands.full
        waiting = asyncio.create_task(hands.take(in_hand()))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        hands.give_back(in_hand())
        await waiting
        hands.add(in_hand())
        assert hands.full


def test_the_earliest_deadline_is_taken_up_when_there_is_room_and_a_late_one_at_once():
    parked = Parked()
    for offset, deadline_s in enumerate((30.0, 10.0, 20.0, 0.0)):
        parked.add(in_hand(offset), "t", deadline_s)
    assert parked.take(5.0, room=False).position.offset == 3, "it is not known when that one is late"
    assert parked.take(5.0, room=False) is None
    assert parked.take(5.0, room=True).position.offset == 1
    assert parked.take(25.0, room=False).position.offset == 2
    assert (len(parked), parked.take(25.0, room=False)) == (1, None)


def test_tenants_take_turns_however_many_one_has_and_however_soon_its_are_due():
    parked = Parked()
    for offset in range(100):
        parked.add(in_hand(offset), "many", 1e6)
    for offset in range(100, 103):
        parked.add(in_hand(offset), "few", 2e6)
    taken = [parked.take(0.0, room=True).position.offset for _ in range(8)]
    assert taken == [0, 100, 1, 101, 2, 102, 3, 4]
    parked.add(in_hand(200), "few", 5.0)
    assert parked.take(5.0, room=False).position.offset == 200
    assert (parked.take(5.0, room=False), len(parked)) == (None, 95)
    for _ in range(95):
        assert parked.take(5.0, room=True) is not None
    assert parked.take(1e9, room=True) is None


def test_what_is_parked_of_a_lost_partition_goes_with_it():
    parked = Parked()
    for offset in range(9):
        parked.add(in_hand(offset, partition=offset % 3), "one", -offset)
    parked.add(in_hand(9, partition=1), "another", 0.0)
    assert sorted(each.position.offset for each in parked.drop({1, 2})) == [1, 2, 4, 5, 7, 8, 9]
    assert len(parked) == 3
    assert [parked.take(-100.0, room=True).position.offset for _ in range(3)] == [6, 3, 0]
    assert parked.take(1e9, room=True) is None
    assert parked.drop({0}) == []
