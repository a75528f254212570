"""Decode attention on tensor cores, split along the keys: `paged_decode_attention` for bfloat16 on a GPU."""

import ctypes
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import multiprocessors, stream, vector_rows

SPLIT_HEAD_SIZES = (64, 80, 96, 128)  # those that csrc/split_attention.cu is compiled for
_COLUMNS = 8  # query heads that one thread block serves


class SplitWorkspace:
    """Memory that outlives a step, at fixed addresses while shapes do not outgrow it."""

    def __init__(self) -> None:
        self._partial = torch.empty(0)
        self._arrived = torch.empty(0, dtype=torch.int32)

    def partial(self, blocks: int, parts: int, head_size: int, device: torch.device) -> Tensor:
        """f32, not initialised: of each thread block two results, with their maximum and sum."""
        size = blocks * parts * 2 * _COLUMNS * (head_size + 2)
        if self._partial.numel() < size or self._partial.device != device:
            self._partial = torch.empty(size, device=device)
        return self._partial

    def arrived(self, count: int, device: torch.device) -> Tensor:
        """i32 zeros, which each launch leaves as it found them."""
        if self._arrived.numel() < count or self._arrived.device != device:
            self._arrived = torch.zeros(count, dtype=torch.int32, device=device)
        return self._arrived


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Where each thread block's run of keys begins, for all layers of one step."""

    runs: dict[int | None, Tensor]  # window -> [S + 1 + blocks] i32
    blocks: int  # thread blocks
    workspace: SplitWorkspace


def plan_split(
    library: ctypes.CDLL,
    context_lens: Tensor,
    kv_heads: int,
    windows: Set[int | None],
    workspace: SplitWorkspace | None = None,
) -> SplitPlan:
    """context_lens [S] i32."""
    blocks = multiprocessors(context_lens.device)
    runs = {}
    for window in windows:
        plan = torch.empty(len(context_lens) + 1 + blocks, dtype=torch.int32, device=context_lens.device)
        library.plan_split_decode(
            context_lens.data_ptr(),
            plan.data_ptr(),
            len(context_lens),
            kv_heads,
            window or 0,
            blocks,
            stream(context_lens.device),
        )
        runs[window] = plan
    return SplitPlan(runs, blocks, workspace or SplitWorkspace())


def split_decode_attention(
    library: ctypes.CDLL,
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    plan: SplitPlan,
    out: Tensor,
) -> None:
    """See `paged_decode_attention`. out [S, H, D], contiguous."""
    _, num_layers, _, kv_heads, block_tokens, head_size = pool.shape
    sequences, heads, _ = q.shape
    parts = -(-heads // kv_heads // _COLUMNS)
    q = vector_rows(q)
    library.split_decode_attention(
        q.data_ptr(),
        pool.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        out.data_ptr(),
        plan.runs[window].data_ptr(),
        plan.workspace.partial(plan.blocks, parts, head_size, q.device).data_ptr(),
        plan.workspace.arrived(parts * sequences * kv_heads, q.device).data_ptr(),
        q.stride(0),
        sequences,
        heads,
        kv_heads,
        head_size,
        block_tokens,
        num_layers,
        layer,
        block_tables.shape[1],
        window or 0,
        plan.blocks,
        scale,
        stream(q.device),
    )
