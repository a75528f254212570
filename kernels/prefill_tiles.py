"""Prefill attention on Hopper's matrix units: `paged_prefill_attention` for bfloat16 pools there."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .build import cuda_library, multiprocessors, stream, vector_rows

TILE_HEAD_SIZES = (64, 128)  # those that csrc/prefill_attention.cu is compiled for
_ROWS = 128  # (token, query head) pairs of an item
_KEYS = 128  # of a tile
_LEAST_TILES = 8  # that are worth a part of their own: merging costs about as much as two

Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TileWork:
    """What layers of one kind do: see csrc/prefill_attention.cu for the fields."""

    items: Tensor  # [I, 8] i32, the longest first
    merges: Tensor  # [M, 4] i32, of items that were cut
    parts: int  # into so many, all of them together
    partial: Tensor  # f32, not initialised


class TilePlan:
    """Where the chunks of one step lie, and for each kind of layer its work, made when first asked for."""

    def __init__(self, query_starts: Sequence[int], context_lens: Sequence[int]) -> None:
        self._starts = np.asarray(query_starts, np.int64)
        self._contexts = np.asarray(context_lens, np.int64)
        self._work: dict[tuple[int, int, int | None], TileWork] = {}
        self._taken: Tensor | None = None

    def work(self, q: Tensor, kv_heads: int, window: int | None) -> TileWork:
        """q [T, H, D]: of such a layer."""
        _, heads, head_size = q.shape
        work = self._work.get((heads, kv_heads, window))
        if work is None:
            blocks = multiprocessors(q.device)
            items, merges = cut(items_of(self._starts, self._contexts, heads // kv_heads, window), kv_heads, blocks)
            host = torch.from_numpy(np.concatenate((items.ravel(), merges.ravel())))
            if q.device.type == "cuda":
                host = host.pin_memory()  # so that the copy waits for nothing
            on_device = host.to(q.device, non_blocking=True)
            parts = int(merges[:, 3].sum())
            partial = torch.empty(parts * kv_heads * _ROWS * (head_size + 1), dtype=torch.float32, device=q.device)
            whole = on_device[: items.size].view(items.shape), on_device[items.size :].view(merges.shape)
            work = self._work[heads, kv_heads, window] = TileWork(*whole, parts, partial)
        return work

    def taken(self, device: torch.device) -> Tensor:
        """[2] i32 zeros, which each launch leaves as it found them."""
        if self._taken is None:
            self._taken = torch.zeros(2, dtype=torch.int32, device=device)
        return self._taken


def items_of(starts: npt.NDArray[np.int64], contexts: npt.NDArray[np.int64], group: int, window: int | None) -> Array:
    """The work of one KV head: every token of every chunk is in one item.

    starts [S + 1], contexts [S] -> [I, 8]: first row of q, tokens, position of the first, context, sequence, first tile
    of keys and the one past the last, 0.
    """
    assert 0 < group <= _ROWS, group
    step = _ROWS // group
    counts = np.diff(starts)
    pieces = -(-counts // step)
    sequence = np.repeat(np.arange(len(counts)), pieces)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * step
    tokens = np.minimum(step, counts[sequence] - first)
    position = contexts[sequence] - counts[sequence] + first
    end = -(-(position + tokens) // _KEYS)
    begin = np.zeros_like(end) if window is None else np.maximum(0, position - window + 1) // _KEYS
    fields = (starts[sequence] + first, tokens, position, contexts[sequence], sequence, begin, end, np.zeros_like(end))
    return np.stack(fields, 1).astype(np.int32)


def cut(items: Array, kv_heads: int, blocks: int) -> tuple[Array, Array]:
    """Items none of which has much more than a thread block's share, the longest first, and how to merge those cut.

    items as `items_of` gives them -> [I', 8], the last field one more than a part's number or 0 for what is whole;
    [M, 4]: first row of q, tokens, first part, parts.
    """
    begin, end = items[:, 5].astype(np.int64), items[:, 6].astype(np.int64)
    share = max(_LEAST_TILES, -(-int((end - begin).sum()) * kv_heads // blocks))
    pieces = -(-(end - begin) // share)
    parts = np.where(pieces > 1, pieces, 0)
    first_part = np.cumsum(parts) - parts
    merges = np.stack((items[:, 0], items[:, 1], first_part, parts), 1)[parts > 0].astype(np.int32)
    source = np.repeat(np.arange(len(items)), pieces)
    piece = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    made = items[source]
    tiles, count = (end - begin)[source], pieces[source]
    made[:, 5] = begin[source] + tiles * piece // count
    made[:, 6] = begin[source] + tiles * (piece + 1) // count
    made[:, 7] = np.where(count > 1, first_part[source] + piece + 1, 0)
    return made[np.argsort(made[:, 5] - made[:, 6], kind="stable")], merges


def tile_library(pool: Tensor) -> ctypes.CDLL | None:
    """The CUDA library where it has this op for such a pool."""
    block_tokens, head_size = pool.shape[-2:]
    if pool.dtype != torch.bfloat16 or head_size not in TILE_HEAD_SIZES or block_tokens % 16 != 0:
        return None
    if pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device) != (9, 0):
        return None
    return cuda_library(pool.device)


def plan_tiles(query_starts: Sequence[int], context_lens: Sequence[int]) -> TilePlan:
    """The plan of one step for all its layers."""
    return TilePlan(query_starts, context_lens)


def tile_prefill_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    plan: TilePlan,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """See `paged_prefill_attention`. out [T, H, D], contiguous."""
    library = tile_library(pool)
    assert library is not None, (pool.dtype, pool.shape, pool.device)
    num_blocks, num_layers, _, kv_heads, block_tokens, head_size = pool.shape
    tokens, heads, _ = q.shape
    assert q.dtype == out.dtype == pool.dtype, (q.dtype, out.dtype, pool.dtype)
    assert block_tables.dtype == torch.int32, block_tables.dtype
    assert q.device == block_tables.device == pool.device == out.device, (q.device, block_tables.device, out.device)
    assert pool.is_contiguous(), pool.stride()
    assert block_tables.stride(1) == 1, block_tables.stride()
    assert window is None or window > 0, window
    if lse is not None:
        assert lse.shape == (tokens, heads), (lse.shape, q.shape)
        assert lse.dtype == torch.float32, lse.dtype
        assert lse.is_contiguous(), lse.stride()
    if tokens == 0:
        return
    q = vector_rows(q)
    work = plan.work(q, kv_heads, window)
    library.prefill_attention(
        q.data_ptr(),
        pool.data_ptr(),
        block_tables.data_ptr(),
        work.items.data_ptr(),
        work.merges.data_ptr(),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        work.partial.data_ptr(),
        plan.taken(q.device).data_ptr(),
        q.stride(0),
        num_blocks,
        tokens,
        len(work.items),
        len(work.merges),
        work.parts,
        heads,
        kv_heads,
        head_size,
        block_tokens,
        num_layers,
        layer,
        block_tables.stride(0),
        window or 0,
        multiprocessors(q.device),
        scale,
        stream(q.device),
    )
