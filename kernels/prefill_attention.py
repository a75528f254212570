"""Prefill attention over a paged KV pool: chunks of prompts, each after its own cached prefix."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .prefill_tiles import TilePlan, tile_library, tile_prefill_attention


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence's part of a step."""

    start: int  # its queries are rows [start, end) of q
    end: int
    context_len: int
    rows: Tensor  # [2 * G * B] i64: where its K, then V, of layer 0 lie in pool.view(-1, P * D)
    masks: dict[int | None, Tensor | None]  # window -> [end - start, context_len] bool, None: plainly causal, no prefix


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What all layers of one step share: the kernel's plan where it serves, else the torch path's."""

    chunks: tuple[_Chunk, ...]
    tiles: TilePlan | None = None


def paged_prefill_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
    plan: PrefillPlan | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks of several sequences over their own contexts, cached prefix and chunk.

    q [T, H, D], the chunks one after the other; pool [N, L, 2, G, P, D], contiguous; block_tables [S, B] i32;
    query_starts S + 1 ints, chunk s is rows [query_starts[s], query_starts[s + 1]); context_lens S ints, the chunk
    counted and its K and V written already; window: a query sees the last `window` keys up to itself. plan:
    `plan_prefill(...)` of these, the same for all layers of a step; None: made here. lse: [T, H] f32, contiguous, gets
    the logarithm of each row's sum of exponentials, where `is_tiled(pool)` alone. -> [T, H, D], or `out`.
    """
    _, num_layers, _, heads, block_tokens, head_size = pool.shape
    assert q.ndim == 3, q.shape
    assert q.shape[2] == head_size, (q.shape, pool.shape)
    assert q.shape[1] % heads == 0, (q.shape, pool.shape)
    assert len(query_starts) == len(context_lens) + 1 == block_tables.shape[0] + 1, (query_starts, context_lens)
    assert query_starts[-1] == q.shape[0], (query_starts, q.shape)
    assert 0 <= layer < num_layers, (layer, pool.shape)
    result = (
        out if out is not None and out.is_contiguous() else torch.empty_like(q, memory_format=torch.contiguous_format)
    )
    assert result.shape == q.shape, (result.shape, q.shape)
    assert result.dtype == q.dtype, (result.dtype, q.dtype)
    if plan is None:
        plan = plan_prefill(pool, block_tables, query_starts, context_lens, {window})
    if plan.tiles is not None:
        tile_prefill_attention(q, pool, layer, block_tables, scale, window, plan.tiles, result, lse)
    else:
        assert lse is None, "only the kernel gives it"
        lines = pool.view(-1, block_tokens * head_size)[layer * 2 * heads :]
        for chunk in plan.chunks:
            gathered = lines.index_select(0, chunk.rows).view(2, heads, 1, -1, head_size)
            mine = slice(chunk.start, chunk.end)
            result[mine] = _attend(q[mine], gathered[:, :, :, : chunk.context_len], chunk.masks[window], scale)
    return result if out is None or out is result else out.copy_(result)


def is_tiled(pool: Tensor) -> bool:
    """The kernel for Hopper serves such a pool."""
    return tile_library(pool) is not None


def plan_prefill(
    pool: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    windows: Set[int | None],
    exact: bool = False,
) -> PrefillPlan:
    """The plan of a step whose layers use these windows. Waits for no GPU where `is_tiled(pool)`.

    exact: a token's result is bit for bit the same in every chunk, and as an exact `plan_decode` has it; where
    `is_tiled(pool)` alone.
    """
    if tile_library(pool) is not None:
        return PrefillPlan((), TilePlan(query_starts, context_lens, exact))
    assert not exact, "no kernel for such a pool is exact"
    _, num_layers, _, heads, block_tokens, _ = pool.shape
    of_head = torch.arange(2 * heads, device=pool.device)[:, None]
    chunks = []
    for index, context_len in enumerate(context_lens):
        start, end = query_starts[index], query_starts[index + 1]
        num_blocks = -(-context_len // block_tokens)
        first = block_tables[index, :num_blocks].long() * (num_layers * 2 * heads)
        rows = (first[None, :] + of_head).view(-1)
        masks = {window: _mask(end - start, context_len, window, pool.device) for window in windows}
        chunks.append(_Chunk(start, end, context_len, rows, masks))
    return PrefillPlan(tuple(chunks))


def _mask(num_queries: int, context_len: int, window: int | None, device: torch.device) -> Tensor | None:
    if num_queries == context_len and (window is None or window >= context_len):
        return None
    query = torch.arange(context_len - num_queries, context_len, device=device)[:, None]
    key = torch.arange(context_len, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _attend(q: Tensor, kv: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [n, H, D], kv [2, G, 1, C, D] -> [n, H, D]."""
    num_queries, num_heads, head_size = q.shape
    heads = kv.shape[1]
    # Sequence of KV heads as batch, the query heads that share one as heads: K and V are expanded without a copy.
    queries = q.view(num_queries, heads, num_heads // heads, head_size).permute(1, 2, 0, 3)
    keys, values = kv.expand(2, heads, num_heads // heads, kv.shape[3], head_size).unbind(0)
    result = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return result.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_size)
