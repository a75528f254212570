"""Gathering and scattering blocks moves exactly the bytes named, at every size."""

import pytest
import torch
from torch import Tensor

from baton.kernels.block_copy import gather_blocks, scatter_blocks

CHUNK = 256 * 8 * 16  # bytes that one thread block copies
SIZES = [16, 48, 4096, CHUNK - 16, CHUNK, CHUNK + 16, 3 * CHUNK + 80, 2 << 20]


def a_pool(num_blocks: int, size: int, random: torch.Generator) -> Tensor:
    return torch.randint(256, (num_blocks, size), dtype=torch.uint8, device=random.device, generator=random)


def some_blocks(num_blocks: int, count: int, random: torch.Generator) -> Tensor:
    return torch.randperm(num_blocks, device=random.device, generator=random)[:count].to(torch.int32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_gather_takes_the_blocks_named_in_their_order(size: int, count: int, random: torch.Generator) -> None:
    pool = a_pool(40, size, random)
    before = pool.clone()
    ids = some_blocks(40, count, random)
    padded = torch.full((count + 2, size), 0xA5, dtype=torch.uint8, device=pool.device)
    gather_blocks(pool, ids, padded[1:-1])
    assert torch.equal(padded[1:-1], pool[ids.long()])
    assert (padded[0] == 0xA5).all()
    assert (padded[-1] == 0xA5).all()
    assert torch.equal(pool, before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_scatter_writes_the_blocks_named_and_no_other(size: int, count: int, random: torch.Generator) -> None:
    pool = a_pool(40, size, random)
    source = a_pool(count, size, random)
    ids = some_blocks(40, count, random)
    expected = pool.clone()
    expected[ids.long()] = source
    scatter_blocks(pool, ids, source)
    assert torch.equal(pool, expected)


def test_a_gather_may_take_a_block_twice_and_ids_of_64_bits(random: torch.Generator) -> None:
    pool = a_pool(4, 64, random)
    ids = torch.tensor([3, 0, 3], device=pool.device)
    out = torch.empty(3, 64, dtype=torch.uint8, device=pool.device)
    gather_blocks(pool, ids, out)
    assert torch.equal(out, pool[ids])


def test_no_blocks_are_no_work(random: torch.Generator) -> None:
    pool = a_pool(4, 64, random)
    before = pool.clone()
    none = torch.empty(0, dtype=torch.int32, device=pool.device)
    gather_blocks(pool, none, pool[:0])
    scatter_blocks(pool, none, pool[:0])
    assert torch.equal(pool, before)


def test_blocks_past_two_and_four_gigabytes_are_found(random: torch.Generator) -> None:
    size = 1 << 20
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    pool = torch.zeros(5000, size, dtype=torch.uint8, device=random.device)
    ids = torch.tensor([4999, 2047, 2049, 4097, 0], dtype=torch.int32, device=pool.device)
    source = a_pool(5, size, random)
    scatter_blocks(pool, ids, source)
    assert torch.equal(pool[ids.long()], source)
    assert pool.count_nonzero(1).bool().sum() == 5
    out = torch.empty_like(source)
    gather_blocks(pool, ids, out)
    assert torch.equal(out, source)


def test_a_copy_follows_the_work_of_its_stream(random: torch.Generator) -> None:
    pool = torch.zeros(8, 1 << 20, dtype=torch.uint8, device=random.device)
    ids = torch.arange(8, dtype=torch.int32, device=pool.device)
    out = torch.empty_like(pool)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms, then the fill: a launch on another stream would copy zeros
        pool.fill_(7)
        gather_blocks(pool, ids, out)
    side.synchronize()
    assert (out == 7).all()
