import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.wire_format import LayerSpan
from shared.transfer.cover import Cover

NUM_ENTRIES, NUM_LAYERS = 5, 4
bounds = st.integers(-1, 6)


@given(st.lists(st.tuples(bounds, bounds, bounds, bounds), max_size=20))
def test_each_pair_is_covered_once_or_not_at_all(parts):
    cover, covered = Cover(NUM_ENTRIES, NUM_LAYERS), set()
    for start, end, first, last in parts:
        pairs = {(entry, layer) for entry in range(start, end) for layer in range(first, last)}
        inside = all(0 <= entry < NUM_ENTRIES and 0 <= layer < NUM_LAYERS for entry, layer in pairs)
        if pairs and inside and not pairs & covered:
            cover.add(start, end, LayerSpan(first, last))
            covered |= pairs
        else:
            with pytest.raises(ValueError):
                cover.add(start, end, LayerSpan(first, last))
        assert cover.num_left == NUM_ENTRIES * NUM_LAYERS - len(covered)


def test_of_nothing_nothing_is_left():
    assert Cover(0, 4).num_left == 0
