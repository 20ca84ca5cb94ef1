"""Only what lies below everything unfinished is committed."""

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.low_water import LowWater


def test_it_waits_for_the_oldest():
    low_water = LowWater(5)
    assert low_water.offset == 5
    for offset in (5, 6, 8):
        low_water.begin(offset)
    low_water.end(6)
    assert low_water.offset == 5
    low_water.end(5)
    assert low_water.offset == 8
    low_water.end(8)
    assert low_water.offset == 9


@given(st.permutations(range(20)))
def test_any_order_of_ends_gives_the_lowest_unfinished(order):
    low_water = LowWater(0)
    for offset in range(20):
        low_water.begin(offset)
    unfinished = set(range(20))
    for offset in order:
        low_water.end(offset)
        unfinished.discard(offset)
        assert low_water.offset == min(unfinished, default=20)
