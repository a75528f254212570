"""Decode attention over a paged KV pool: one query a sequence, or a few, and as many keys as its context has."""

import ctypes
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .build import DTYPES, cuda_library, stream, vector_rows
from .prefill_tiles import TokenPlan, tile_library, tile_prefill_attention
from .split_attention import MAX_TOKENS, SPLIT_HEAD_SIZES, SplitPlan, SplitWorkspace, plan_split, split_decode_attention

CUDA_HEAD_SIZES = (64, 80, 96, 128, 256)  # those that csrc/paged_attention.cu is compiled for


class Workspace:
    """Memory that a step's gathers write into, kept between steps: fresh large tensors cost a page fault every 4 KB."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self.split = SplitWorkspace()

    def take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """[rows, width] of like's dtype and device, not initialised; overwritten by the next take."""
        if self._memory is None or self._memory.numel() < rows * width or self._memory.dtype != like.dtype:
            self._memory = torch.empty(rows * width * 5 // 4, dtype=like.dtype, device=like.device)
        return self._memory[: rows * width].view(rows, width)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What all layers of one step share."""

    rows: Tensor  # [2 * S * G * B] i64: where K, then V, of layer 0 lie in pool.view(-1, P * D)
    num_blocks: int  # B, of the longest sequence
    common_len: int | None  # the context length, where all sequences have the same
    masks: dict[int | None, Tensor]  # window -> [S, 1, B * P] f32: 0, or -inf where there is nothing to see
    tails: Tensor  # [n] i64: of the gathered [2 * S * G * B * P, D], K and V past a context's end that a mask hides
    workspace: Workspace


def paged_decode_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    plan: DecodePlan | SplitPlan | TokenPlan | None = None,
    *,
    tokens: int = 1,
    soft_cap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """softmax(q K^T * scale) V of each sequence's newest tokens, each over its own context.

    q [S * Q, H, D], Q = `tokens`, a sequence's one after the other; pool [N, L, 2, G, P, D], contiguous, H a multiple
    of G; block_tables [S, B] i32; context_lens [S] i32, the new tokens counted and their K and V written already;
    window: a query sees the last `window` keys up to its own, None: all; soft_cap: scores become cap * tanh(score /
    cap), 0: they stay (Gemma 2, section 2); slopes [H] f32: slope * (key's position - query's) is added to a score
    (ALiBi; Press et al., 2022). Past a context's end its last block may hold anything that an earlier holder left
    there, NaN too, and unused entries of a table may hold any number. A context of 0 pads: on a GPU it gives zeros.
    plan: `plan_decode(...)` of these, the same for all layers of a step; None: made here. -> [S * Q, H, D], or `out`.
    """
    _, num_layers, _, heads, _, head_size = pool.shape
    assert q.ndim == 3, q.shape
    assert q.shape[2] == head_size, (q.shape, pool.shape)
    assert q.shape[1] % heads == 0, (q.shape, pool.shape)
    assert block_tables.shape[0] == context_lens.shape[0], (block_tables.shape, context_lens.shape)
    assert q.shape[0] == len(context_lens) * tokens, (q.shape, context_lens.shape, tokens)
    assert 1 <= tokens <= MAX_TOKENS, tokens
    assert slopes is None or (slopes.shape == q.shape[1:2] and slopes.dtype == torch.float32), slopes
    assert 0 <= layer < num_layers, (layer, pool.shape)
    plain = tokens == 1 and soft_cap == 0.0 and slopes is None
    if isinstance(plan, TokenPlan):
        assert plain, "no exact kernel has several tokens of a sequence, nor other scores"
        result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tile_prefill_attention(q, pool, layer, block_tables, scale, window, plan, result)
        return result if out is None else out.copy_(result)
    library = _cuda_library(pool)
    if library is not None and (plain or _splits(pool)):
        return _launch(
            library, q, pool, layer, block_tables, context_lens, scale, window, out, plan, tokens, soft_cap, slopes
        )
    if plain:
        if not isinstance(plan, DecodePlan):
            plan = _plan(pool, block_tables, context_lens, {window}, None)
        result = _attend(q, pool, layer, scale, window, plan)
    else:
        asking, lens = q.float().view(-1, tokens, *q.shape[1:]), context_lens.tolist()
        used = [table[: -(-length // pool.shape[4])] for table, length in zip(block_tables, lens, strict=True)]
        parts = [
            paged_attention_reference(one, pool, layer, table, length, scale, window, soft_cap, slopes)
            for one, table, length in zip(asking, used, lens, strict=True)
        ]
        result = torch.cat(parts).to(q.dtype)
    return result if out is None else out.copy_(result)


def plan_decode(
    pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    windows: Set[int | None],
    workspace: Workspace | None = None,
    tokens: int = 1,
    exact: bool = False,
) -> DecodePlan | SplitPlan | TokenPlan | None:
    """The plan of a step whose layers use these windows; None where a CUDA kernel serves that needs none.

    block_tables [S, B] i32, context_lens [S] i32; tokens: new ones of each sequence. exact: a token's result is, bit
    for bit, what an exact `plan_prefill` gives it in whatever chunk, by the same kernel; where `is_tiled(pool)` alone,
    and rows of nobody are not written.
    """
    if exact:
        tiles = tile_library(pool)
        assert tiles is not None, "no kernel for such a pool is exact"
        assert tokens == 1, tokens
        memory = (workspace or Workspace()).split
        return TokenPlan(tiles, pool, block_tables, context_lens, windows, memory)
    library = _cuda_library(pool)
    if library is not None:
        return _split(library, pool, context_lens, windows, workspace, tokens) if _splits(pool) else None
    return _plan(pool, block_tables, context_lens, windows, workspace)


def is_fused(pool: Tensor) -> bool:
    """A CUDA kernel serves such a pool: what it does can be captured, and depends on its tensors alone."""
    return _cuda_library(pool) is not None


def _plan(
    pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    windows: Set[int | None],
    workspace: Workspace | None,
) -> DecodePlan:
    _, num_layers, _, heads, block_tokens, _ = pool.shape
    num_blocks = -(-int(context_lens.max()) // block_tokens)
    first = _used(block_tables[:, :num_blocks], context_lens, block_tokens).long() * (num_layers * 2 * heads)
    of_head = torch.arange(2 * heads, device=first.device).view(2, 1, heads, 1)
    rows = (first[None, :, None, :] + of_head).reshape(-1)
    lens = context_lens.tolist()
    common_len = lens[0] if min(lens) == max(lens) else None
    masks = {}
    for window in windows:
        if common_len is None or (window is not None and window < common_len):
            masks[window] = _mask(context_lens, num_blocks * block_tokens, window)
    tails = _tails(context_lens.long(), heads, num_blocks, block_tokens) if masks else rows[:0]
    return DecodePlan(rows, num_blocks, common_len, masks, tails, workspace or Workspace())


def _used(block_tables: Tensor, context_lens: Tensor, block_tokens: int) -> Tensor:
    """With the first block of a sequence wherever it uses none: no stranger's is read."""
    starts = torch.arange(0, block_tables.shape[1] * block_tokens, block_tokens, device=block_tables.device)
    return torch.where(starts < context_lens[:, None], block_tables, block_tables[:, :1])


def _tails(lens: Tensor, heads: int, num_blocks: int, block_tokens: int) -> Tensor:
    width, device = num_blocks * block_tokens, lens.device
    position, lens = torch.arange(width, device=device), lens[:, None]
    # Blocks past the last repeat the first, so those of a sequence that does not fill one are no better.
    end = torch.where(lens < block_tokens, width, -(-lens // block_tokens) * block_tokens)
    seq, offset = ((position >= lens) & (position < end)).nonzero(as_tuple=True)
    of_head = torch.arange(heads, device=device) * width
    of_kv = torch.arange(2, device=device)[:, None] * (len(lens) * heads * width)
    return ((seq * (heads * width) + offset)[:, None] + (of_kv + of_head).view(-1)).view(-1)


def _mask(context_lens: Tensor, width: int, window: int | None) -> Tensor:
    position = torch.arange(width, device=context_lens.device)[None, None, :]
    lens = context_lens[:, None, None]
    unseen = position >= lens
    if window is not None:
        unseen = unseen | (position < lens - window)
    return torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, float("-inf"))


def _attend(q: Tensor, pool: Tensor, layer: int, scale: float, window: int | None, plan: DecodePlan) -> Tensor:
    _, _, _, heads, block_tokens, head_size = pool.shape
    num_seqs, num_heads, _ = q.shape
    # Rows are those of layer 0; starting the view at this layer's first row moves all of them.
    lines = pool.view(-1, block_tokens * head_size)[layer * 2 * heads :]
    gathered = plan.workspace.take(plan.rows.shape[0], block_tokens * head_size, pool)
    torch.index_select(lines, 0, plan.rows, out=gathered)
    keys, values = gathered.view(2, num_seqs * heads, plan.num_blocks * block_tokens, head_size).unbind(0)
    mask = plan.masks.get(window)
    if mask is None:
        keys, values = keys[:, : plan.common_len], values[:, : plan.common_len]
    else:
        gathered.view(-1, head_size).index_fill_(0, plan.tails, 0)  # a mask is not enough: 0 * NaN is NaN
    # The query heads that share a KV head become rows of one matrix: K and V are read once for all of them.
    queries = q.reshape(num_seqs * heads, num_heads // heads, head_size)
    if num_seqs == 1 and mask is None:
        result = functional.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=scale)
    else:
        scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(scale)
        if mask is not None:
            scores.view(num_seqs, -1, scores.shape[-1]).add_(mask)
        result = torch.bmm(torch.softmax(scores, -1).to(q.dtype), values)
    return result.reshape(num_seqs, num_heads, head_size)


def _cuda_library(pool: Tensor) -> ctypes.CDLL | None:
    """The CUDA library where it has this op for such a pool."""
    block_tokens, head_size = pool.shape[-2:]
    if pool.dtype not in DTYPES or head_size not in CUDA_HEAD_SIZES or block_tokens % 16 != 0:
        return None
    return cuda_library(pool.device)


def _splits(pool: Tensor) -> bool:
    return pool.dtype == torch.bfloat16 and pool.shape[-1] in SPLIT_HEAD_SIZES


def _split(
    library: ctypes.CDLL,
    pool: Tensor,
    context_lens: Tensor,
    windows: Set[int | None],
    workspace: Workspace | None,
    tokens: int,
) -> SplitPlan:
    memory = None if workspace is None else workspace.split
    return plan_split(library, context_lens, pool.shape[3], pool.shape[5], windows, tokens, memory)


def _launch(
    library: ctypes.CDLL,
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    out: Tensor | None,
    plan: DecodePlan | SplitPlan | None,
    tokens: int,
    soft_cap: float,
    slopes: Tensor | None,
) -> Tensor:
    assert q.dtype == pool.dtype, (q.dtype, pool.dtype)
    assert block_tables.dtype == context_lens.dtype == torch.int32, (block_tables.dtype, context_lens.dtype)
    assert q.device == block_tables.device == context_lens.device == pool.device, (q.device, block_tables.device)
    for tensor in (pool, block_tables, context_lens):
        assert tensor.is_contiguous(), tensor.stride()
    assert window is None or window > 0, window
    result = out if out is not None and out.is_contiguous() else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert result.shape == q.shape, (result.shape, q.shape)
    assert result.dtype == q.dtype, (result.dtype, q.dtype)
    if _splits(pool):
        if not isinstance(plan, SplitPlan):
            plan = _split(library, pool, context_lens, {window}, None, tokens)
        assert plan.tokens == tokens, (plan.tokens, tokens)
        split_decode_attention(
            library, q, pool, layer, block_tables, context_lens, scale, window, soft_cap, slopes, plan, result
        )
        return result if out is None or out is result else out.copy_(result)
    q = vector_rows(q)
    _, num_layers, _, heads, block_tokens, head_size = pool.shape
    library.paged_decode_attention(
        q.data_ptr(),
        pool.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        result.data_ptr(),
        q.stride(0),
        q.shape[0],
        q.shape[1],
        heads,
        head_size,
        block_tokens,
        num_layers,
        layer,
        block_tables.shape[1],
        window or 0,
        scale,
        stream(q.device),
    )
    return result if out is None or out is result else out.copy_(result)


def paged_attention_reference(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_table: Tensor,
    context_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """What both attention ops mean, for one sequence whose last T tokens ask, in the precision of q.

    q [T, H, D] of tokens context_len - T ... context_len - 1; block_table [B] -> [T, H, D].
    """
    _, _, _, heads, _, head_size = pool.shape
    picked = pool[block_table.long(), layer].to(q.dtype)  # [B, 2, G, P, D]
    keys, values = picked.permute(1, 2, 0, 3, 4).reshape(2, heads, -1, head_size)[:, :, :context_len]
    repeat = q.shape[1] // heads
    scores = torch.einsum("thd,hcd->htc", q, keys.repeat_interleave(repeat, 0)) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    asks = torch.arange(context_len - q.shape[0], context_len, device=q.device)[:, None]
    key = torch.arange(context_len, device=q.device)[None, :]
    if slopes is not None:
        scores = scores + slopes.to(q.dtype)[:, None, None] * (key - asks)
    unseen = key > asks if window is None else (key > asks) | (key <= asks - window)
    weights = torch.softmax(scores.masked_fill(unseen, float("-inf")), -1)
    return torch.einsum("htc,hcd->thd", weights, values.repeat_interleave(repeat, 0))
