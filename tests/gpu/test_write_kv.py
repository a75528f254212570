"""New tokens' keys and values land in their slots, and nothing else changes."""

import pytest
import torch

from baton.kernels.write_kv import write_kv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_shape", [(8, 16, 128), (2, 16, 64), (1, 48, 80), (3, 32, 96)])
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_each_token_lands_in_its_slot_and_no_other_byte_changes(
    num_tokens: int, kv_shape: tuple[int, int, int], dtype: torch.dtype, random: torch.Generator
) -> None:
    heads, block_tokens, head_size = kv_shape
    device = random.device
    num_blocks, num_layers, layer = 24, 3, 1
    pool = torch.full(
        (num_blocks, num_layers, 2, heads, block_tokens, head_size), float("nan"), dtype=dtype, device=device
    )
    slots = torch.randperm(num_blocks * block_tokens, device=device, generator=random)[:num_tokens]
    # As a model hands them over: slices of one product, so rows lie further apart than they are long.
    qkv = torch.randn(num_tokens, 4 * heads, head_size, device=device, generator=random).to(dtype)
    k, v = qkv[:, 2 * heads : 3 * heads], qkv[:, 3 * heads :]
    expected = pool.clone()
    expected[slots // block_tokens, layer, 0, :, slots % block_tokens] = k
    expected[slots // block_tokens, layer, 1, :, slots % block_tokens] = v
    write_kv(k, v, pool, layer, slots)
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))


def test_a_token_without_a_slot_is_left_out(random: torch.Generator) -> None:
    pool = torch.full((4, 1, 2, 2, 16, 64), float("nan"), dtype=torch.bfloat16, device=random.device)
    k, v = (torch.randn(3, 2, 64, device=random.device, generator=random).bfloat16() for _ in range(2))
    slots = torch.tensor([-1, 17, -1], device=random.device)
    expected = pool.clone()
    expected[1, 0, 0, :, 1], expected[1, 0, 1, :, 1] = k[1], v[1]
    write_kv(k, v, pool, 0, slots)
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))
