"""One step's input: which tokens, where their K and V go, and what each may look at.

The rows of a step: one per decoding sequence first, then the prompts' chunks, one after the other.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import DecodePlan, Workspace, plan_decode
from ..kernels.prefill_attention import PrefillPlan, plan_prefill
from ..kernels.write_kv import kv_rows
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The part of a step that is one token of each of S sequences."""

    block_tables: Tensor  # [S, B] i32, unused entries repeat the sequence's first block
    context_lens: Tensor  # [S] i32, the new token counted
    plan: DecodePlan | None  # of the torch path; None where a kernel reads the tables


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The part of a step that is chunks of S prompts."""

    block_tables: Tensor  # [S, B] i32
    query_starts: tuple[int, ...]  # S + 1, from 0
    context_lens: tuple[int, ...]  # S, the chunk counted
    plan: PrefillPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of several sequences, on the device."""

    token_ids: Tensor  # [T] i64
    positions: Tensor  # [T] i64
    slots: Tensor  # [T] i64 = block * P + offset
    rows: Tensor  # kv_rows(slots): where K and V go, in layer 0
    num_decode: int
    decode: DecodeRows | None
    prefill: PrefillRows | None
    wanted: Tensor | None  # [S'] i64: rows whose logits are wanted; None: all


class BatchBuilder:
    """Makes batches for one pool. Keeps the memory that steps share."""

    def __init__(self, pool: Tensor, windows: frozenset[int | None]) -> None:
        """windows: of the model's layers."""
        self._pool = pool
        self._windows = windows
        self._workspace = Workspace()

    def build(self, prefill: Seq[tuple[Sequence, int]], decode: Seq[Sequence]) -> Batch:
        """prefill: (sequence, how many of its next tokens); decode: sequences that lack the KV of one token only."""
        block_tokens = self._pool.shape[4]
        parts = [(seq, 1) for seq in decode] + list(prefill)
        counts = np.array([count for _, count in parts], dtype=np.int64)
        starts = np.array([seq.computed for seq, _ in parts], dtype=np.int64)
        ends = np.cumsum(counts)
        of_part = np.repeat(np.arange(len(parts)), counts)
        positions = np.arange(int(ends[-1])) - (ends - counts)[of_part] + starts[of_part]
        tokens = np.concatenate([seq.ids[seq.computed : seq.computed + count] for seq, count in parts])
        tables = _tables([seq for seq, _ in parts], starts + counts, block_tokens)
        slots = tables[of_part, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
        lasts = [seq.computed + count == seq.length for seq, count in parts]
        device_slots = self._tensor(slots)
        return Batch(
            token_ids=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=device_slots,
            rows=kv_rows(device_slots, self._pool),
            num_decode=len(decode),
            decode=self._decode_rows(tables[: len(decode)], (starts + counts)[: len(decode)]) if decode else None,
            prefill=self._prefill_rows(tables[len(decode) :], counts[len(decode) :], starts[len(decode) :])
            if prefill
            else None,
            wanted=self._tensor(ends[lasts] - 1) if prefill else None,
        )

    def _decode_rows(self, tables: np.ndarray, lens: np.ndarray) -> DecodeRows:
        block_tables, context_lens = self._tensor(tables), self._tensor(lens.astype(np.int32))
        plan = plan_decode(self._pool, block_tables, context_lens, self._windows, self._workspace)
        return DecodeRows(block_tables, context_lens, plan)

    def _prefill_rows(self, tables: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> PrefillRows:
        block_tables = self._tensor(tables)
        query_starts = (0, *np.cumsum(counts).tolist())
        context_lens = tuple((starts + counts).tolist())
        plan = plan_prefill(self._pool, block_tables, query_starts, context_lens, self._windows)
        return PrefillRows(block_tables, query_starts, context_lens, plan)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._pool.device)


def _tables(seqs: Seq[Sequence], lens: np.ndarray, block_tokens: int) -> np.ndarray:
    """Block tables [S, B] i32 of the blocks that `lens` tokens take; the rest repeats the first: no stranger's."""
    widths = -(-lens // block_tokens)
    tables = np.empty((len(seqs), int(widths.max())), dtype=np.int32)
    for row, seq, width in zip(tables, seqs, widths.tolist(), strict=True):
        row[:width] = seq.table[:width]
        row[width:] = seq.table[0]
    return tables
