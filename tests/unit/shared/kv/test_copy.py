import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.copy import gather_pages, scatter_pages
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache

NUM_PAGES = 8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def a_cache(dtype="float32", device="cpu"):
    layout = KvLayout(model_fingerprint="m", num_layers=2, num_kv_heads=1, head_dim=4, dtype=dtype)
    cache = PagedCache(layout, NUM_PAGES, torch.device(device))
    cache.pages.copy_(torch.rand(cache.pages.shape))
    return cache


def a_run(cache, num_pages):
    return torch.zeros(num_pages * cache.layout.page_bytes, dtype=torch.uint8, device=cache.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_pages_lie_in_the_order_asked_for(dtype, device):
    cache = a_cache(dtype, device)
    run = a_run(cache, 3)
    gather_pages(cache, [5, 0, 3], run)
    assert torch.equal(run.view(cache.pages.dtype).view(3, *cache.layout.page_shape), cache.pages[[5, 0, 3]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scattering_touches_only_the_pages_named(dtype, device):
    source, cache = a_cache(dtype, device), a_cache(dtype, device)
    expected = cache.pages.clone()
    expected[[2, 7]] = source.pages[[1, 6]]
    run = a_run(source, 2)
    gather_pages(source, [1, 6], run)
    scatter_pages(cache, run, [2, 7])
    assert torch.equal(cache.pages, expected)


@given(st.permutations(range(NUM_PAGES)), st.permutations(range(NUM_PAGES)), st.integers(0, NUM_PAGES))
def test_scatter_undoes_gather(taken, placed, num_pages):
    source, cache = a_cache(), a_cache()
    run = a_run(source, num_pages)
    gather_pages(source, taken[:num_pages], run)
    scatter_pages(cache, run, placed[:num_pages])
    for there, here in zip(taken[:num_pages], placed[:num_pages], strict=True):
        assert torch.equal(source.pages[there], cache.pages[here])


@pytest.mark.parametrize("page", [-1, NUM_PAGES])
def test_a_page_outside_the_cache_is_refused(page):
    cache = a_cache()
    with pytest.raises(ValueError, match=f"page {page} is outside the cache of 8 pages"):
        gather_pages(cache, [0, page], a_run(cache, 2))
    with pytest.raises(ValueError, match=f"page {page} is outside the cache of 8 pages"):
        scatter_pages(cache, a_run(cache, 2), [0, page])


def test_a_run_of_another_length_is_refused():
    cache = a_cache()
    with pytest.raises(ValueError, match="do not fill"):
        gather_pages(cache, [0, 1], a_run(cache, 3))


def test_two_sources_for_one_page_are_refused():
    cache = a_cache()
    with pytest.raises(ValueError, match="twice"):
        scatter_pages(cache, a_run(cache, 2), [1, 1])
