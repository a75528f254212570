"""Blocks of several ranks' pools read and written as one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.ids import BlockId
from baton.kv_transfer.pool import BlockPool
from baton.kv_transfer.rank_pools import RankPools

BLOCKS, LAYERS, TOKENS, SIZE = 7, 2, 4, 8


def heads_of(num_heads: int, size: int) -> list[range]:
    """As tensor-parallel ranks hold them."""
    held = max(1, num_heads // size)
    return [range(first, first + held) for first in (rank * num_heads // size for rank in range(size))]


def some_pools(heads: list[range], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(BLOCKS, LAYERS, 2, len(held), TOKENS, SIZE, dtype=dtype) for held in heads]


@given(
    num_heads=st.sampled_from([1, 2, 4]),
    source_size=st.sampled_from([1, 2, 4]),
    reader_size=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    moves=st.lists(
        st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)),
        max_size=5,
        unique_by=(lambda m: m[0], lambda m: m[1]),
    ),
)
@settings(deadline=None)
def test_blocks_move_between_workers_that_split_the_heads_differently(
    num_heads: int, source_size: int, reader_size: int, dtype: torch.dtype, moves: list[tuple[int, int]]
) -> None:
    whole = torch.randn(BLOCKS, LAYERS, 2, num_heads, TOKENS, SIZE).to(dtype)
    source_heads, reader_heads = heads_of(num_heads, source_size), heads_of(num_heads, reader_size)
    there = [whole[:, :, :, held.start : held.stop].contiguous() for held in source_heads]
    here = some_pools(reader_heads, dtype)
    source, reader = RankPools(there, source_heads), RankPools(here, reader_heads)
    plain = BlockPool(whole.view(BLOCKS, -1).view(torch.uint8))
    assert source.block_bytes == reader.block_bytes == plain.block_bytes
    sent, taken = [BlockId(a) for a, _ in moves], [BlockId(b) for _, b in moves]
    data = source.gather(sent)
    assert np.array_equal(data, plain.gather(sent))
    reader.scatter(taken, data)
    expected = torch.zeros_like(whole)
    for a, b in moves:
        expected[b] = whole[a]
    for pool, held in zip(here, reader_heads, strict=True):  # every replica has it
        assert torch.equal(pool, expected[:, :, :, held.start : held.stop])


@pytest.mark.parametrize("heads", [[range(1), range(2, 3)], [range(1), range(2)]])
def test_pools_that_do_not_make_up_a_block_are_refused(heads: list[range]) -> None:
    with pytest.raises(AssertionError):
        RankPools(some_pools([range(1), range(1)], torch.float32), heads)
