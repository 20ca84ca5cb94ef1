import pytest
import torch

from shared.kv import host_pages
from shared.kv.host_pages import PinnedPages
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache

LAYOUT = KvLayout("model", num_layers=2, num_kv_heads=1, head_dim=4, dtype="bfloat16")


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cache(num_pages=6, device="cpu"):
    paged = PagedCache(LAYOUT, num_pages, torch.device(device))
    paged.pages.view(torch.int16).copy_(torch.arange(paged.pages.numel()).view_as(paged.pages) % 30_000)
    return paged


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_copy_bytes", [100, LAYOUT.page_bytes, host_pages.MAX_COPY_BYTES])
def test_pages_come_back_bit_by_bit(monkeypatch, max_copy_bytes, device):
    monkeypatch.setattr(host_pages, "MAX_COPY_BYTES", max_copy_bytes)
    paged = cache(device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    before = paged.pages.clone()
    host = PinnedPages(paged, num_slots=5)
    assert (host.num_slots, host.page_bytes) == (5, LAYOUT.page_bytes)
    saved = host.save((1, 2, 3, 5), (0, 1, 4, 3))
    saved.synchronize()
    assert saved.query()
    paged.pages.zero_()
    if device == "cuda":
        torch.cuda.synchronize()
    copied = host.restore((4, 0, 1, 3), (3, 1, 2, 0))
    copied.synchronize()
    assert copied.query()
    assert paged.pages[[1, 2, 3, 0]].equal(before[[1, 2, 3, 5]])
    assert not paged.pages[4:].any()


def test_pages_side_by_side_go_together():
    runs = list(host_pages._runs((4, 5, 6, 8, 9), (0, 1, 2, 3, 5), page_bytes=10))
    assert runs == [(40, 0, 30), (80, 30, 10), (90, 50, 10)]


def test_no_copy_is_longer_than_it_may_be(monkeypatch):
    monkeypatch.setattr(host_pages, "MAX_COPY_BYTES", 16)
    assert list(host_pages._runs((1, 2), (3, 4), page_bytes=20)) == [(20, 60, 16), (36, 76, 16), (52, 92, 8)]


def test_as_many_pages_come_as_go():
    with pytest.raises(ValueError, match="2 pages are copied to 1"):
        PinnedPages(cache(), 2).save((0, 1), (0,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_copies_beside_its_host():
    paged = PagedCache(KvLayout("model", 32, 8, 128, "bfloat16"), 64, torch.device("cuda"))
    host = PinnedPages(paged, num_slots=64)
    assert host._host_bytes.is_pinned()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(3):
        saved = host.save(range(64), range(64))
        assert not saved.query(), "half a gigabyte was copied within the call"
        saved.synchronize()
        assert saved.query()
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocated
