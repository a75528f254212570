"""Queries are turned, keys and values land in their slots, and nothing else changes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from baton.kernels.norm import rms_norm_reference
from baton.kernels.rotary import rotary_reference, signed_sin
from baton.kernels.rotary_write import HeadNorms, plan_rotation, rotary_write

NUM_BLOCKS, LAYERS, LAYER, POSITIONS, EPS = 24, 3, 1, 5000, 1e-6
# Of a head's largest value: the rounding of the result, and of float32 the few before it.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.001}
SHAPES = [(32, 8, 16, 128), (4, 2, 16, 64), (6, 1, 48, 80), (3, 3, 32, 96), (2, 1, 16, 256), (5, 1, 16, 16)]


@dataclass
class Case:
    qkv: Tensor
    pool: Tensor
    slots: Tensor
    positions: Tensor
    angles: Tensor  # [POSITIONS, D/2]
    cos: Tensor
    sin: Tensor
    norms: HeadNorms | None

    def expected(self) -> Tensor:
        """All heads in float64, before they are rounded: from the tables as they are, which are rounded too."""
        kv_heads, half = self.pool.shape[3], self.pool.shape[5] // 2
        wide, turning = self.qkv.double(), self.qkv.shape[1] - kv_heads
        heads, keys, v = wide[:, : turning - kv_heads], wide[:, turning - kv_heads : turning], wide[:, turning:]
        if self.norms is not None:
            heads = rms_norm_reference(heads, self.norms.q.double(), EPS)
            keys = rms_norm_reference(keys, self.norms.k.double(), EPS)
        x = torch.cat((heads, keys), 1)
        cos, sin = (table[self.positions][:, None].double() for table in (self.cos, self.sin))
        return torch.cat((x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin, v), 1)


def a_case(
    tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, random: torch.Generator, normed: bool = False
) -> Case:
    heads, kv_heads, block_tokens, head_size = shape
    device = random.device

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=random).to(dtype)

    pool = torch.full(
        (NUM_BLOCKS, LAYERS, 2, kv_heads, block_tokens, head_size), float("nan"), dtype=dtype, device=device
    )
    angles = 3 * torch.randn(POSITIONS, head_size // 2, device=device, generator=random)
    both = torch.cat((angles, angles), -1)
    return Case(
        qkv=numbers(tokens, heads + 2 * kv_heads, head_size),
        pool=pool,
        slots=torch.randperm(NUM_BLOCKS * block_tokens, device=device, generator=random)[:tokens],
        positions=torch.randint(POSITIONS, (tokens,), device=device, generator=random),
        angles=angles,
        cos=both.cos().to(dtype),
        sin=signed_sin(both.sin()).to(dtype),
        norms=HeadNorms(numbers(head_size), numbers(head_size), EPS) if normed else None,
    )


def run(case: Case, out: Tensor | None = None) -> Tensor:
    rotation = plan_rotation(case.cos, case.sin, case.positions, case.pool)
    return rotary_write(case.qkv, rotation, case.pool, LAYER, case.slots, case.norms, out=out)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Each element by its head's largest: where two products nearly cancel, their own roundings remain."""
    room = BOUND[found.dtype] * expected.abs() + 1e-6 * expected.abs().amax(-1, keepdim=True)
    assert ((found.double() - expected).abs() <= room).all(), (found.double() - expected).abs().max()


def assert_written(case: Case, expected: Tensor, kept: Tensor) -> None:
    """The tokens `kept` are in their slots; the rest of the pool is NaN, as it was."""
    heads = expected.shape[1] - 2 * case.pool.shape[3]
    slots, block_tokens = case.slots[kept], case.pool.shape[4]
    written = case.pool[slots // block_tokens, LAYER, :, :, slots % block_tokens].flatten(1, 2)
    assert_near(written, expected[kept, heads:])
    values = slice(heads + case.pool.shape[3], None)
    assert torch.equal(written[:, case.pool.shape[3] :], expected[kept, values].to(case.pool.dtype))
    case.pool[slots // block_tokens, LAYER, :, :, slots % block_tokens] = float("nan")
    assert case.pool.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 19])
def test_queries_are_turned_and_keys_and_values_lie_in_their_slots(
    tokens: int, shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    case = a_case(tokens, shape, dtype, random, normed)
    expected = case.expected()
    out = torch.full((tokens + 2, shape[0], shape[3]), float("nan"), dtype=dtype, device=random.device)
    q = run(case, out[1:-1])
    assert q.data_ptr() == out[1].data_ptr()
    assert_near(q, expected[:, : shape[0]])
    assert out[0].isnan().all()
    assert out[-1].isnan().all()
    assert_written(case, expected, torch.ones(tokens, dtype=torch.bool, device=random.device))


@pytest.mark.parametrize("normed", [False, True])
def test_queries_may_be_turned_where_they_are(normed: bool, random: torch.Generator) -> None:
    case = a_case(9, SHAPES[0], torch.bfloat16, random, normed)
    expected, before, pool = case.expected(), case.qkv.clone(), case.pool.clone()
    elsewhere = run(case, torch.empty_like(case.qkv[:, :32]))
    assert torch.equal(case.qkv, before)
    case.pool = pool
    q = run(case)
    assert torch.equal(q, elsewhere)
    assert torch.equal(case.qkv[:, 32:], before[:, 32:])
    assert_written(case, expected, torch.ones(9, dtype=torch.bool, device=random.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
def test_of_a_token_that_pads_nothing_is_written(normed: bool, dtype: torch.dtype, random: torch.Generator) -> None:
    case = a_case(11, (4, 2, 16, 80), dtype, random, normed)
    pads = torch.tensor([token in (0, 4, 5, 10) for token in range(11)], device=random.device)
    case.positions[pads] = 0
    expected = case.expected()
    case.slots[pads] = -1
    case.positions[pads] = 1 << 40  # it may be anything
    out = torch.full((11, 4, 80), float("nan"), dtype=dtype, device=random.device)
    run(case, out)
    assert out[pads].isnan().all()
    assert_near(out[~pads], expected[~pads, :4])
    assert_written(case, expected, ~pads)


def test_a_captured_rotation_reads_slots_and_positions_of_its_replay(random: torch.Generator) -> None:
    case = a_case(6, SHAPES[0], torch.bfloat16, random)
    expected, slots, positions = case.expected(), case.slots.clone(), case.positions.clone()
    case.slots.fill_(-1)
    case.positions.fill_(0)
    out = torch.empty_like(case.qkv[:, :32])
    run(case, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(case, out)
    case.slots.copy_(slots)
    case.positions.copy_(positions)
    graph.replay()
    assert_near(out, expected[:, :32])
    assert_written(case, expected, torch.ones(6, dtype=torch.bool, device=random.device))


def test_rows_may_lie_apart(random: torch.Generator) -> None:
    case = a_case(5, SHAPES[1], torch.bfloat16, random)
    expected = case.expected()
    wide = torch.full((5, 11, 64), float("nan"), dtype=torch.bfloat16, device=random.device)
    wide[:, 2:10] = case.qkv
    case.qkv = wide[:, 2:10]
    assert_near(run(case), expected[:, :4])
    assert wide[:, :2].isnan().all()
    assert wide[:, 10:].isnan().all()
    assert_written(case, expected, torch.ones(5, dtype=torch.bool, device=random.device))


def test_pairs_turn_as_complex_numbers(random: torch.Generator) -> None:
    case = a_case(6, (3, 1, 16, 64), torch.float32, random)
    expected = rotary_reference(case.qkv[:, :3].double(), case.angles[case.positions].double())
    torch.testing.assert_close(run(case).double(), expected, rtol=0, atol=1e-5)  # the tables are float32


@pytest.mark.parametrize("normed", [False, True])
def test_heads_that_no_kernel_takes_are_turned_too(normed: bool, random: torch.Generator) -> None:
    case = a_case(7, (4, 2, 16, 24), torch.bfloat16, random, normed)
    expected = case.expected()
    torch.testing.assert_close(run(case).double(), expected[:, :4], rtol=3e-2, atol=3e-2)  # torch rounds often
    block_tokens = case.pool.shape[4]
    written = case.pool[case.slots // block_tokens, LAYER, :, :, case.slots % block_tokens].flatten(1, 2)
    torch.testing.assert_close(written.double(), expected[:, 4:], rtol=3e-2, atol=3e-2)
