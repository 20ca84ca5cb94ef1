"""The CPU's copies by torch against plain indexing, and Triton's kernels against torch's: here in the interpreter, on
a GPU for real.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.blocks import PAGE_TOKENS
from shared.kv.copy import PageCopier
from shared.kv.copy_kernels import MAX_QUEUED, TritonCopies
from shared.kv.copy_reference import TorchCopies
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes

NUM_PAGES = 8
NUM_LAYERS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSSY = (WireFormat.INT8, WireFormat.INT4)
STEPS = {WireFormat.INT8: 255, WireFormat.INT4: 15}
BFLOAT16_STEP = 2**-7
"""Between neighbouring bfloat16 numbers, relative to their size, at most."""


def a_cache(dtype="float32", device="cpu", head_dim=8, num_kv_heads=2, num_pages=NUM_PAGES, seed=0):
    layout = KvLayout("m", num_layers=NUM_LAYERS, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    cache = PagedCache(layout, num_pages, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    channels = 3 * torch.randn(layout.page_shape[-2:], generator=generator)
    cache.pages.copy_(torch.randn(cache.pages.shape, generator=generator) + channels)
    return cache


def a_run(cache, fmt, num_pages, layers):
    num_bytes = packed_bytes(cache.layout, fmt, num_pages, layers.num_layers)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=cache.device)


def packed(copier, cache, pages, layers, fmt, last_tokens=PAGE_TOKENS):
    run = a_run(cache, fmt, len(pages), layers)
    copier.pack(pages, layers, fmt, run, last_tokens=last_tokens)
    return run


def sent(cache, fmt, last_tokens=PAGE_TOKENS):
    """Page 0 of `cache` as it arrives, all layers."""
    layers = LayerSpan(0, NUM_LAYERS)
    arrived = PagedCache(cache.layout, 1, cache.device)
    run = packed(PageCopier(cache, 1), cache, [0], layers, fmt, last_tokens)
    PageCopier(arrived, 1).unpack(run, [0], layers, fmt)
    return arrived.pages[0]


spans = st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(1, NUM_LAYERS)).filter(lambda ends: ends[0] < ends[1])


@given(st.permutations(range(NUM_PAGES)), st.integers(0, NUM_PAGES), spans, st.sampled_from(["float32", "bfloat16"]))
@settings(deadline=None)
def test_native_pages_lie_in_the_order_asked_for(pages, num_pages, span, dtype):
    cache, layers = a_cache(dtype), LayerSpan(*span)
    run = packed(PageCopier(cache, NUM_PAGES), cache, pages[:num_pages], layers, WireFormat.NATIVE)
    expected = cache.pages[pages[:num_pages], layers.first : layers.end]
    assert torch.equal(run.view(cache.pages.dtype), expected.flatten())


@given(st.permutations(range(NUM_PAGES)), st.permutations(range(NUM_PAGES)), st.integers(0, NUM_PAGES), spans)
@settings(deadline=None)
def test_unpacking_undoes_packing_and_touches_nothing_else(taken, placed, num_pages, span):
    source, cache, layers = a_cache(seed=1), a_cache(seed=2), LayerSpan(*span)
    expected = cache.pages.clone()
    expected[placed[:num_pages], layers.first : layers.end] = source.pages[taken[:num_pages], layers.first : layers.end]
    run = packed(PageCopier(source, NUM_PAGES), source, taken[:num_pages], layers, WireFormat.NATIVE)
    PageCopier(cache, NUM_PAGES).unpack(run, placed[:num_pages], layers, WireFormat.NATIVE)
    assert torch.equal(cache.pages, expected)


@pytest.mark.parametrize("fmt", LOSSY)
def test_unpacking_a_lossy_format_touches_only_what_is_named(fmt):
    source, cache, layers = a_cache(seed=1), a_cache(seed=2), LayerSpan(1, 2)
    expected = cache.pages.clone()
    expected[[2, 7], 1] = source.pages[[6, 1], 1]
    run = packed(PageCopier(source, 2), source, [6, 1], layers, fmt)
    PageCopier(cache, 2).unpack(run, [2, 7], layers, fmt)
    changed = torch.zeros_like(cache.pages, dtype=torch.bool)
    changed[[2, 7], 1] = True
    assert torch.equal(cache.pages[~changed], expected[~changed])
    assert (cache.pages - expected).abs().max() < 1


@given(st.integers(0, 2**32), st.floats(-30, 10), st.integers(1, PAGE_TOKENS), st.sampled_from(LOSSY))
@settings(deadline=None)
def test_an_error_is_at_most_half_a_step_of_what_is_coded_together(seed, exponent, num_tokens, fmt):
    cache = a_cache(num_pages=1, seed=seed)
    cache.pages.mul_(2**exponent)
    valid = cache.pages[0][:, :, :num_tokens]
    errors = (sent(cache, fmt, num_tokens)[:, :, :num_tokens] - valid).abs()
    # Zero and scale are float16: the zero lies at most 2^-10 below the least value, the scale 2^-10 above what it
    # would have to be; below 2^-14 both are in steps of 2^-24.
    keys, values = valid[:, 0], valid[:, 1]
    k_low = keys.amin(1, keepdim=True)
    k_range = keys.amax(1, keepdim=True) - k_low + k_low.abs() * 2**-10 + 2**-23
    assert (errors[:, 0] <= half_a_step(k_range, STEPS[fmt], keys)).all()
    if fmt is WireFormat.INT8:
        v_range = 2 * values.abs().amax(-1, keepdim=True)
        assert (errors[:, 1] <= half_a_step(v_range, 254, values)).all()
    else:
        v_low = values.amin(-1, keepdim=True)
        v_range = values.amax(-1, keepdim=True) - v_low + v_low.abs() * 2**-10 + 2**-23
        assert (errors[:, 1] <= half_a_step(v_range, 15, values)).all()


def half_a_step(value_range, num_steps, values):
    scale = value_range / num_steps * (1 + 2**-10) + 2**-24
    return scale / 2 + values.abs() * 2**-22


@pytest.mark.parametrize("fmt", LOSSY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_bias_of_one_channel_costs_the_others_nothing(fmt, dtype):
    cache = a_cache(dtype, num_pages=1)
    without = sent(cache, fmt).clone()
    cache.pages[0, :, 0, :, :, 3] += 900
    biased = sent(cache, fmt)
    assert torch.equal(biased[..., :3], without[..., :3])
    assert torch.equal(biased[..., 4:], without[..., 4:])
    error = (biased[:, 0, ..., 3].float() - cache.pages[0, :, 0, ..., 3].float()).abs().max()
    # The range of about 6 begins at a multiple of 0.5 below it; bfloat16 itself has steps of 4 there.
    assert error <= 7 / STEPS[fmt] / 2 + (2 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("fmt", LOSSY)
def test_a_constant_channel_arrives_unchanged(fmt):
    cache = a_cache("bfloat16", num_pages=1)
    cache.pages[0, :, 0, ..., 2] = -37.25
    cache.pages[0, :, 0, ..., 5] = 0
    arrived = sent(cache, fmt)[:, 0]
    assert (arrived[..., 2] == -37.25).all()
    assert (arrived[..., 5] == 0).all()


@pytest.mark.parametrize("fmt", LOSSY)
def test_a_page_of_zeros_arrives_as_zeros(fmt):
    cache = a_cache(num_pages=1)
    cache.pages.zero_()
    assert not sent(cache, fmt).any()


@pytest.mark.parametrize("fmt", LOSSY)
def test_values_below_the_range_of_float16_saturate(fmt):
    cache = a_cache(num_pages=1)
    cache.pages[0, 0, 0, 5, 0, 1] = -1e9
    cache.pages[0, 0, 0, 6, 0, 2] = 1e9
    cache.pages[0, 0, 1, 7, 0, 3] = 1e9
    arrived = sent(cache, fmt)
    assert arrived.isfinite().all()
    assert arrived[0, 0, 5, 0, 1] == -65504
    steps = STEPS[fmt]
    assert arrived[0, 0, 6, 0, 2] == pytest.approx(steps * 65504, rel=0.01)
    assert arrived[0, 1, 7, 0, 3] == pytest.approx((127 if fmt is WireFormat.INT8 else 15) * 65504, rel=0.01)


@pytest.mark.parametrize("fmt", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_comes_out_as_none(fmt, bad):
    cache = a_cache(num_pages=1)
    cache.pages[0, 1, 0, 5, 0, 1] = bad
    cache.pages[0, 1, 1, 9, 1, 2] = bad
    arrived = sent(cache, fmt)
    poisoned = torch.zeros_like(arrived, dtype=torch.bool)
    poisoned[1, 0, :, 0, 1] = True
    poisoned[1, 1, 9, 1, :] = True
    assert torch.equal(arrived.isnan(), poisoned)
    assert arrived[~poisoned].isfinite().all()


@pytest.mark.parametrize("fmt", LOSSY)
def test_tokens_behind_the_last_valid_one_leave_no_trace(fmt):
    cache, other = a_cache(num_pages=1), a_cache(num_pages=1)
    other.pages[0, :, :, 10:] = float("nan")
    arrived = sent(other, fmt, last_tokens=10)
    assert torch.equal(arrived, sent(cache, fmt, last_tokens=10))
    assert arrived.isfinite().all()
    assert torch.equal(arrived[:, :, 10:], arrived[:, :, 9:10].expand(-1, -1, PAGE_TOKENS - 10, -1, -1))


def test_only_the_last_page_is_cut():
    cache, layers = a_cache(), LayerSpan(0, 1)
    copier = PageCopier(cache, 2)
    whole = packed(copier, cache, [4, 5], layers, WireFormat.INT8)
    cut = packed(copier, cache, [4, 5], layers, WireFormat.INT8, last_tokens=1)
    half = whole.numel() // 2
    assert torch.equal(cut[:half], whole[:half])
    assert not torch.equal(cut[half:], whole[half:])


@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(16, 3), (24, 1), (64, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", WireFormat)
def test_kernels_do_what_torch_does(fmt, dtype, head_dim, num_kv_heads):
    pages, layers, last_tokens = (3, 0), LayerSpan(1, 3), 37
    on_cpu = a_cache(dtype, "cpu", head_dim, num_kv_heads, num_pages=4)
    on_device = a_cache(dtype, DEVICE, head_dim, num_kv_heads, num_pages=4)
    for cache in (on_cpu, on_device):
        cache.pages[0, 1, 0, 3, 0, 2] = -7e4
        cache.pages[0, 1, 1, 3, 0, 2] = 7e4
        cache.pages[3, 1, 0, :, 0, 5] = 900
        cache.pages[3, 1, 0, :, 0, 6] = 0
        cache.pages[3, 2] *= 1e-6
        cache.pages[0, 2] = 0
        cache.pages[0, :, :, 40] = float("nan")
    expected, run = a_run(on_cpu, fmt, 2, layers), a_run(on_device, fmt, 2, layers)
    torch_copies, kernels = TorchCopies(on_cpu), TritonCopies(on_device, 2)
    if fmt is WireFormat.NATIVE:
        last_tokens = PAGE_TOKENS
    torch_copies.pack(pages, layers, fmt, expected, last_tokens)
    kernels.pack(pages, layers, fmt, run, last_tokens)
    assert torch.equal(run.cpu(), expected)
    torch_copies.unpack(expected, (1, 2), layers, fmt)
    kernels.unpack(run, (1, 2), layers, fmt)
    if dtype == "bfloat16" and DEVICE.type == "cpu" and fmt is not WireFormat.NATIVE:
        # The interpreter cuts float32 off where hardware rounds to bfloat16.
        torch.testing.assert_close(on_device.pages, on_cpu.pages, rtol=BFLOAT16_STEP, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(on_device.pages.cpu(), on_cpu.pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # the interpreter's numpy
def test_kernels_hide_no_nan(fmt, bad):
    cache, layers = a_cache(device=DEVICE, head_dim=16, num_kv_heads=1, num_pages=2), LayerSpan(0, 1)
    cache.pages[0, 0, 0, 5, 0, 1] = bad
    cache.pages[0, 0, 1, 39, 0, 2] = bad
    run = a_run(cache, fmt, 1, layers)
    kernels = TritonCopies(cache, 1)
    kernels.pack((0,), layers, fmt, run, PAGE_TOKENS)
    kernels.unpack(run, (1,), layers, fmt)
    poisoned = torch.zeros_like(cache.pages[1], dtype=torch.bool)
    poisoned[0, 0, :, 0, 1] = True
    poisoned[0, 1, 39, 0, :] = True
    assert torch.equal(cache.pages[1].isnan(), poisoned)


def test_warming_up_changes_no_page():
    cache = a_cache(device=DEVICE, head_dim=16)
    before = cache.pages.clone()
    TritonCopies(cache, 4).warm_up()
    PageCopier(cache, 4).warm_up()
    assert torch.equal(cache.pages, before)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
def test_the_very_first_copy_is_on_the_stream_too():
    cache, layers, stream = a_cache(device=DEVICE), LayerSpan(0, NUM_LAYERS), torch.cuda.Stream()
    run = a_run(cache, WireFormat.NATIVE, 1, layers)
    packed(PageCopier(cache, 1), cache, [0], layers, WireFormat.NATIVE)  # compiles, which takes longer than the sleep
    copier = PageCopier(cache, 1, stream)  # allocates, which waits for the device
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)
    copier.pack([0], layers, WireFormat.NATIVE, run)
    torch.cuda.default_stream().synchronize()
    assert not stream.query()
    assert not run.any()


def test_more_copies_than_may_be_queued_keep_their_page_numbers():
    cache, layers = a_cache(device=DEVICE, head_dim=16, num_kv_heads=1), LayerSpan(0, NUM_LAYERS)
    kernels = TritonCopies(cache, 2)
    pages = [(index % NUM_PAGES, (index + 3) % NUM_PAGES) for index in range(2 * MAX_QUEUED)]
    runs = [a_run(cache, WireFormat.NATIVE, 2, layers) for _ in pages]
    for pair, run in zip(pages, runs, strict=True):
        kernels.pack(pair, layers, WireFormat.NATIVE, run, PAGE_TOKENS)
    for pair, run in zip(pages, runs, strict=True):
        assert torch.equal(run.view(cache.pages.dtype), cache.pages[list(pair)].flatten())


@pytest.mark.parametrize("page", [-1, NUM_PAGES])
@pytest.mark.parametrize("fmt", WireFormat)
def test_a_page_outside_the_cache_is_refused(page, fmt):
    cache, layers = a_cache(), LayerSpan(0, 1)
    copier, run = PageCopier(cache, 2), a_run(cache, fmt, 2, layers)
    with pytest.raises(ValueError, match=f"page {page} is outside the cache of 8 pages"):
        copier.pack([0, page], layers, fmt, run)
    with pytest.raises(ValueError, match=f"page {page} is outside the cache of 8 pages"):
        copier.unpack(run, [0, page], layers, fmt)


@pytest.mark.parametrize("span", [(-1, 1), (0, NUM_LAYERS + 1), (1, 1), (2, 1)])
def test_layers_outside_the_cache_are_refused(span):
    cache = a_cache()
    copier, run = PageCopier(cache, 2), a_run(cache, WireFormat.NATIVE, 1, LayerSpan(0, 1))
    with pytest.raises(ValueError, match="are outside the cache of 3"):
        copier.pack([0], LayerSpan(*span), WireFormat.NATIVE, run)
    with pytest.raises(ValueError, match="are outside the cache of 3"):
        copier.unpack(run, [0], LayerSpan(*span), WireFormat.NATIVE)


@pytest.mark.parametrize("fmt", WireFormat)
def test_a_run_of_another_length_is_refused(fmt):
    cache, layers = a_cache(), LayerSpan(0, 2)
    copier, run = PageCopier(cache, 3), a_run(cache, fmt, 3, layers)
    with pytest.raises(ValueError, match="do not fill"):
        copier.pack([0, 1], layers, fmt, run)
    with pytest.raises(ValueError, match="do not fill"):
        copier.unpack(run, [0, 1], layers, fmt)


def test_a_run_of_another_dtype_or_with_gaps_is_refused():
    cache, layers = a_cache(), LayerSpan(0, 1)
    copier, run = PageCopier(cache, 1), a_run(cache, WireFormat.NATIVE, 1, layers)
    for wrong in (run.view(torch.int8), run.repeat(2)[::2]):
        with pytest.raises(ValueError, match="contiguous uint8"):
            copier.pack([0], layers, WireFormat.NATIVE, wrong)
        with pytest.raises(ValueError, match="contiguous uint8"):
            copier.unpack(wrong, [0], layers, WireFormat.NATIVE)


def test_a_run_that_begins_between_two_words_is_refused_by_the_kernels():
    cache, layers = a_cache(device=DEVICE), LayerSpan(0, 1)
    run = torch.zeros(cache.layout.layer_bytes + 8, dtype=torch.uint8, device=DEVICE)[8:]
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        TritonCopies(cache, 1).pack((0,), layers, WireFormat.NATIVE, run, PAGE_TOKENS)


def test_two_sources_for_one_page_are_refused():
    cache, layers = a_cache(), LayerSpan(0, 1)
    with pytest.raises(ValueError, match="twice"):
        PageCopier(cache, 2).unpack(a_run(cache, WireFormat.NATIVE, 2, layers), [1, 1], layers, WireFormat.NATIVE)


def test_more_pages_than_foreseen_are_refused():
    cache, layers = a_cache(), LayerSpan(0, 1)
    with pytest.raises(ValueError, match="3 pages are more than 2"):
        PageCopier(cache, 2).pack([0, 1, 2], layers, WireFormat.NATIVE, a_run(cache, WireFormat.NATIVE, 3, layers))


@pytest.mark.parametrize("last_tokens", [0, PAGE_TOKENS + 1])
def test_a_last_page_without_tokens_or_with_too_many_is_refused(last_tokens):
    cache, layers = a_cache(), LayerSpan(0, 1)
    with pytest.raises(ValueError, match="last page"):
        packed(PageCopier(cache, 1), cache, [0], layers, WireFormat.INT8, last_tokens)
