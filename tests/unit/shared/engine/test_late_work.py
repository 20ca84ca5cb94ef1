"""What comes too late is counted, and named."""

import pytest
import torch
from triton import knobs

from shared.engine.graphs import StepGraphs
from shared.engine.late_work import LateWork, LateWorkCounter


@pytest.fixture
def told(monkeypatch):
    """What another hook of Triton's was told."""
    told = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **kwargs: told.append(kwargs))
    return told


def test_kernels_compiled_since_the_start_are_named_and_others_are_told_too(told):
    counter = LateWorkCounter(torch.device("cpu"), StepGraphs())
    knobs.runtime.jit_post_compile_hook(repr="early", key=1)
    assert counter.read() == LateWork(1, 0, 0, ("early",))
    counter.restart()
    assert counter.read() == LateWork(0, 0, 0)
    knobs.runtime.jit_post_compile_hook(repr="late", key=2)
    assert counter.read() == LateWork(1, 0, 0, ("late",))
    assert told == [{"repr": "early", "key": 1}, {"repr": "late", "key": 2}]
