"""What is in the next step. Pure: from a snapshot of the batch to a frozen plan; no clock, no ledger, no device.

A sequence that lacks the KV of one token decodes; one that lacks more is computed in chunks, which share what the
step's token budget leaves. While blocks last nobody waits and the order does not matter. When they do not, the policy's
order says who goes on, and who gives its blocks back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .step_input import I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The n sequences that may run; in the order in which they came, where some of them are computed in chunks."""

    rows: I64  # [n]
    lacking: I64  # [n] tokens known whose KV is neither there nor under way, at least 1
    blocks_needed: I64  # [n] more than it holds, for its next step
    chunked: npt.NDArray[np.bool_]  # [n] a single token, too, is computed as a chunk
    available: int  # blocks that can be had now
    coming: int  # blocks that come back when steps under way are over
    step_tokens: int  # of one step, at most
    min_chunk_tokens: int  # of all chunks together, however many sequences decode


@dataclass(frozen=True, slots=True)
class Stake:
    """What taking a sequence out of the batch would give."""

    blocks: int  # that nobody else holds
    flying: bool  # a step under way has it: its blocks come later


@dataclass(frozen=True, slots=True)
class StepPlan:
    decode: I64  # rows that go on by one token
    chunks: tuple[tuple[int, int], ...]  # (row, how many tokens)
    preempt: tuple[int, ...] = ()  # rows that give their blocks back


Ranking = Callable[[], tuple[Sequence[int], Mapping[int, Stake]]]
"""All rows that hold blocks, best first, and what each would give. Asked only when blocks are short."""


def plan_step(snapshot: Snapshot, ranking: Ranking) -> StepPlan:
    """Decide one step."""
    if int(snapshot.blocks_needed.sum()) <= snapshot.available:
        return _share(snapshot, snapshot.rows, ())
    ranked, stakes = ranking()
    fits, preempt = _fit(snapshot, ranked, stakes)
    return _share(snapshot, np.array([row for row in snapshot.rows.tolist() if row in fits], np.int64), preempt)


def _fit(
    snapshot: Snapshot, ranked: Sequence[int], stakes: Mapping[int, Stake]
) -> tuple[frozenset[int], tuple[int, ...]]:
    """Who of the ranked has its blocks in this step, best first, and who makes room for them, worst first.

    The best is never preempted, so one sequence at least always comes to its end.
    """
    needed = dict(zip(snapshot.rows.tolist(), snapshot.blocks_needed.tolist(), strict=True))
    available, coming = snapshot.available, snapshot.coming
    fits: set[int] = set()
    preempt: list[int] = []
    worst = len(ranked) - 1
    for place, row in enumerate(ranked):
        if place > worst:
            break
        if row not in needed:
            continue
        while needed[row] > available + coming and worst > place:
            stake = stakes[ranked[worst]]
            preempt.append(ranked[worst])
            worst -= 1
            if stake.flying:
                coming += stake.blocks
            else:
                available += stake.blocks
        if needed[row] <= available:
            available -= needed[row]
            fits.add(row)
    return frozenset(fits), tuple(preempt)


def _share(snapshot: Snapshot, running: I64, preempt: tuple[int, ...]) -> StepPlan:
    """Give every decoding sequence its token and the others, first come first, what is left of the budget."""
    if snapshot.chunked.any() or len(running) < len(snapshot.rows) or (snapshot.lacking > 1).any():
        return _share_mixed(snapshot, running, preempt)
    return StepPlan(running, (), preempt)


def _share_mixed(snapshot: Snapshot, running: I64, preempt: tuple[int, ...]) -> StepPlan:
    of_step = np.isin(snapshot.rows, running) if len(running) < len(snapshot.rows) else np.True_
    decoding = of_step & (snapshot.lacking == 1) & ~snapshot.chunked
    decode = snapshot.rows[decoding]
    budget = max(snapshot.step_tokens - len(decode), snapshot.min_chunk_tokens)
    chunks: list[tuple[int, int]] = []
    computing = of_step & ~decoding
    for row, lacking in zip(snapshot.rows[computing].tolist(), snapshot.lacking[computing].tolist(), strict=True):
        count = min(lacking, budget)
        if count == 0:
            break
        chunks.append((row, count))
        budget -= count
    return StepPlan(decode, tuple(chunks), preempt)
