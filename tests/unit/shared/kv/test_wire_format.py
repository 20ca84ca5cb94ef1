import pytest

from shared.kv.layout import KvLayout
from shared.kv.wire_format import LayerSpan, Record, WireFormat, packed_bytes, page_formats


def a_layout(head_dim=128, num_kv_heads=8, dtype="bfloat16"):
    return KvLayout("m", num_layers=32, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_pages_travel_as_they_lie(dtype):
    layout = a_layout(dtype=dtype)
    assert packed_bytes(layout, WireFormat.NATIVE, 3, 32) == 3 * layout.page_bytes
    assert packed_bytes(layout, WireFormat.NATIVE, 3, 8) * 4 == 3 * layout.page_bytes


def test_sizes_by_hand():
    # 64 tokens of 128 channels; by channel two halves of a word for keys, by token one (INT4: two) for values.
    assert packed_bytes(a_layout(), WireFormat.INT8, 2, 3) == 2 * 3 * 8 * (2 * 64 * 128 + 128 * 4 + 64 * 2)
    assert packed_bytes(a_layout(), WireFormat.INT4, 2, 3) == 2 * 3 * 8 * (2 * 64 * 64 + 128 * 4 + 64 * 4)


def test_sizes_do_not_depend_on_the_dtype_of_the_cache():
    for fmt in (WireFormat.INT8, WireFormat.INT4):
        assert packed_bytes(a_layout(), fmt, 5, 7) == packed_bytes(a_layout(dtype="float32"), fmt, 5, 7)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ratios_to_bfloat16_of_1024_tokens(head_dim):
    layout = a_layout(head_dim, num_kv_heads=3)

    def ratio(fmt):
        pages = [packed_bytes(layout, page_formats(fmt, index), 1, 32) for index in range(16)]
        return sum(pages) / (16 * layout.page_bytes)

    assert ratio(WireFormat.NATIVE) == 1
    assert ratio(WireFormat.INT8) <= 0.53
    assert ratio(WireFormat.INT4) <= 0.30


def test_the_first_page_of_an_int4_prompt_is_int8():
    assert page_formats(WireFormat.INT4, 0) is WireFormat.INT8
    assert page_formats(WireFormat.INT4, 1) is WireFormat.INT4
    assert page_formats(WireFormat.INT8, 0) is page_formats(WireFormat.INT8, 9) is WireFormat.INT8
    assert page_formats(WireFormat.NATIVE, 0) is WireFormat.NATIVE


@pytest.mark.parametrize("fmt", [WireFormat.INT8, WireFormat.INT4])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_parts_of_a_record_are_aligned_to_what_loads_need(fmt, head_dim):
    record = Record.of(fmt, head_dim)
    assert record.v_codes % 16 == record.k_scale % 16 == record.num_bytes % 64 == 0


def test_native_pages_have_no_records():
    with pytest.raises(ValueError, match="no records"):
        Record.of(WireFormat.NATIVE, 64)


def test_a_span_counts_its_layers():
    assert LayerSpan(3, 7).num_layers == 4
