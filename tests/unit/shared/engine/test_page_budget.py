import pytest
import torch

from shared.engine.page_budget import CONTEXT_BYTES, DeviceMemory, measure_memory, pages_that_fit
from shared.errors import StartupError

GIB = 2**30
PAGE_BYTES = 8 * 2**20


def test_pages_fill_the_share_beside_weights_step_and_buffers():
    memory = DeviceMemory(total_bytes=140 * GIB, free_bytes=120 * GIB, peak_bytes=18 * GIB)
    num_pages = pages_that_fit(memory, PAGE_BYTES, share=0.9, reserved_bytes=3 * GIB)
    taken = num_pages * PAGE_BYTES + 18 * GIB + 3 * GIB + CONTEXT_BYTES
    assert 0 <= 126 * GIB - taken < PAGE_BYTES


def test_pages_take_no_more_than_others_left_free():
    memory = DeviceMemory(total_bytes=140 * GIB, free_bytes=20 * GIB, peak_bytes=18 * GIB)
    assert pages_that_fit(memory, PAGE_BYTES, share=0.9, reserved_bytes=3 * GIB) == 17 * GIB // PAGE_BYTES


def test_two_workers_of_half_the_share_fit_one_gpu():
    first = DeviceMemory(total_bytes=140 * GIB, free_bytes=121 * GIB, peak_bytes=18 * GIB)
    half = pages_that_fit(first, PAGE_BYTES, share=0.45, reserved_bytes=3 * GIB)
    left = 121 * GIB - half * PAGE_BYTES - 3 * GIB - (18 * GIB + CONTEXT_BYTES)
    second = DeviceMemory(total_bytes=140 * GIB, free_bytes=left, peak_bytes=18 * GIB)
    assert pages_that_fit(second, PAGE_BYTES, share=0.45, reserved_bytes=3 * GIB) == half


@pytest.mark.parametrize(("free", "share"), [(4, 0.9), (120, 0.1)])
def test_a_gpu_without_room_is_refused_with_the_numbers(free, share):
    memory = DeviceMemory(total_bytes=140 * GIB, free_bytes=free * GIB, peak_bytes=18 * GIB)
    with pytest.raises(StartupError, match=r"150\.3 GB.*19\.3 GB.*gpu_memory_share"):
        pages_that_fit(memory, PAGE_BYTES, share=share, reserved_bytes=4 * GIB)


def test_memory_that_the_largest_step_gave_back_does_not_count_as_free(monkeypatch):
    device = torch.device("cuda")
    ran = []
    answers = {
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "mem_get_info": (100 * GIB, 140 * GIB),
        "max_memory_reserved": 20 * GIB,
        "memory_reserved": 17 * GIB,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, answer=answer: answer)
    assert measure_memory(lambda: ran.append(1), device) == DeviceMemory(140 * GIB, 97 * GIB, 20 * GIB)
    assert ran == [1]
