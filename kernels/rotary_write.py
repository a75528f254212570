"""From the product of q, k and v to what attention reads: heads normed and turned, k and v in the pool."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import DTYPES, cuda_library, stream, vector_rows, whole_vectors
from .norm import rms_norm
from .rotary import rotary
from .write_kv import write_kv

_MAX_HALF = 32  # 16-byte vectors in half a head: a warp's


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The RMS norm of each head of q and k, before it is turned."""

    q: Tensor  # weights [D]
    k: Tensor  # weights [D]
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of a step's tokens: tables and where to look, for a kernel; else a row for each token."""

    cos: Tensor  # [positions, D]; or [T, 1, D]
    sin: Tensor  # as cos, signed: its first half is negated
    positions: Tensor | None  # [T] i64; None: of the torch path


def plan_rotation(cos: Tensor, sin: Tensor, positions: Tensor, pool: Tensor) -> Rotation:
    """What all layers of a step share: a kernel reads the tables itself, torch's path has its rows gathered once.

    cos, sin [positions, D], whose halves are the same but for the sign of `signed_sin`; positions [T] i64.
    """
    if _cuda_library(pool) is not None:
        for table in (cos, sin):
            assert table.shape == (len(cos), pool.shape[-1]), (table.shape, pool.shape)
            assert table.dtype == pool.dtype, (table.dtype, pool.dtype)
            assert table.device == positions.device == pool.device, (table.device, positions.device, pool.device)
            assert whole_vectors(table), table.stride()
        assert positions.dtype == torch.int64, positions.dtype
        assert positions.is_contiguous(), positions.stride()
        return Rotation(cos, sin, positions)
    return Rotation(cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None], None)


def rotary_write(
    qkv: Tensor,
    rotation: Rotation,
    pool: Tensor,
    layer: int,
    slots: Tensor,
    norms: HeadNorms | None = None,
    write_plan: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q's heads, turned; k's heads, turned, and v's are written into the pool: see `write_kv`.

    qkv [T, H + 2G, D], q's heads first, then k's and v's, in the pool's dtype, tokens any distance apart;
    rotation: `plan_rotation` of these tokens and this pool; pool [N, L, 2, G, P, D], contiguous; slots [T] i64 =
    block * P + offset, all different, or, where a kernel serves, -1: the token pads its step, nothing of it is written;
    norms: of the heads of q and k, before they are turned; write_plan: `plan_write(pool, slots)`, None: made here.
    -> [T, H, D]: `out`, or new; where a kernel serves, a part of qkv, which is changed.
    """
    kv_heads, head_size = pool.shape[3], pool.shape[5]
    heads = qkv.shape[1] - 2 * kv_heads
    assert heads > 0, (qkv.shape, pool.shape)
    assert qkv.shape[2] == head_size, (qkv.shape, pool.shape)
    if rotation.positions is not None:
        return _launch(qkv, rotation, rotation.positions, pool, layer, slots, norms, out)
    q_and_k, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if norms is not None:
        q, k = q_and_k[:, :heads], q_and_k[:, heads:]
        q_and_k = torch.cat((rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)), 1)
    q_and_k = rotary(q_and_k, rotation.cos, rotation.sin)
    write_kv(q_and_k[:, heads:], v, pool, layer, slots, write_plan)
    q = q_and_k[:, :heads]
    return q if out is None else out.copy_(q)


def _cuda_library(pool: Tensor) -> ctypes.CDLL | None:
    """The CUDA library where it has this op for such a pool."""
    half_bytes = pool.shape[-1] * pool.element_size() // 2
    if pool.dtype not in DTYPES or half_bytes % 16 != 0 or half_bytes > _MAX_HALF * 16:
        return None
    return cuda_library(pool.device)


def _launch(
    qkv: Tensor,
    rotation: Rotation,
    positions: Tensor,
    pool: Tensor,
    layer: int,
    slots: Tensor,
    norms: HeadNorms | None,
    out: Tensor | None,
) -> Tensor:
    library = _cuda_library(pool)
    assert library is not None, "a rotation planned for another pool"
    num_blocks, num_layers, _, kv_heads, block_tokens, head_size = pool.shape
    heads = qkv.shape[1] - 2 * kv_heads
    assert slots.shape == positions.shape == qkv.shape[:1], (slots.shape, positions.shape, qkv.shape)
    assert slots.dtype == torch.int64, slots.dtype
    assert slots.is_contiguous(), slots.stride()
    assert 0 <= layer < num_layers, (layer, pool.shape)
    assert pool.is_contiguous(), pool.stride()
    assert num_blocks * block_tokens < 1 << 31, pool.shape
    assert qkv.dtype == pool.dtype, (qkv.dtype, pool.dtype)
    assert qkv.device == slots.device == pool.device, (qkv.device, slots.device, pool.device)
    for weight in () if norms is None else (norms.q, norms.k):
        assert weight.shape == (head_size,), (weight.shape, pool.shape)
        assert weight.dtype == pool.dtype, (weight.dtype, pool.dtype)
        assert weight.device == pool.device, (weight.device, pool.device)
        assert whole_vectors(weight), weight.stride()
    qkv = vector_rows(qkv)
    q = qkv[:, :heads] if out is None else out
    assert q.shape == (qkv.shape[0], heads, head_size), (q.shape, qkv.shape)
    assert q.dtype == qkv.dtype, (q.dtype, qkv.dtype)
    assert vector_rows(q) is q, (q.stride(), q.data_ptr())
    per_vec = 16 // pool.element_size()
    library.rotary_write(
        qkv.data_ptr(),
        q.data_ptr(),
        rotation.cos.data_ptr(),
        rotation.sin.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        pool.data_ptr(),
        None if norms is None else norms.q.data_ptr(),
        None if norms is None else norms.k.data_ptr(),
        DTYPES[pool.dtype],
        qkv.stride(0) // per_vec,
        q.stride(0) // per_vec,
        qkv.shape[0],
        heads,
        kv_heads,
        block_tokens,
        num_layers,
        layer,
        head_size // 2 // per_vec,
        0.0 if norms is None else norms.eps,
        stream(pool.device),
    )
    return q
