"""Prefill attention on Hopper's matrix units: `paged_prefill_attention` for bfloat16 pools there.

Exact plans cut all keys at the same places, counted from a context's beginning, whatever else is in the step. Then a
token's result is bit for bit the same in a chunk of any length, and alone, as when its sequence decodes.
"""

import ctypes
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .build import cuda_library, multiprocessors, stream, vector_rows
from .split_attention import SplitWorkspace

TILE_HEAD_SIZES = (64, 128)  # those that csrc/prefill_attention.cu is compiled for
_ROWS = 128  # (token, query head) pairs of an item
_KEYS = 128  # of a tile
_LEAST_TILES = 8  # that are worth a part of their own: merging costs about as much as two
# Of an exact plan. Longer pieces leave a card idle where few sequences decode, shorter ones make more sums to merge. 8
# and 32 are worth a try; results then differ in their last bits.
_PIECE_TILES = 16
_EXACT_PARTS = 4096  # of all KV heads that one launch leaves to merge, 64 KB each at most: more make more launches

Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TileWork:
    """What layers of one kind do: see csrc/prefill_attention.cu for the fields."""

    items: Tensor  # [I, 8] i32, the longest first
    merges: Tensor  # [M, 4] i32, of items that were cut
    parts: int  # into so many, all of them together
    partial: Tensor  # f32, not initialised
    part_rows: int = _ROWS  # of each part in it
    counts: Tensor | None = None  # [2] i32: how many items and merges there are; None: all


class TilePlan:
    """Where the chunks of one step lie, and for each kind of layer its work, made when first asked for."""

    def __init__(self, query_starts: Sequence[int], context_lens: Sequence[int], exact: bool = False) -> None:
        self._starts = np.asarray(query_starts, np.int64)
        self._contexts = np.asarray(context_lens, np.int64)
        self._exact = exact
        self._work: dict[tuple[int, int, int | None], list[TileWork]] = {}
        self._taken: Tensor | None = None

    def work(self, q: Tensor, kv_heads: int, window: int | None) -> list[TileWork]:
        """Of one launch each.    q [T, H, D]: of such a layer."""
        _, heads, head_size = q.shape
        work = self._work.get((heads, kv_heads, window))
        if work is None:
            items = items_of(self._starts, self._contexts, heads // kv_heads, window)
            if self._exact:
                made = [cut_pieces(group) for group in groups_of(items, max(1, _EXACT_PARTS // kv_heads))]
            else:
                made = [cut(items, kv_heads, multiprocessors(q.device))]
            host = torch.from_numpy(np.concatenate([array.ravel() for one in made for array in one]))
            if q.device.type == "cuda":
                host = host.pin_memory()  # so that the copy waits for nothing
            sizes = [array.size for one in made for array in one]
            on_device = iter(host.to(q.device, non_blocking=True).split_with_sizes(sizes))
            parts = [int(merges[:, 3].sum()) for _, merges in made]
            size = max(parts) * kv_heads * _ROWS * (head_size + 1)
            partial = torch.empty(size, dtype=torch.float32, device=q.device)
            work = self._work[heads, kv_heads, window] = [
                TileWork(next(on_device).view(-1, 8), next(on_device).view(-1, 4), count, partial) for count in parts
            ]
        return work

    def taken(self, device: torch.device) -> Tensor:
        """[2] i32 zeros, which each launch leaves as it found them."""
        if self._taken is None:
            self._taken = torch.zeros(2, dtype=torch.int32, device=device)
        return self._taken


class TokenPlan:
    """Where the newest token of each of S sequences finds its keys, made on the device: it can be captured. Exact."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        windows: Set[int | None],
        workspace: SplitWorkspace,
    ) -> None:
        """As `plan_decode` takes them; context_lens [S] i32, of which those of 0 are nobody's and get nothing."""
        self._workspace = workspace
        width = block_tables.shape[1] * pool.shape[4]  # tokens: none has more
        self._count = len(context_lens)
        self._pieces = max(1, -(-width // (_KEYS * _PIECE_TILES)))  # of one sequence at most
        self._plans: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        for window in windows:
            sizes = [self._count * self._pieces * 8, self._count * 4, 2]
            memory = torch.empty(sum(sizes), dtype=torch.int32, device=context_lens.device)
            items, merges, counts = memory.split_with_sizes(sizes)
            library.plan_token_pieces(
                context_lens.data_ptr(),
                items.data_ptr(),
                merges.data_ptr(),
                counts.data_ptr(),
                self._count,
                window or 0,
                _PIECE_TILES,
                stream(context_lens.device),
            )
            self._plans[window] = items.view(-1, 8), merges.view(-1, 4), counts

    def work(self, q: Tensor, kv_heads: int, window: int | None) -> list[TileWork]:
        """q [S, H, D]: of such a layer."""
        items, merges, counts = self._plans[window]
        group, cut_up = q.shape[1] // kv_heads, self._pieces > 1
        parts = self._count * self._pieces if cut_up else 0
        partial = self._workspace.partial(parts * kv_heads * group * (q.shape[2] + 1), q.device)
        return [TileWork(items, merges if cut_up else merges[:0], parts, partial, group, counts)]

    def taken(self, device: torch.device) -> Tensor:
        """[2] i32 zeros, which each launch leaves as it found them."""
        return self._workspace.arrived(2, device)


def items_of(starts: npt.NDArray[np.int64], contexts: npt.NDArray[np.int64], group: int, window: int | None) -> Array:
    """The work of one KV head: every token of every chunk is in one item.

    starts [S + 1], contexts [S] -> [I, 8]: first row of q, tokens, position of the first, context, sequence, first tile
    of keys and the one past the last, 0.
    """
    assert 0 < group <= _ROWS, group
    step = _ROWS // group
    counts = np.diff(starts)
    sequence, number = _numbered(-(-counts // step))
    first = number * step
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
    source, piece = _numbered(pieces)
    tiles, count = (end - begin)[source], pieces[source]
    return _cut_at(items, pieces, begin[source] + tiles * piece // count, begin[source] + tiles * (piece + 1) // count)


def cut_pieces(items: Array) -> tuple[Array, Array]:
    """Items cut at multiples of `_PIECE_TILES`, the longest first, and how to merge them; as `cut` gives them."""
    pieces = _fixed_pieces(items)
    source, piece = _numbered(pieces)
    begin = (items[source, 5] // _PIECE_TILES + piece) * _PIECE_TILES
    ends = np.minimum(items[source, 6], begin + _PIECE_TILES)
    return _cut_at(items, pieces, np.maximum(items[source, 5], begin), ends)


def groups_of(items: Array, most_parts: int) -> list[Array]:
    """Items of `items_of` in groups that `cut_pieces` makes no more parts of; one has more where a single item does."""
    pieces = _fixed_pieces(items)
    parts = np.where(pieces > 1, pieces, 0)
    groups, begin, count = [], 0, 0
    for at, more in enumerate(parts.tolist()):
        if count and count + more > most_parts:
            groups.append(items[begin:at])
            begin, count = at, 0
        count += more
    return [*groups, items[begin:]]


def _fixed_pieces(items: Array) -> npt.NDArray[np.int64]:
    """How many each is cut into at multiples of `_PIECE_TILES`."""
    return ((items[:, 6] - 1) // _PIECE_TILES - items[:, 5] // _PIECE_TILES + 1).astype(np.int64)


def _cut_at(
    items: Array, pieces: npt.NDArray[np.int64], begins: npt.NDArray[Any], ends: npt.NDArray[Any]
) -> tuple[Array, Array]:
    """Items in so many pieces each, from the first tile of each piece to the one past its last; as `cut` gives them."""
    source, piece = _numbered(pieces)
    parts = np.where(pieces > 1, pieces, 0)
    first_part = np.cumsum(parts) - parts
    merges = np.stack((items[:, 0], items[:, 1], first_part, parts), 1)[parts > 0].astype(np.int32)
    made = items[source]
    made[:, 5], made[:, 6] = begins, ends
    made[:, 7] = np.where(pieces[source] > 1, first_part[source] + piece + 1, 0)
    return made[np.argsort(made[:, 5] - made[:, 6], kind="stable")], merges


def _numbered(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[2, 3] -> ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]): whose each is, and which of its."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def tile_library(pool: Tensor) -> ctypes.CDLL | None:
    """The CUDA library where it has this op for such a pool."""
    block_tokens, head_size = pool.shape[-2:]
    if pool.dtype != torch.bfloat16 or head_size not in TILE_HEAD_SIZES or block_tokens % 16 != 0:
        return None
    if pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device) != (9, 0):
        return None
    return cuda_library(pool.device)


def tile_prefill_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    plan: TilePlan | TokenPlan,
    out: Tensor,
    lse: Tensor | None = None,
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
    for work in plan.work(q, kv_heads, window):
        library.prefill_attention(
            q.data_ptr(),
            pool.data_ptr(),
            block_tables.data_ptr(),
            work.items.data_ptr(),
            work.merges.data_ptr(),
            None if work.counts is None else work.counts.data_ptr(),
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
            work.part_rows,
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
