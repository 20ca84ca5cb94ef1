import pytest
import torch

from shared.engine.layers import overlap
from shared.engine.layers.overlap import launch_options, overlaps


def test_nothing_overlaps_in_the_interpreter():
    assert not overlaps(1, torch.device("cpu"))
    assert launch_options(overlap=False) == {}


def test_overlapping_kernels_are_launched_so():
    assert launch_options(overlap=True) == {"launch_pdl": True}


@pytest.mark.parametrize(
    ("num_rows", "capability", "expected"), [(1, 9, True), (1, 10, True), (1, 8, False), (0, 9, False), (2, 9, False)]
)
def test_only_kernels_of_one_row_overlap_and_from_hopper_on(monkeypatch, num_rows, capability, expected):
    monkeypatch.setattr(overlap, "_major_capability", lambda _device: capability)
    assert overlaps(num_rows, torch.device("cuda", 0)) is expected
