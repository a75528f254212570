"""Gather and scatter whole blocks: how KV leaves and enters a pool."""

import torch
from torch import Tensor

from .build import cuda_library, stream


def gather_blocks(pool: Tensor, ids: Tensor, out: Tensor) -> None:
    """out[i] = pool[ids[i]].    pool [N, B] u8, ids [n] i32 or i64, out [n, B] u8; B a multiple of 16; ids in range."""
    _check(pool, ids, out)
    library = cuda_library(pool.device)
    if library is None:
        torch.index_select(pool, 0, ids, out=out)
        return
    ids = _on_device(pool, ids, out)
    vecs = pool.shape[1] // 16
    library.gather_blocks(pool.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), vecs, stream(pool.device))


def scatter_blocks(pool: Tensor, ids: Tensor, source: Tensor) -> None:
    """pool[ids[i]] = source[i].    pool [N, B] u8, ids [n] i32 or i64, all different, source [n, B] u8."""
    _check(pool, ids, source)
    library = cuda_library(pool.device)
    if library is None:
        pool.index_copy_(0, ids.long(), source)
        return
    ids = _on_device(pool, ids, source)
    vecs = pool.shape[1] // 16
    library.scatter_blocks(pool.data_ptr(), ids.data_ptr(), source.data_ptr(), len(ids), vecs, stream(pool.device))


def _check(pool: Tensor, ids: Tensor, blocks: Tensor) -> None:
    assert pool.dtype == blocks.dtype == torch.uint8, (pool.dtype, blocks.dtype)
    assert pool.ndim == 2, pool.shape
    assert blocks.shape == (ids.shape[0], pool.shape[1]), (pool.shape, ids.shape, blocks.shape)
    assert pool.shape[1] % 16 == 0, pool.shape


def _on_device(pool: Tensor, ids: Tensor, blocks: Tensor) -> Tensor:
    """Check what a launch relies on; the ids as the kernel reads them."""
    assert pool.device == ids.device == blocks.device, (pool.device, ids.device, blocks.device)
    for tensor in (pool, blocks):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.data_ptr() % 16 == 0, "not on a boundary of 16 bytes"
    return ids.to(torch.int32).contiguous()
