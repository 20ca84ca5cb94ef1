import torch

from shared.engine.layers.overlap import can_overlap, launch_options


def test_nothing_overlaps_in_the_interpreter():
    assert not can_overlap(torch.device("cpu"))
    assert launch_options(overlap=False) == {}


def test_overlapping_kernels_are_launched_so():
    assert launch_options(overlap=True) == {"launch_pdl": True}
