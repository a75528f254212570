"""The norm of a row, and the sum before it, against float64: as near as one rounding allows."""

import pytest
import torch
from torch import Tensor

from baton.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference

# Of a result: half a unit in its last place, and for float32 the roundings of a long sum.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 1.001}
EPS = 1e-5


def rows(count: int, size: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Of very different lengths, between two rows of NaNs that no kernel may touch or read."""
    x = torch.randn(count + 2, size, device=random.device, generator=random)
    x *= torch.logspace(-2, 2, count + 2, device=x.device)[:, None]
    x[0] = x[-1] = float("nan")
    return x.to(dtype)


def a_weight(size: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    return torch.randn(size, device=random.device, generator=random).to(dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=BOUND[found.dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 4096), (3, 64), (5, 8), (2, 5120), (1, 16384), (64, 2056), (1, 8200), (33, 1024)], ids=str
)
def test_the_sum_is_stored_and_normed_as_stored(
    shape: tuple[int, int], dtype: torch.dtype, random: torch.Generator
) -> None:
    delta, stream, weight = rows(*shape, dtype, random), rows(*shape, dtype, random), a_weight(shape[1], dtype, random)
    before, out = stream.clone(), torch.full_like(stream, float("nan"))
    normed = add_rms_norm(delta[1:-1], stream[1:-1], weight, EPS, out[1:-1])
    assert normed.data_ptr() == out[1].data_ptr()
    assert torch.equal(stream[1:-1], before[1:-1] + delta[1:-1])
    assert_near(normed, rms_norm_reference(stream[1:-1].double(), weight.double(), EPS))
    for canaries in (stream, out):
        assert canaries[0].isnan().all()
        assert canaries[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4096), (7, 64), (2, 16384), (64, 200)], ids=str)
def test_without_a_sum_the_row_stays(shape: tuple[int, int], dtype: torch.dtype, random: torch.Generator) -> None:
    stream, weight = rows(*shape, dtype, random), a_weight(shape[1], dtype, random)
    before = stream.clone()
    assert_near(rms_norm(stream[1:-1], weight, EPS), rms_norm_reference(before[1:-1].double(), weight.double(), EPS))
    assert torch.equal(stream[1:-1], before[1:-1])


def test_a_row_s_result_does_not_depend_on_its_neighbours(random: torch.Generator) -> None:
    x, weight = rows(9, 4096, torch.bfloat16, random)[1:-1], a_weight(4096, torch.bfloat16, random)
    together = rms_norm(x, weight, EPS)
    for row in range(len(x)):
        assert torch.equal(rms_norm(x[row : row + 1], weight, EPS)[0], together[row])


def test_a_row_of_zeros_stays_zero(random: torch.Generator) -> None:
    zeros = torch.zeros(2, 512, dtype=torch.bfloat16, device=random.device)
    assert torch.equal(add_rms_norm(zeros, zeros.clone(), a_weight(512, torch.bfloat16, random), EPS), zeros)


@pytest.mark.parametrize("size", [12, 20000])
def test_rows_that_no_kernel_takes_are_normed_too(size: int, random: torch.Generator) -> None:
    dtype = torch.bfloat16
    delta, stream, weight = rows(2, size, dtype, random), rows(2, size, dtype, random), a_weight(size, dtype, random)
    expected = stream[1:-1] + delta[1:-1]
    normed = add_rms_norm(delta[1:-1], stream[1:-1], weight, EPS)
    assert torch.equal(stream[1:-1], expected)
    reference = rms_norm_reference(expected.double(), weight.double(), EPS)
    torch.testing.assert_close(normed.double(), reference, rtol=2e-2, atol=1e-3)  # torch may round twice


def test_no_rows_need_no_norm(random: torch.Generator) -> None:
    none = torch.empty(0, 64, device=random.device)
    assert add_rms_norm(none, none.clone(), a_weight(64, torch.float32, random), EPS).shape == (0, 64)
