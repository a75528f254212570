"""A pool in the memory of two processes."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from baton.core.tickets import Geometry
from baton.engine.kv_cache import KvCache, num_blocks_for
from baton.engine.parallel.communicator import RankLost
from baton.engine.parallel.shared_pool import _DEVICE_ARGUMENT, SharedPool, open_pool

from ....ranks import Ranks
from .works import write_into_each_other

CPU = torch.device("cpu")
GEOMETRY = Geometry(num_layers=3, num_kv_heads=4, head_size=8, block_tokens=16, dtype="bfloat16", fingerprint="m")


def test_what_a_rank_writes_the_others_read(ranks: Ranks) -> None:
    before = set(Path("/dev/shm").iterdir())
    assert ranks.run(write_into_each_other, 2) == [[5.0, 6.0, 0.0, 0.0]] * 2
    assert set(Path("/dev/shm").iterdir()) == before


def test_a_closed_pool_stays_with_those_who_have_it_and_is_shut_to_others() -> None:
    pool = SharedPool.create((2, 3), torch.float32, CPU)
    mine = open_pool(pool.handle, CPU)
    pool.close()
    pool.tensor.fill_(4)
    assert torch.equal(mine, torch.full((2, 3), 4.0))
    with pytest.raises(RankLost):
        open_pool(pool.handle, CPU)


def test_a_rank_holds_its_heads_of_each_block() -> None:
    cache = KvCache(5, GEOMETRY, CPU, range(2, 4), shared=True)
    assert cache.pool.shape == (5, 3, 2, 2, 16, 8)
    assert cache.block_bytes_view.shape == (5, GEOMETRY.block_bytes // 2)
    assert num_blocks_for(GEOMETRY.block_bytes, GEOMETRY, range(2, 4)) == 2
    assert num_blocks_for(GEOMETRY.block_bytes, GEOMETRY) == 1


def test_torch_still_takes_the_device_where_a_handle_has_it() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert names.index("storage_device") == _DEVICE_ARGUMENT
