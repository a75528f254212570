"""The gated activation against float64: as near as one rounding allows."""

import pytest
import torch

from baton.kernels.activation import silu_gate, silu_gate_reference

# Of a result: half a unit in its last place, and that of the exponential and the quotient.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.001}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 14336), (7, 8), (64, 1032), (3, 128), (129, 24), (2, 3, 96)], ids=str)
def test_each_row_s_gate_meets_its_own_up(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> None:
    rows = (shape[0] + 2, *shape[1:-1])
    gate_up = 5 * torch.randn(*rows, 2 * shape[-1], device=random.device, generator=random)
    gate_up[0] = gate_up[-1] = float("nan")
    gate_up = gate_up.to(dtype)
    out = torch.full((*rows, shape[-1]), float("nan"), dtype=dtype, device=random.device)
    gated = silu_gate(gate_up[1:-1], out[1:-1])
    expected = silu_gate_reference(gate_up[1:-1].double())
    torch.testing.assert_close(gated.double(), expected, rtol=BOUND[dtype], atol=1e-30)
    assert torch.equal(out[1:-1], gated)
    assert out[0].isnan().all()
    assert out[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_far_from_zero_are_open_or_shut(dtype: torch.dtype, random: torch.Generator) -> None:
    gate = torch.tensor([-3e38, -200.0, -90.0, 90.0, 200.0, 1e30, 0.0, -0.0], device=random.device)
    gated = silu_gate(torch.cat((gate, torch.full_like(gate, 2.0)))[None].to(dtype))
    expected = torch.where(gate > 0, 2 * gate.to(dtype), 0)[None].to(dtype)
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-30)


@pytest.mark.parametrize("size", [4, 12])
def test_gates_that_no_kernel_takes_are_open_too(size: int, random: torch.Generator) -> None:
    gate_up = torch.randn(3, 2 * size, device=random.device, generator=random).bfloat16()
    expected = silu_gate_reference(gate_up.double())
    torch.testing.assert_close(silu_gate(gate_up).double(), expected, rtol=2e-2, atol=1e-6)  # torch rounds twice


def test_no_rows_need_no_gate(random: torch.Generator) -> None:
    assert silu_gate(torch.empty(0, 64, device=random.device)).shape == (0, 32)
