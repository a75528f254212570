"""One step's input on the device: which tokens, where their K and V go, and what each may look at.

The tokens of a step: one per decoding sequence first, then the prompts' chunks, one after the other.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import DecodePlan, Workspace, plan_decode
from ..kernels.prefill_attention import PrefillPlan, plan_prefill
from ..kernels.write_kv import plan_write
from .staging import Array, Staging
from .step_input import I64, StepInput


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The part of a step that is one token of each of S sequences."""

    block_tables: Tensor  # [S, B] i32
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
    write_plan: Tensor | None  # of the torch path, as below
    num_decode: int
    decode: DecodeRows | None
    prefill: PrefillRows | None
    wanted: Tensor | None  # [S'] i64: tokens whose logits are wanted; None: all


class DeviceTables:
    """What outlives a step on the device, at fixed addresses, and makes batches from it and a step's input."""

    def __init__(self, pool: Tensor, max_rows: int, max_blocks: int, windows: frozenset[int | None]) -> None:
        """pool [N, L, 2, G, P, D]; windows: of the model's layers."""
        self._pool = pool
        self._windows = windows
        self._workspace = Workspace()
        self._staging = Staging(pool.device)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=pool.device)  # [R, W]
        self._flat_tables = self._tables.view(-1)
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=pool.device)  # [R]

    def accept(self, rows: Tensor, token_ids: Tensor) -> None:
        """The last tokens of these rows, as sampled.    rows [S] i64, token_ids [S] i64, on the device."""
        self._last_tokens.index_copy_(0, rows, token_ids)

    def batch(self, step: StepInput) -> Batch:
        """Takes the step's changes over; gives what the model needs.

        What the host can reckon is reckoned there: an operation on a small tensor costs its thread more than one on an
        array, on every device.
        """
        rows, positions, num_decode = step.decode_rows.astype(np.int64), step.decode_positions, len(step.decode_rows)
        if len(step.chunk_rows):
            rows = np.concatenate((rows, np.repeat(step.chunk_rows, step.chunk_counts)))
            positions = np.concatenate((positions, _runs(step.chunk_starts, step.chunk_counts)))
        columns = positions // self._pool.shape[4]
        arrays: list[Array] = [
            rows[:num_decode],
            (step.decode_positions + 1).astype(np.int32),
            positions,
            rows * self._tables.shape[1] + columns,
            positions - columns * self._pool.shape[4],
        ]
        if len(step.table_at):
            arrays += (step.table_at, step.table_blocks)
        if len(step.token_rows):
            arrays += (step.token_rows.astype(np.int64), step.token_ids)
        if len(step.chunk_rows):
            arrays += (step.chunk_rows.astype(np.int64), step.chunk_ids)
        if len(step.wanted) < len(rows):
            arrays.append(step.wanted)
        decode_rows, lens, there, places, offsets, *others = self._staging.send(arrays)
        sent = iter(others)
        if len(step.table_at):
            self._flat_tables.index_copy_(0, next(sent), next(sent))
        if len(step.token_rows):
            self._last_tokens.index_copy_(0, next(sent), next(sent))
        chunk_rows, chunk_ids = (next(sent), next(sent)) if len(step.chunk_rows) else (None, None)
        last_tokens = self._last_tokens.index_select(0, decode_rows)
        slots = offsets.add(self._flat_tables.index_select(0, places), alpha=self._pool.shape[4])
        width = int(columns[:num_decode].max()) + 1 if num_decode else 0
        return Batch(
            token_ids=last_tokens if chunk_ids is None else torch.cat((last_tokens, chunk_ids)),
            positions=there,
            slots=slots,
            write_plan=plan_write(self._pool, slots),
            num_decode=num_decode,
            decode=self._decode(decode_rows, lens, width) if num_decode else None,
            prefill=None if chunk_rows is None else self._prefill(chunk_rows, step),
            wanted=next(sent, None),
        )

    @property
    def staging(self) -> Staging:
        return self._staging

    def _decode(self, rows: Tensor, lens: Tensor, width: int) -> DecodeRows:
        tables = self._tables[:, :width].index_select(0, rows)
        return DecodeRows(tables, lens, plan_decode(self._pool, tables, lens, self._windows, self._workspace))

    def _prefill(self, rows: Tensor, step: StepInput) -> PrefillRows:
        contexts = step.chunk_starts + step.chunk_counts
        tables = self._tables[:, : -(-int(contexts.max()) // self._pool.shape[4])].index_select(0, rows)
        starts, lens = (0, *np.cumsum(step.chunk_counts).tolist()), tuple(contexts.tolist())
        return PrefillRows(tables, starts, lens, plan_prefill(self._pool, tables, starts, lens, self._windows))


def _runs(starts: I64, counts: I64) -> I64:
    """start, start + 1, ... of each start, so many, one run after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    runs: I64 = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return runs
