import heapq
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.layout import KvLayout
from shared.kv.progress import MAX_MARKS
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes
from shared.transfer.plan import (
    FAIR_PART_S,
    GROUP_COST_S,
    MIN_GAIN_S,
    MIN_GAIN_SHARE,
    SLACK_S,
    SLACK_SHARE,
    LinkSpeed,
    Part,
    choose_format,
    choose_layer_groups,
    cut_parts,
)

MIB = 2**20

LLAMA_8B = KvLayout(model_fingerprint="m", num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
"""Pages of 8 MiB."""
WHOLE = (LayerSpan(0, 32),)
SMOLLM2 = KvLayout(model_fingerprint="m", num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
"""Pages of 1.5 MB."""

NVLINK = LinkSpeed(360e9, 0.2e-3)
ETHERNET = LinkSpeed(25e9 / 8, 50e-6)
SLOW = LinkSpeed(50e6 / 8, 2e-3)

MAX_PART_BYTES = 256 * MIB

layouts = st.builds(
    KvLayout,
    model_fingerprint=st.just("m"),
    num_layers=st.integers(1, 80),
    num_kv_heads=st.integers(1, 8),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
links = st.builds(LinkSpeed, st.floats(1e5, 1e12), st.floats(0, 0.1))
formats = st.sampled_from(WireFormat)
computes_s = st.floats(1e-4, 100)


def all_groupings(num_layers):
    """Every plan of equal groups that end where the engine says how far it is."""
    every = -(-num_layers // MAX_MARKS)
    marks = [*range(0, num_layers, every), num_layers]
    for number in range(1, len(marks)):
        bounds = [marks[index * (len(marks) - 1) // number] for index in range(number + 1)]
        yield tuple(LayerSpan(*span) for span in pairwise(bounds))


def simulated_end_s(layout, groups, num_pages, compute_s, link, fmt):
    """When the last group has arrived: the layers are computed one by one, and the wire takes what is there."""
    layer_s = compute_s / layout.num_layers
    events = [(layer_s * (layer + 1), "computed", layer) for layer in range(layout.num_layers)]
    ends_with = {group.end - 1: group for group in groups}
    ready, wire_is_free, now_s = [], True, 0.0
    while events:
        now_s, what, layer = heapq.heappop(events)
        if what == "arrived":
            wire_is_free = True
        elif layer in ends_with:
            ready.append(ends_with[layer])
        if ready and wire_is_free:
            group = ready.pop(0)
            wire_s = packed_bytes(layout, fmt, num_pages, group.num_layers) / link.bytes_per_s
            heapq.heappush(events, (now_s + wire_s + link.latency_s + GROUP_COST_S, "arrived", group.end))
            wire_is_free = False
    assert not ready
    return now_s


@given(layouts, st.integers(1, 2000), computes_s, links, formats)
def test_the_groups_chosen_are_the_best_of_all_by_simulation(layout, num_pages, compute_s, link, fmt):
    groups = choose_layer_groups(layout, num_pages=num_pages, compute_left_s=compute_s, link=link, fmt=fmt)
    ends_s = {
        plan: simulated_end_s(layout, plan, num_pages, compute_s, link, fmt)
        for plan in all_groupings(layout.num_layers)
    }
    small_s = max(MIN_GAIN_S, MIN_GAIN_SHARE * compute_s)
    one, best, chosen = ends_s[(LayerSpan(0, layout.num_layers),)], min(ends_s.values()), ends_s[groups]
    assert chosen <= one
    assert chosen <= best * (1 + 1e-9) or (chosen == one and one - best < small_s + 1e-9)
    if len(groups) > 1:
        assert one - chosen >= small_s * (1 - 1e-9)


@given(layouts, st.integers(1, 2000), computes_s, links, formats)
def test_groups_cover_all_layers_and_end_where_the_engine_marks(layout, num_pages, compute_s, link, fmt):
    groups = choose_layer_groups(layout, num_pages=num_pages, compute_left_s=compute_s, link=link, fmt=fmt)
    every = -(-layout.num_layers // MAX_MARKS)
    assert groups[0].first == 0
    assert groups[-1].end == layout.num_layers
    assert all(one.end == other.first and one.end % every == 0 for one, other in pairwise(groups))
    assert all(group.num_layers >= 1 for group in groups)


@pytest.mark.parametrize(("compute_left_s", "link"), [(None, ETHERNET), (0.0, ETHERNET), (0.1, None)])
def test_one_group_where_nothing_is_computed_or_nothing_is_known(compute_left_s, link):
    groups = choose_layer_groups(
        LLAMA_8B, num_pages=64, compute_left_s=compute_left_s, link=link, fmt=WireFormat.NATIVE
    )
    assert groups == WHOLE


def test_a_prompt_over_nvlink_goes_in_one_group():
    # 4,096 tokens: 110 ms of prefill, 1.5 ms of wire.
    for num_pages, compute_s in ((16, 0.028), (64, 0.11), (512, 1.05)):
        groups = choose_layer_groups(
            LLAMA_8B, num_pages=num_pages, compute_left_s=compute_s, link=NVLINK, fmt=WireFormat.NATIVE
        )
        assert groups == WHOLE


def test_a_prompt_over_ethernet_goes_in_groups():
    # 512 MiB in INT8 are 279 MB, 89 ms at 25 Gb/s, during 110 ms of prefill: an eighth of it is left behind the end.
    groups = choose_layer_groups(LLAMA_8B, num_pages=64, compute_left_s=0.11, link=ETHERNET, fmt=WireFormat.INT8)
    assert groups == tuple(LayerSpan(first, first + 4) for first in range(0, 32, 4))
    end_s = simulated_end_s(LLAMA_8B, groups, 64, 0.11, ETHERNET, WireFormat.INT8)
    assert end_s == pytest.approx(0.11 + 0.0893 / 8 + 50e-6 + GROUP_COST_S, abs=1e-4)


def test_a_slow_wire_needs_only_an_early_start():
    # 23.6 MB at 50 Mb/s are 3.77 s behind 2 s of prefill, of which the wire can use all but the first marked layers.
    groups = choose_layer_groups(SMOLLM2, num_pages=16, compute_left_s=2.0, link=SLOW, fmt=WireFormat.NATIVE)
    assert groups[0] == LayerSpan(0, 4)
    end_s = simulated_end_s(SMOLLM2, groups, 16, 2.0, SLOW, WireFormat.NATIVE)
    assert end_s == pytest.approx(2.0 * 4 / 30 + 3.77 + len(groups) * (2e-3 + GROUP_COST_S), abs=0.01)


def choice(layout, num_pages, compute_s, link, max_loss):
    return choose_format(layout, num_pages=num_pages, compute_left_s=compute_s, link=link, max_loss=max_loss)


@pytest.mark.parametrize(
    ("layout", "num_pages", "compute_s", "link", "chosen"),
    [
        pytest.param(LLAMA_8B, 64, 0.11, NVLINK, WireFormat.NATIVE, id="NVLink: 1.5 ms of wire"),
        pytest.param(LLAMA_8B, 64, 0.11, LinkSpeed(100e9 / 8, 50e-6), WireFormat.NATIVE, id="43 ms of 110 ms"),
        pytest.param(LLAMA_8B, 64, 0.13, ETHERNET, WireFormat.INT8, id="172 ms of 130 ms"),
        pytest.param(LLAMA_8B, 64, 0.11, LinkSpeed(10e9 / 8, 50e-6), WireFormat.INT4, id="430 ms of 110 ms"),
        pytest.param(SMOLLM2, 16, 2.0, LinkSpeed(200e6 / 8, 2e-3), WireFormat.NATIVE, id="0.94 s of 2 s"),
        pytest.param(SMOLLM2, 16, 2.0, SLOW, WireFormat.INT4, id="3.8 s of 2 s, INT8 2.0 s"),
        pytest.param(SMOLLM2, 16, 2.0, LinkSpeed(5e5, 2e-3), WireFormat.INT4, id="all late"),
        pytest.param(LLAMA_8B, 64, 0.0, ETHERNET, WireFormat.INT4, id="all computed: every ms shows"),
        pytest.param(LLAMA_8B, 64, None, ETHERNET, WireFormat.NATIVE, id="prefill not measured"),
        pytest.param(LLAMA_8B, 64, 0.11, None, WireFormat.NATIVE, id="link not measured"),
    ],
)
def test_the_least_lossy_form_that_is_not_late(layout, num_pages, compute_s, link, chosen):
    assert choice(layout, num_pages, compute_s, link, WireFormat.INT4) is chosen
    allowed = chosen if chosen.loss <= WireFormat.INT8.loss else WireFormat.INT8
    assert choice(layout, num_pages, compute_s, link, WireFormat.INT8) is allowed


@given(layouts, st.integers(1, 2000), st.none() | st.just(0.0) | computes_s, st.none() | links)
def test_nobody_loses_precision_who_did_not_allow_it(layout, num_pages, compute_s, link):
    assert choice(layout, num_pages, compute_s, link, WireFormat.NATIVE) is WireFormat.NATIVE


@given(layouts, st.integers(1, 2000), computes_s, links, formats)
def test_a_lossy_form_is_taken_only_where_all_that_lose_less_are_late(layout, num_pages, compute_s, link, max_loss):
    chosen = choice(layout, num_pages, compute_s, link, max_loss)
    assert chosen.loss <= max_loss.loss
    for fmt in WireFormat:
        if fmt.loss < chosen.loss:
            best_s = min(
                simulated_end_s(layout, groups, num_pages, compute_s, link, fmt)
                for groups in all_groupings(layout.num_layers)
            )
            # What little groups gain may have been left.
            gain_s = max(MIN_GAIN_S, MIN_GAIN_SHARE * compute_s)
            assert best_s + gain_s > compute_s + max(SLACK_S, SLACK_SHARE * compute_s)


@st.composite
def cuts(draw):
    layout, fmt = draw(layouts), draw(formats)
    layer_bytes = packed_bytes(layout, fmt, 1, 1)
    start = draw(st.integers(0, 50))
    return {
        "layout": layout,
        "start": start,
        "end": start + draw(st.integers(0, 20)),
        "groups": draw(st.sampled_from(list(all_groupings(layout.num_layers)))),
        "fmt": fmt,
        "link": draw(st.none() | links),
        "max_part_bytes": draw(st.integers(layer_bytes, 400 * layer_bytes) | st.just(MAX_PART_BYTES)),
    }


def size(cut, part):
    return packed_bytes(cut["layout"], cut["fmt"], part.num_pages, part.layers.num_layers)


@given(cuts())
def test_every_layer_of_every_page_travels_once_and_group_by_group(cut):
    parts = cut_parts(cut["layout"], **{name: value for name, value in cut.items() if name != "layout"})
    travelled = [
        (page, layer)
        for part in parts
        for page in range(part.start, part.end)
        for layer in range(part.layers.first, part.layers.end)
    ]
    pages, layers = range(cut["start"], cut["end"]), range(cut["layout"].num_layers)
    assert len(set(travelled)) == len(travelled) == len(pages) * len(layers)
    assert set(travelled) == {(page, layer) for page in pages for layer in layers}
    starts_of = [next(n for n, group in enumerate(cut["groups"]) if part.layers.first < group.end) for part in parts]
    assert starts_of == sorted(starts_of)
    assert all(part.layers.end <= cut["groups"][n].end for n, part in zip(starts_of, parts, strict=True))


@given(cuts())
def test_no_part_is_over_the_limit_nor_keeps_a_slow_link_for_long(cut):
    layer_bytes = packed_bytes(cut["layout"], cut["fmt"], 1, 1)
    fair_bytes = cut["max_part_bytes"] if cut["link"] is None else cut["link"].bytes_per_s * FAIR_PART_S
    for part in cut_parts(cut["layout"], **{name: value for name, value in cut.items() if name != "layout"}):
        assert 0 < size(cut, part) <= min(cut["max_part_bytes"], max(layer_bytes, fair_bytes))


@given(st.integers(1, 3000), st.integers(1, 1000))
def test_a_fast_link_gets_few_parts_of_equal_size(num_pages, pages_a_part):
    max_part_bytes = pages_a_part * LLAMA_8B.page_bytes
    parts = cut_parts(
        LLAMA_8B,
        start=0,
        end=num_pages,
        groups=WHOLE,
        fmt=WireFormat.NATIVE,
        link=LinkSpeed(1e15, 0),
        max_part_bytes=max_part_bytes,
    )
    sizes = [part.num_pages for part in parts]
    fewest = -(-num_pages // pages_a_part)
    assert sum(sizes) == num_pages
    assert 0 < min(sizes) <= max(sizes) <= pages_a_part
    assert len(parts) == fewest
    assert max(sizes) - min(sizes) <= 1


def llama_parts(num_pages, link, groups=WHOLE):
    return cut_parts(
        LLAMA_8B,
        start=0,
        end=num_pages,
        groups=groups,
        fmt=WireFormat.NATIVE,
        link=link,
        max_part_bytes=MAX_PART_BYTES,
    )


def test_llama_8b_over_nvlink():
    # Pages of 8 MiB: 1,024 tokens are one part of 128 MiB.
    assert llama_parts(16, NVLINK) == (Part(0, 16, LayerSpan(0, 32)),)
    assert [part.num_pages for part in llama_parts(64, NVLINK)] == [32, 32]
    assert [part.num_pages for part in llama_parts(256, NVLINK)] == [32] * 8


def test_a_link_that_was_not_measured_gets_small_parts():
    # 32 MiB are 4 pages.
    assert [part.num_pages for part in llama_parts(10, None)] == [3, 3, 4]


def test_llama_8b_over_ethernet():
    # 50 ms at 25 Gb/s are 156 MB: 149 layers of 1 MiB.
    assert [part.num_pages for part in llama_parts(64, ETHERNET)] == [16, 16, 16, 16]
    by_groups = llama_parts(64, ETHERNET, groups=(LayerSpan(0, 16), LayerSpan(16, 32)))
    assert [(part.num_pages, part.layers.first) for part in by_groups] == [(32, 0), (32, 0), (32, 16), (32, 16)]


def test_a_page_that_takes_a_slow_link_too_long_is_cut_by_layers():
    # 50 ms at 50 Mb/s are 312 kB. A layer of a page of Llama-8B has 262 kB; one of SmolLM2 has 49 kB: 6 of them.
    assert llama_parts(2, SLOW)[:2] == (Part(0, 1, LayerSpan(0, 1)), Part(0, 1, LayerSpan(1, 2)))
    parts = cut_parts(
        SMOLLM2,
        start=3,
        end=5,
        groups=(LayerSpan(0, 30),),
        fmt=WireFormat.NATIVE,
        link=SLOW,
        max_part_bytes=MAX_PART_BYTES,
    )
    assert parts == tuple(
        Part(page, page + 1, LayerSpan(first, first + 6)) for page in (3, 4) for first in range(0, 30, 6)
    )


def test_a_limit_that_holds_no_layer_of_a_page_is_refused():
    with pytest.raises(ValueError, match="a layer of a page"):
        cut_parts(
            LLAMA_8B,
            start=0,
            end=1,
            groups=WHOLE,
            fmt=WireFormat.NATIVE,
            link=None,
            max_part_bytes=LLAMA_8B.page_bytes // 32 - 1,
        )
