"""Write the K and V of a step's tokens into the paged pool."""

import ctypes

import torch
from torch import Tensor

from .build import cuda_library, stream, vector_rows


def write_kv(k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor, plan: Tensor | None = None) -> None:
    """pool[slot // P, layer, 0 | 1, :, slot % P] = k | v for each token.

    k, v [T, G, D]; pool [N, L, 2, G, P, D], contiguous; slots [T] i64 = block * P + offset, all different; where a
    kernel serves, a slot may be -1, and its token is left out.
    plan: `plan_write(pool, slots)`, the same for all layers of a step; None: made here.
    """
    _, num_layers, _, heads, block_tokens, head_size = pool.shape
    assert k.shape == v.shape == (slots.shape[0], heads, head_size), (k.shape, v.shape, slots.shape, pool.shape)
    assert 0 <= layer < num_layers, (layer, pool.shape)
    library = _cuda_library(pool) if plan is None else None  # a plan is of the torch path
    if library is not None:
        _launch(library, k, v, pool, layer, slots)
        return
    rows = _rows(slots, pool) if plan is None else plan
    # Rows are those of layer 0; starting the view at this layer's first row moves all of them.
    lines = pool.view(-1, head_size)[layer * 2 * heads * block_tokens :]
    lines.index_copy_(0, rows, torch.cat((k, v), 1).view(-1, head_size))


def plan_write(pool: Tensor, slots: Tensor) -> Tensor | None:
    """What all layers of a step share; None where a CUDA kernel serves, which needs nothing.    slots [T] i64."""
    return None if _cuda_library(pool) is not None else _rows(slots, pool)


def _cuda_library(pool: Tensor) -> ctypes.CDLL | None:
    return cuda_library(pool.device) if pool.shape[-1] * pool.element_size() % 16 == 0 else None


def _rows(slots: Tensor, pool: Tensor) -> Tensor:
    """Rows of `pool.view(-1, D)` in layer 0 for each slot's K heads, then V heads.    slots [T] -> [T * 2 * G] i64."""
    _, num_layers, _, heads, block_tokens, _ = pool.shape
    first = (slots // block_tokens) * (num_layers * 2 * heads * block_tokens) + slots % block_tokens
    of_head = torch.arange(2 * heads, device=slots.device) * block_tokens
    return (first[:, None] + of_head).view(-1)


def _launch(library: ctypes.CDLL, k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor) -> None:
    assert k.dtype == v.dtype == pool.dtype, (k.dtype, v.dtype, pool.dtype)
    assert slots.dtype == torch.int64, slots.dtype
    assert k.device == v.device == slots.device == pool.device, (k.device, v.device, slots.device, pool.device)
    assert pool.is_contiguous(), pool.stride()
    assert slots.is_contiguous(), slots.stride()
    _, num_layers, _, heads, block_tokens, head_size = pool.shape
    per_vec = 16 // pool.element_size()
    k, v = vector_rows(k), vector_rows(v)
    library.write_kv(
        k.data_ptr(),
        v.data_ptr(),
        pool.data_ptr(),
        slots.data_ptr(),
        k.stride(0) // per_vec,
        v.stride(0) // per_vec,
        k.shape[0],
        num_layers,
        layer,
        heads,
        block_tokens,
        head_size // per_vec,
        stream(pool.device),
    )
