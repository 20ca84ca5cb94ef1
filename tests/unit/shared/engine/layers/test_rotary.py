from types import SimpleNamespace

import pytest
import torch

from shared.engine.layers.rotary import rotate_and_store, rotate_and_store_reference
from shared.engine.models.config import DefaultRope, YarnRope
from shared.engine.models.rope import RotaryEmbedding, angle_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2}}
NUM_PAGES = 11
PAGE_TABLE = torch.tensor([[3, 1, 8, 0], [10, 2, 7, 5], [4, 6, 9, 0]], dtype=torch.int32)
BORDERS = [0, 62, 63, 64, 65, 127, 128, 129]


def world(positions, *, num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32, norms=False):
    generator = torch.Generator().manual_seed(head_dim + num_heads)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    num_rows = len(positions)
    return SimpleNamespace(
        qkv=draw(num_rows, (num_heads + 2 * num_kv_heads) * head_dim),
        positions=torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        seats=torch.arange(num_rows, dtype=torch.int32, device=DEVICE) % len(PAGE_TABLE),
        page_table=PAGE_TABLE.to(DEVICE),
        pages=draw(NUM_PAGES, 3, 2, 64, num_kv_heads, head_dim),
        angles=angle_table(DefaultRope(10_000.0), head_dim, 256, DEVICE),
        q_norm=draw(head_dim) if norms else None,
        k_norm=draw(head_dim) if norms else None,
        num_heads=num_heads,
    )


def run(function, given):
    qkv, pages = given.qkv.clone(), given.pages.clone()
    function(
        qkv,
        given.positions,
        given.seats,
        given.page_table,
        pages[:, 1],
        given.angles,
        given.q_norm,
        given.k_norm,
        eps=1e-5,
        num_heads=given.num_heads,
    )
    return qkv, pages


def check(given):
    tolerance = TOLERANCE[given.qkv.dtype]
    for got, expected in zip(run(rotate_and_store, given), run(rotate_and_store_reference, given), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 256])
def test_head_sizes_norms_and_page_borders(head_dim, norms, dtype):
    check(world(BORDERS, head_dim=head_dim, norms=norms, dtype=dtype))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("group", range(1, 9))
def test_heads_that_share_a_kv_head(group, num_kv_heads):
    check(world([5, 70], num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, norms=True))


def test_padding_rows_are_left_alone():
    given = world([-1, 3, -1])
    given.qkv[0] = float("nan")
    given.seats[0] = 2
    qkv, pages = run(rotate_and_store, given)
    torch.testing.assert_close(qkv[[0, 2]], given.qkv[[0, 2]], rtol=0, atol=0, equal_nan=True)
    changed = (pages != given.pages).flatten(3).any(-1).nonzero().tolist()
    assert changed == [[10, 1, 0], [10, 1, 1]]
    check(given := world([3, -1]))


def test_no_rows():
    given = world([])
    assert torch.equal(run(rotate_and_store, given)[1], given.pages)


def test_many_rows():
    check(world([row // 3 for row in range(192)], num_heads=1, num_kv_heads=1, head_dim=24))


def test_values_are_copied_bit_by_bit_and_may_be_infinite():
    given = world([9], dtype=torch.bfloat16)
    given.qkv[0, -64] = float("inf")
    _, pages = run(rotate_and_store, given)
    assert torch.equal(pages[3, 1, 1, 9].flatten(), given.qkv[0, -128:])


def test_rows_and_page_table_may_be_parts_of_wider_ones():
    given = world(BORDERS)
    words = torch.full((3, 100), 1_000_000, dtype=torch.int32, device=DEVICE)
    words[:, 96:] = PAGE_TABLE.to(DEVICE)
    wide = torch.zeros(len(BORDERS), given.qkv.shape[1] + 32, device=DEVICE)
    wide[:, 16:-16] = given.qkv
    expected, expected_pages = run(rotate_and_store_reference, given)
    pages = given.pages.clone()
    tables = (given.positions, given.seats, words[:, 96:], pages[:, 1], given.angles)
    rotate_and_store(wide[:, 16:-16], *tables, None, None, eps=1e-5, num_heads=4)
    torch.testing.assert_close(wide[:, 16:-16], expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(pages, expected_pages, **TOLERANCE[torch.float32])
    assert (wide[:, :16] == 0).all()
    assert (wide[:, -16:] == 0).all()


def test_pages_may_lie_layer_by_layer():
    given = world(BORDERS)
    _, expected = run(rotate_and_store_reference, given)
    given.pages = given.pages.transpose(0, 1).contiguous().transpose(0, 1)
    assert given.pages[:, 1].stride(0) == given.pages[0, 0].numel()
    torch.testing.assert_close(run(rotate_and_store, given)[1], expected, **TOLERANCE[torch.float32])


def test_the_angle_table_agrees_with_the_rotation_that_attention_computes():
    rope = YarnRope(10_000.0, 4.0, 32.0, 1.0, truncate=True, attention_factor=1.2, original_max_position=64)
    table = angle_table(rope, 64, 200, DEVICE)
    rotation = RotaryEmbedding(rope, 64, torch.float32, DEVICE).at(torch.arange(200, device=DEVICE))
    assert table.shape == (200, 64)
    torch.testing.assert_close(table[:, :32], rotation.cosine[:, 0, :32])
    torch.testing.assert_close(table[:, 32:], rotation.sine[:, 0, 32:])
