"""Where an edge puts the requests that it accepts."""

from itertools import count
from types import SimpleNamespace

import pytest

from services.stream_out.requests import Requests
from shared.request import NUM_REQUEST_PARTITIONS, partition_of


@pytest.mark.parametrize(
    ("owned", "used"),
    [
        ([*range(16)], {0, 8}),
        ([1, 2, 3, 7, 9], {1, 7}),
        ([3, 4, 5], {3, 5}),
        ([3, 4], {3, 4}),
        ([11], {11}),
        ([], {*range(NUM_REQUEST_PARTITIONS)}),
    ],
)
def test_an_edge_uses_two_partitions_that_it_reads_or_any_if_it_reads_none(owned, used):
    numbers = count()
    requests = Requests(SimpleNamespace(owned_partitions=owned), draw_name=lambda: f"{next(numbers):032x}")
    assert {partition_of(requests._draw_request_id()) for _ in range(200)} == used
