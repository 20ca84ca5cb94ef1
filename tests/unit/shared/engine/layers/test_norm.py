import pytest
import torch

from shared.engine.layers.norm import rms_norm, rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 576, 2048, 4096, 8192])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_each_row_is_normalised(num_rows, hidden, dtype):
    generator = torch.Generator().manual_seed(hidden + num_rows)
    x = torch.randn(num_rows, hidden, generator=generator).mul(3).to(DEVICE, dtype)
    weight = torch.randn(hidden, generator=generator).to(DEVICE, dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), **TOLERANCE[dtype])


def test_rows_may_lie_apart():
    wide = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x, weight = wide[:, 100:676], wide[0, :576].contiguous()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_eps_keeps_rows_of_zeros_finite():
    out = rms_norm(torch.zeros(2, 96, device=DEVICE), torch.ones(96, device=DEVICE), 1e-6)
    assert (out == 0).all()
