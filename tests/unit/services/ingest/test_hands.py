import asyncio

from services.ingest.hands import Hands
from services.ingest.parked import Parked
from services.ingest.work import InHand
from shared.wire.to_ingest import LogPosition


def in_hand(offset=0, num_bytes=10):
    return InHand("ingest", LogPosition(0, offset), num_bytes)


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
        parked.add(in_hand(offset), deadline_s)
    assert parked.take(5.0, room=False).position.offset == 3, "it is not known when that one is late"
    assert parked.take(5.0, room=False) is None
    assert parked.take(5.0, room=True).position.offset == 1
    assert parked.take(25.0, room=False).position.offset == 2
    assert (len(parked), parked.take(25.0, room=False)) == (1, None)
