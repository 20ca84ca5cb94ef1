import pytest
import torch

from shared.engine.layers.gated import silu_mul, silu_mul_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-6, "atol": 1e-3}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 1024, 1536, 1537])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_gate_and_up_are_taken_from_their_halves(num_rows, width, dtype):
    generator = torch.Generator().manual_seed(width + num_rows)
    gate_up = torch.randn(num_rows, 2 * width, generator=generator).mul(4).to(DEVICE, dtype)
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up), **TOLERANCE[dtype])


def test_extreme_gates_stay_finite():
    gate_up = torch.tensor([[-1e30, -200.0, 200.0, 1.0, 2.0, 3.0]], device=DEVICE)
    assert silu_mul(gate_up).tolist() == [[0.0, 0.0, 600.0]]
