"""One step's input on the device: which tokens, where their K and V go, and what each may look at.

The tokens of a step: one per decoding sequence first, then the prompts' chunks, one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.paged_attention import DecodePlan, Workspace, plan_decode
from ..kernels.prefill_attention import PrefillPlan, is_tiled, plan_prefill
from ..kernels.prefill_tiles import TokenPlan
from ..kernels.skinny_linear import SkinnyWorkspace, skinny_workspace
from ..kernels.split_attention import SplitPlan
from ..kernels.write_kv import plan_write
from .staging import Array, Staging
from .step_input import StepInput


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The part of a step that is one token of each of S sequences."""

    block_tables: Tensor  # [S, B] i32
    context_lens: Tensor  # [S] i32, the new token counted
    plan: DecodePlan | SplitPlan | TokenPlan | None  # None where a kernel reads the tables and needs no more


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
    products: SkinnyWorkspace | None  # of the kernel that multiplies with weights; None where it does not serve


class DeviceTables:
    """What outlives a step on the device, at fixed addresses, and makes batches from it and a step's input."""

    def __init__(
        self, pool: Tensor, max_rows: int, max_blocks: int, windows: frozenset[int | None], exact: bool = False
    ) -> None:
        """pool [N, L, 2, G, P, D]; windows: of the model's layers. exact: a token's attention is bit for bit the same
        in every batch; then `is_tiled(pool)`, or all batches come from `one_by_one`."""
        self._pool = pool
        self._windows = windows
        self._exact = exact and is_tiled(pool)
        self._workspace = Workspace()
        self._products = skinny_workspace(pool.device)  # of captured steps too: steps follow each other
        self.staging = Staging(pool.device)
        self.nobody = max_rows  # the row of what only fills a step up
        self._tables = torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=pool.device)  # [R + 1, W]
        self._flat_tables = self._tables.view(-1)
        self._last_tokens = torch.zeros(max_rows + 1, dtype=torch.int64, device=pool.device)  # [R + 1]
        self._sampled_rows: Tensor | None = None  # of the last step, until it is told what they were given

    def accept(self, token_ids: Tensor) -> None:
        """What the last step's `sampled_rows` were given.    token_ids [S'] i64, on the device."""
        assert self._sampled_rows is not None, "no step has sampled rows"
        self._last_tokens.index_copy_(0, self._sampled_rows, token_ids)
        self._sampled_rows = None

    def batch(self, step: StepInput) -> Batch:
        """Takes the step's changes over; gives what the model needs."""
        num_decode, has_chunks = len(step.decode_rows), len(step.chunk_rows) > 0
        lens = step.positions[:num_decode] + 1
        arrays: list[Array] = [step.decode_rows, lens.astype(np.int32), step.positions, step.slots, *changes_of(step)]
        if has_chunks:
            arrays += (step.chunk_rows, step.chunk_ids, step.sampled_rows)
        if len(step.wanted) < len(step.positions):
            arrays.append(step.wanted)
        decode_rows, context_lens, positions, slots, *others = self.staging.send(arrays)
        sent = iter(others)
        self.change(step, sent)
        if not has_chunks:
            self.expect(decode_rows)
            return self.decode_batch(decode_rows, context_lens, positions, slots, self._num_blocks(lens))
        chunk_rows, chunk_ids, sampled_rows = next(sent), next(sent), next(sent)
        self.expect(sampled_rows)
        return Batch(
            token_ids=torch.cat((self._last_tokens.index_select(0, decode_rows), chunk_ids)),
            positions=positions,
            slots=slots,
            write_plan=plan_write(self._pool, slots),
            num_decode=num_decode,
            decode=self._decode(decode_rows, context_lens, self._num_blocks(lens), self._workspace)
            if num_decode
            else None,
            prefill=self._prefill(chunk_rows, step),
            wanted=next(sent, None),
            products=self._products,
        )

    def one_by_one(self, step: StepInput) -> list[Batch]:
        """As `batch`, but as many batches as there are tokens, each to be computed before the next."""
        of_tokens = np.concatenate((step.decode_rows, np.repeat(step.chunk_rows, step.chunk_counts)))
        lens = (step.positions + 1).astype(np.int32)
        arrays: list[Array] = [of_tokens, lens, step.positions, step.slots]
        arrays += (step.decode_rows, step.chunk_ids, step.sampled_rows, *changes_of(step))
        sent = self.staging.send(arrays)
        rows, context_lens, positions, slots, decode_rows, chunk_ids, sampled_rows, *changes = sent
        self.change(step, iter(changes))
        self.expect(sampled_rows)
        ids = torch.cat((self._last_tokens.index_select(0, decode_rows), chunk_ids))
        wanted = set(step.wanted.tolist())
        nothing = ids.new_empty(0)

        def of(at: int) -> Batch:
            one = slice(at, at + 1)
            num_blocks = self._num_blocks(lens[one])
            return Batch(
                token_ids=ids[one],
                positions=positions[one],
                slots=slots[one],
                write_plan=plan_write(self._pool, slots[one]),
                num_decode=1,
                decode=self._decode(rows[one], context_lens[one], num_blocks, self._workspace),
                prefill=None,
                wanted=None if at in wanted else nothing,
                products=self._products,
            )

        return [of(at) for at in range(len(lens))]

    def decode_batch(
        self,
        rows: Tensor,
        context_lens: Tensor,
        positions: Tensor,
        slots: Tensor,
        num_blocks: int | None = None,
        workspace: Workspace | None = None,
    ) -> Batch:
        """A step in which every row decodes. Where kernels serve it can be captured, and makes, each time, what these
        tensors then say.

        rows, positions, slots [S] i64, context_lens [S] i32; num_blocks: that none has more of; None: as many as fit.
        workspace: kernels' memory, which a captured step keeps the address of; None: the one of all other steps.
        """
        return Batch(
            token_ids=self._last_tokens.index_select(0, rows),
            positions=positions,
            slots=slots,
            write_plan=plan_write(self._pool, slots),
            num_decode=len(rows),
            decode=self._decode(rows, context_lens, num_blocks, workspace or self._workspace),
            prefill=None,
            wanted=None,
            products=self._products,
        )

    def change(self, step: StepInput, sent: Iterator[Tensor]) -> None:
        """Takes a step's changes over.    sent: its `changes_of`, on the device, and no more of them is taken."""
        if len(step.table_at):
            self._flat_tables.index_copy_(0, next(sent), next(sent))
        if len(step.token_rows):
            self._last_tokens.index_copy_(0, next(sent), next(sent))

    def expect(self, sampled_rows: Tensor) -> None:
        """These rows get a token after the step, by `accept`.    sampled_rows [S'] i64"""
        self._sampled_rows = sampled_rows

    def _decode(self, rows: Tensor, lens: Tensor, num_blocks: int | None, workspace: Workspace) -> DecodeRows:
        tables = self._tables[:, :num_blocks].index_select(0, rows)
        return DecodeRows(
            tables, lens, plan_decode(self._pool, tables, lens, self._windows, workspace, exact=self._exact)
        )

    def _prefill(self, rows: Tensor, step: StepInput) -> PrefillRows:
        contexts = step.chunk_starts + step.chunk_counts
        tables = self._tables[:, : self._num_blocks(contexts)].index_select(0, rows)
        starts, lens = (0, *np.cumsum(step.chunk_counts).tolist()), tuple(contexts.tolist())
        return PrefillRows(
            tables, starts, lens, plan_prefill(self._pool, tables, starts, lens, self._windows, self._exact)
        )

    def _num_blocks(self, lens: npt.NDArray[Any]) -> int:
        """Of the longest."""
        return -(-int(lens.max()) // self._pool.shape[4])


def changes_of(step: StepInput) -> list[Array]:
    """What `DeviceTables.change` needs of a step on the device."""
    tables: list[Array] = [step.table_at, step.table_blocks] if len(step.table_at) else []
    return [*tables, step.token_rows, step.token_ids] if len(step.token_rows) else tables
