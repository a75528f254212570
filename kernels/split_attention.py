"""Decode attention on tensor cores, split along the keys: `paged_decode_attention` for bfloat16 on a GPU."""

import ctypes
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import multiprocessors, stream, vector_rows

SPLIT_HEAD_SIZES = (64, 80, 96, 128, 256)  # those that csrc/split_attention.cu is compiled for
MAX_TOKENS = 8  # of one sequence in a step

_COLUMNS = 8  # queries of one block of the tensor cores
_BLOCKS = {64: 4, 80: 4, 96: 2, 128: 2, 256: 1}  # head size -> how many of them a thread block serves at most
_RUNS = 10  # of keys, for each thread block at most
_BEGIN = 4  # numbers that say where a run begins


class SplitWorkspace:
    """Memory that outlives a step, at fixed addresses while shapes do not outgrow it."""

    def __init__(self) -> None:
        self._partial = torch.empty(0)
        self._arrived = torch.empty(0, dtype=torch.int32)

    def partial(self, size: int, device: torch.device) -> Tensor:
        """f32, not initialised: of each run of keys two results, with their maximum and sum."""
        if self._partial.numel() < size or self._partial.device != device:
            self._partial = torch.empty(size, device=device)
        return self._partial

    def arrived(self, size: int, device: torch.device) -> Tensor:
        """i32 zeros, which each launch leaves as it found them."""
        if self._arrived.numel() < size or self._arrived.device != device:
            self._arrived = torch.zeros(size, dtype=torch.int32, device=device)
        return self._arrived


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Where each run of keys begins, for all layers of one step."""

    runs: dict[int | None, Tensor]  # window -> [most_runs * 4 + 1 + S] i32
    blocks: int  # thread blocks of a KV head
    tokens: int  # Q, of each sequence
    workspace: SplitWorkspace

    @property
    def most_runs(self) -> int:
        """Of a KV head."""
        return self.blocks * _RUNS


def plan_split(
    library: ctypes.CDLL,
    context_lens: Tensor,
    kv_heads: int,
    head_size: int,
    windows: Set[int | None],
    tokens: int = 1,
    workspace: SplitWorkspace | None = None,
) -> SplitPlan:
    """context_lens [S] i32, the step's `tokens` of each sequence included."""
    blocks = max(1, multiprocessors(context_lens.device) // kv_heads)
    made = SplitPlan({}, blocks, tokens, workspace or SplitWorkspace())
    for window in windows:
        size = made.most_runs * _BEGIN + 1 + len(context_lens)
        plan = made.runs[window] = torch.empty(size, dtype=torch.int32, device=context_lens.device)
        library.plan_split_decode(
            context_lens.data_ptr(),
            plan.data_ptr(),
            len(context_lens),
            tokens,
            head_size,
            window or 0,
            blocks,
            made.most_runs,
            stream(context_lens.device),
        )
    return made


def split_decode_attention(
    library: ctypes.CDLL,
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float,
    slopes: Tensor | None,
    plan: SplitPlan,
    out: Tensor,
) -> None:
    """See `paged_decode_attention`. out [S * Q, H, D], contiguous."""
    num_blocks, num_layers, _, kv_heads, block_tokens, head_size = pool.shape
    tokens, heads, _ = q.shape
    sequences = tokens // plan.tokens
    columns = heads // kv_heads * plan.tokens
    served = _COLUMNS * (1 if columns <= _COLUMNS else _BLOCKS[head_size])
    parts = -(-columns // served)
    q = vector_rows(q)
    library.split_decode_attention(
        q.data_ptr(),
        pool.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        out.data_ptr(),
        plan.runs[window].data_ptr(),
        plan.workspace.partial(parts * plan.most_runs * kv_heads * 2 * served * (head_size + 4), q.device).data_ptr(),
        plan.workspace.arrived(parts * (2 + sequences * kv_heads), q.device).data_ptr(),
        None if slopes is None else slopes.data_ptr(),
        q.stride(0),
        num_blocks,
        sequences,
        plan.tokens,
        heads,
        kv_heads,
        head_size,
        block_tokens,
        num_layers,
        layer,
        block_tables.shape[1],
        window or 0,
        plan.blocks,
        plan.most_runs,
        scale,
        soft_cap,
        stream(q.device),
    )
