import itertools

import pytest
import torch

from shared.blocks import PAGE_TOKENS
from shared.engine.attention.decode import DecodeScratch, decode_attention
from shared.engine.attention.decode_plan import plan_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_BATCH = 8


class Decode:
    """Random pages and queries for rows at `positions`, and what attention over them must give."""

    def __init__(self, positions, *, heads=2, kv_heads=1, head_dim=64, dtype=torch.float32, layer=1, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.positions = positions
        self.kv_heads = kv_heads
        widths = [position // PAGE_TOKENS + 1 for position in positions]
        num_pages = sum(widths) + 2
        self.pages = torch.randn((num_pages, 3, 2, PAGE_TOKENS, kv_heads, head_dim), generator=random).to(dtype)
        self.layer_pages = self.pages[:, layer]
        self.table = torch.full((len(positions) + 1, 5 + max(widths, default=0)), num_pages - 1, dtype=torch.int32)
        free = iter((torch.randperm(num_pages - 1, generator=random)).tolist())
        self.seats = torch.randperm(len(positions), generator=random).to(torch.int32)
        for seat, width in zip(self.seats.tolist(), widths, strict=True):
            self.table[seat, 5 : 5 + width] = torch.tensor(list(itertools.islice(free, width)), dtype=torch.int32)
        self.page_table = self.table[:, 5:]
        qkv = torch.randn((len(positions), heads + 2 * kv_heads, head_dim), generator=random).to(dtype)
        self.q = qkv[:, :heads]
        self.scale = head_dim**-0.5

    def scratch(self, num_processors=4):
        _, heads, head_dim = self.q.shape
        return DecodeScratch.allocate(MAX_BATCH, heads, self.kv_heads, head_dim, num_processors, DEVICE)

    def run(self, scratch=None, layer_pages=None):
        scratch = scratch or self.scratch()
        out = torch.full((len(self.positions), self.q[0].numel() if self.positions else 0), float("nan"))
        out = out.to(self.q.dtype).to(DEVICE)
        layer_pages = self.pages.to(DEVICE)[:, 1] if layer_pages is None else layer_pages
        plan_decode(torch.tensor(self.positions, dtype=torch.int32, device=DEVICE), self.seats.to(DEVICE), scratch.work)
        page_table = self.table.to(DEVICE)[:, 5:]
        decode_attention(self.q.to(DEVICE), layer_pages, page_table, out, scratch, scale=self.scale)
        return out.cpu()

    def expected(self):
        """Plain softmax in float64; 0 for padding rows."""
        mixed = torch.zeros(self.q.shape, dtype=torch.float64)
        group = self.q.shape[1] // self.kv_heads
        for row, position in enumerate(self.positions):
            if position < 0:
                continue
            own = self.page_table[self.seats[row], : position // PAGE_TOKENS + 1].long()
            key, value = (
                self.layer_pages[own, part].flatten(0, 1)[: position + 1].double().repeat_interleave(group, dim=1)
                for part in (0, 1)
            )
            scores = torch.einsum("hd,khd->hk", self.q[row].double(), key) * self.scale
            mixed[row] = torch.einsum("hk,khd->hd", scores.softmax(dim=1), value)
        return mixed.flatten(1)

    def check(self, scratch=None):
        tolerance = 1e-5 if self.q.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(self.run(scratch).double(), self.expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [0, 62, 126, 190, 254, 318])
def test_each_length_around_a_page_border(first):
    Decode([first, first + 1, first + 2, first + 3]).check()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(head_dim, dtype):
    Decode([200, 63, 400], heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_query_heads_of_a_kv_head(group):
    Decode([70, 300], heads=2 * group, kv_heads=2).check()


def test_batch_of_mixed_lengths_with_padding_rows():
    Decode([-1, 1000, 0, 63, -1, 64, 500, -1], heads=4, kv_heads=2).check()


def test_long_context():
    Decode([4000, 3], heads=4, kv_heads=1, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("num_processors", [1, 2, 3, 5, 16])
def test_any_number_of_splits(num_processors):
    decode = Decode([1300, 700], heads=2, kv_heads=1)
    decode.check(decode.scratch(num_processors))


def test_one_plan_serves_every_layer():
    decode = Decode([1300, 100])
    scratch = decode.scratch()
    decode.check(scratch)
    out = torch.empty((2, 2 * 64), device=DEVICE)
    decode_attention(
        decode.q.to(DEVICE),
        decode.layer_pages.to(DEVICE),
        decode.page_table.to(DEVICE),
        out,
        scratch,
        scale=decode.scale,
    )
    torch.testing.assert_close(out.cpu().double(), decode.expected(), rtol=1e-5, atol=1e-5)


def test_scratch_serves_one_launch_after_another():
    first, second = Decode([500, 900], seed=1), Decode([700, 20, 1100], seed=2)
    scratch = first.scratch()
    for decode in (first, second, first):
        decode.check(scratch)
    assert not scratch.arrived.any()


def test_what_lies_behind_the_last_key_is_never_used():
    decode = Decode([69, 300])
    for row, position in enumerate(decode.positions):
        last_page = decode.page_table[decode.seats[row], position // PAGE_TOKENS]
        decode.layer_pages[last_page, :, position % PAGE_TOKENS + 1 :] = float("nan")
    decode.check()


def test_large_scores_do_not_overflow():
    decode = Decode([400, 64])
    decode.q.mul_(100)
    decode.check()


def test_layer_major_pages():
    decode = Decode([150, 330], heads=4, kv_heads=2)
    layer_major = decode.pages.transpose(0, 1).contiguous().to(DEVICE)
    out = decode.run(layer_pages=layer_major[1])
    torch.testing.assert_close(out.double(), decode.expected(), rtol=1e-5, atol=1e-5)


def test_empty_batch_does_nothing():
    decode = Decode([])
    assert decode.run(decode.scratch()).numel() == 0
