import torch

from benchmarks.kv_transfer.formats import format_times
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache


def test_each_form_is_timed_and_held_against_the_contents():
    layout = KvLayout(model_fingerprint="random", num_layers=2, num_kv_heads=2, head_dim=32, dtype="bfloat16")
    cache = PagedCache(layout, 6, torch.device("cpu"))
    cache.pages.normal_(generator=torch.Generator().manual_seed(1))
    native, int8, int4 = format_times(cache, [4, 1, 2], repeats=2)
    assert [row["format"] for row in (native, int8, int4)] == ["native", "int8", "int4"]
    assert (native["bytes"], native["share"], native["largest_error"]) == (3 * layout.page_bytes, 1.0, 0.0)
    assert native["share"] > int8["share"] > int4["share"] > 0
    assert 0 < int8["largest_error"] < int4["largest_error"] < 0.5
    assert all(row[name] > 0 for row in (native, int8, int4) for name in ("pack_ms", "unpack_ms"))
