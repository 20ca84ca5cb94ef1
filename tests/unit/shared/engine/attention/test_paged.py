"""Both kinds of rows of one step: what is launched where, and that neither kind changes the other."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shared.engine.attention import paged
from shared.engine.attention.decode import DecodeScratch
from shared.engine.attention.decode_plan import plan_decode
from shared.engine.attention.paged import PagedAttention, SideStream
from shared.engine.attention.prefill import Tiling
from shared.engine.models.rope import DefaultRope, angle_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM = 2, 1, 64
CONFIG = SimpleNamespace(num_heads=HEADS, head_dim=DIM, q_size=HEADS * DIM, rms_norm_eps=1e-6)
LAYER = SimpleNamespace(q_norm=None, k_norm=None)
TILING = Tiling(block_rows=32, tile_pages=1, num_warps=4, num_stages=1, bulk_copy=False)
POSITIONS = [70, 5, *range(60, 67)]
SEATS = [0, 1] + 7 * [2]
"""Two decode rows, then a chunk of 7 tokens."""


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attention_of(rows, num_decode, side=None):
    """For these rows of all, the last of them the chunk's unless all are decode rows."""
    positions, seats = int32(POSITIONS[rows]), int32(SEATS[rows])
    pages = torch.randn((6, 1, 2, 64, KV_HEADS, DIM), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scratch = DecodeScratch.allocate(2, HEADS, KV_HEADS, DIM, 4, DEVICE)
    plan_decode(positions[:num_decode], seats[:num_decode], scratch.work)
    num_chunked = len(positions) - num_decode
    blocks = int32([[num_decode, num_chunked, 60, 2]] if num_chunked else []).reshape(-1, 4)
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).reshape(3, 2)
    angles = angle_table(DefaultRope(10_000.0), DIM, 128, DEVICE)
    return PagedAttention(CONFIG, pages, table, seats, positions, num_decode, blocks, TILING, angles, scratch, side)


def qkv_of(rows):
    every = torch.randn((len(POSITIONS), (HEADS + 2 * KV_HEADS) * DIM), generator=torch.Generator().manual_seed(2))
    return every[rows].to(DEVICE)


def attend(rows, num_decode, side=None):
    return attention_of(rows, num_decode, side).attend(0, LAYER, qkv_of(rows), None)


ALL, DECODE, CHUNK = slice(0, 9), slice(0, 2), slice(2, 9)


def test_rows_of_both_kinds_attend_as_each_kind_alone():
    together = attend(ALL, 2, SideStream.of(DEVICE))
    assert together.isfinite().all()
    assert torch.equal(together[DECODE], attend(DECODE, 2))
    assert torch.equal(together[CHUNK], attend(CHUNK, 0))


class Recorder:
    """Stands for a side stream, and for the kernels."""

    def __init__(self, monkeypatch):
        self.events = []
        for kernel in ("rotate_and_store", "decode_attention", "prefill_attention"):
            monkeypatch.setattr(paged, kernel, lambda *_, _name=kernel, **__: self.events.append(_name))

    @contextmanager
    def fork(self):
        self.events.append("fork")
        yield
        self.events.append("back")

    def join(self):
        self.events.append("join")


def test_the_chunks_are_forked_behind_the_store_and_joined_at_the_end(monkeypatch):
    recorder = Recorder(monkeypatch)
    attend(ALL, 2, recorder)
    assert recorder.events == ["rotate_and_store", "fork", "prefill_attention", "back", "decode_attention", "join"]


@pytest.mark.parametrize(("rows", "num_decode"), [(DECODE, 2), (CHUNK, 0)])
def test_rows_of_one_kind_stay_on_their_stream(monkeypatch, rows, num_decode):
    recorder = Recorder(monkeypatch)
    attend(rows, num_decode, recorder)
    assert not {"fork", "join"} & set(recorder.events)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the CPU has neither streams nor graphs")
def test_a_graph_holds_both_streams():
    attention, qkv = attention_of(ALL, 2, SideStream.of(DEVICE)), qkv_of(ALL)
    expected = attention.attend(0, LAYER, qkv.clone(), None)
    attention.pages.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = attention.attend(0, LAYER, qkv, None)
    attention.pages.copy_(attention_of(ALL, 2).pages)
    graph.replay()
    assert torch.equal(mixed, expected)


def test_rows_wanted_alone_attend_as_among_all():
    attention, qkv = attention_of(ALL, 2), qkv_of(ALL)
    wanted = int32([0, 1, 8, 3, 8])
    expected = attention.attend(0, LAYER, qkv.clone(), None)[wanted]
    roomy = replace(attention, scratch=DecodeScratch.allocate(len(wanted), HEADS, KV_HEADS, DIM, 4, DEVICE))
    torch.testing.assert_close(roomy.attend(0, LAYER, qkv, wanted), expected)
