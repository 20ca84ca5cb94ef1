import pytest
import torch

from shared.engine.layers.kernels import TORCH_KERNELS
from shared.engine.layers.linear import Form, LinearLayers, Tiling, choose_tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}
H200_PROCESSORS = 132


def case(num_rows, num_outputs, depth, *, dtype=torch.float32):
    """x, the weights and what the output is added to."""
    generator = torch.Generator().manual_seed(num_rows + depth)

    def draw(rows, columns, scale=1.0):
        return torch.randn(rows, columns, generator=generator).mul(scale).to(DEVICE, dtype)

    return draw(num_rows, depth), draw(num_outputs, depth, depth**-0.5), draw(num_rows, num_outputs)


def expected(form, x, weight, residual):
    out = residual.float().clone()
    match form:
        case Form.PLAIN:
            out = TORCH_KERNELS.linear(x.float(), weight.float(), None)
        case Form.ADD:
            TORCH_KERNELS.add_linear(out, x.float(), weight.float(), None)
        case Form.GATED:
            out = TORCH_KERNELS.gated_linear(x.float(), weight.float(), None)
    return out.to(x.dtype)


def check(form, tiling, num_rows, num_outputs, depth, dtype):
    layers = LinearLayers.allocate(16, DEVICE)
    x, weight, residual = case(num_rows, num_outputs * (2 if form is Form.GATED else 1), depth, dtype=dtype)
    out = residual[:, :num_outputs].contiguous()
    want = expected(form, x, weight, out)
    first = out.clone()
    layers.launch(tiling, form, x, weight, first)
    torch.testing.assert_close(first, want, **TOLERANCE[dtype])
    layers.launch(tiling, form, x, weight, out)
    assert torch.equal(out, first)  # also: the counters of splits were left at 0
    assert not layers.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("num_outputs", "tile", "depth", "tile_depth"), [(24, 8, 512, 512), (32, 16, 768, 256)])
def test_one_row(form, num_outputs, tile, depth, tile_depth, dtype):
    check(form, Tiling(1, tile, tile_depth, 1, 4, 1), 1, num_outputs, depth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("num_rows", "padded"), [(2, 16), (16, 16), (17, 32), (64, 64)])
def test_few_rows(form, num_rows, padded, dtype):
    check(form, Tiling(padded, 64, 128, 1, 4, 4), num_rows, 128, 512, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [Form.PLAIN, Form.ADD])
@pytest.mark.parametrize(("num_splits", "depth"), [(2, 1024), (4, 2048), (2, 1152)])
def test_splits_add_up(form, num_splits, depth, dtype):
    check(form, Tiling(16, 64, 128, num_splits, 4, 4), 3, 128, depth, dtype)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("num_rows", [1, 2, 31, 64])
@pytest.mark.parametrize("depth", [576, 896, 2048, 2560, 4096, 14336, 18944])
@pytest.mark.parametrize("num_outputs", [576, 2048, 4096, 18944, 151936])
def test_a_tiling_covers_its_layer(form, num_rows, depth, num_outputs):
    tiling = choose_tiling(form, num_rows, num_outputs, depth, H200_PROCESSORS)
    if tiling is None:
        return
    assert num_rows <= tiling.num_x_rows
    assert num_outputs % tiling.num_outputs == 0
    assert depth % tiling.depth == 0
    if num_rows == 1:
        return
    assert depth // tiling.num_splits >= tiling.num_stages * tiling.depth  # the pipeline fills
    if tiling.num_splits > 1:
        assert form is not Form.GATED
        programs = num_outputs // tiling.num_outputs * tiling.num_splits
        assert programs <= H200_PROCESSORS
        assert programs * tiling.num_outputs * tiling.num_x_rows <= LinearLayers.allocate(132, DEVICE).partial.numel()
    weight_rows = tiling.num_outputs * (2 if form is Form.GATED else 1)
    assert (weight_rows + tiling.num_x_rows) * tiling.depth * 2 * tiling.num_stages <= 227 * 1024


def test_the_layers_of_large_models_are_taken():
    for num_rows in (1, 2, 16, 32):
        assert choose_tiling(Form.ADD, num_rows, 4096, 14336, H200_PROCESSORS)
        assert choose_tiling(Form.GATED, num_rows, 14336, 4096, H200_PROCESSORS)
        assert choose_tiling(Form.PLAIN, num_rows, 128256, 4096, H200_PROCESSORS)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_whatever_the_layer_and_number_of_rows(num_rows, with_bias, dtype):
    layers = LinearLayers.allocate(4, DEVICE)
    x, weight, residual = case(num_rows, 64, 256, dtype=dtype)
    bias = weight[:, 0].contiguous() if with_bias else None
    tolerance = TOLERANCE[torch.bfloat16] if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    assert_close = torch.testing.assert_close
    assert_close(layers.linear(x, weight, bias), TORCH_KERNELS.linear(x, weight, bias), **tolerance)
    assert_close(layers.gated_linear(x, weight, bias), TORCH_KERNELS.gated_linear(x, weight, bias), **tolerance)
    want = residual.clone()
    TORCH_KERNELS.add_linear(want, x, weight, bias)
    layers.add_linear(residual, x, weight, bias)
    assert_close(residual, want, **tolerance)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the layers for few rows are too large for the interpreter")
@pytest.mark.parametrize("num_rows", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("form", Form)
def test_layers_of_a_large_model(form, num_rows):
    layers = LinearLayers.allocate(torch.cuda.get_device_properties(DEVICE).multi_processor_count, DEVICE)
    num_outputs, depth = {Form.PLAIN: (128256, 2048), Form.ADD: (4096, 4096), Form.GATED: (14336, 4096)}[form]
    x, weight, residual = case(num_rows, num_outputs * (2 if form is Form.GATED else 1), depth, dtype=torch.bfloat16)
    residual = residual[:, :num_outputs].contiguous()
    want = expected(form, x, weight, residual)
    match form:
        case Form.PLAIN:
            got = layers.linear(x, weight, None)
        case Form.ADD:
            layers.add_linear(got := residual, x, weight, None)
        case Form.GATED:
            got = layers.gated_linear(x, weight, None)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.bfloat16])
