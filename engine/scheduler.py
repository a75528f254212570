"""What is in the next step. Pure: from a snapshot of the batch to a frozen plan; no clock, no ledger, no device.

A sequence that lacks the KV of one token decodes; one that lacks more is computed in chunks, which share what the
step's token budget leaves. While blocks last nobody waits and the order does not matter. When they do not, the policy's
order says who goes on, and who gives its blocks back.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.ids import BlockId
from .step_input import I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The n sequences that may run; in the order in which they came, where some of them are computed in chunks."""

    rows: I64  # [n]
    lacking: I64  # [n] tokens known whose KV is neither there nor under way, at least 1
    blocks_needed: I64  # [n] more than it holds, for its next step
    chunked: npt.NDArray[np.bool_]  # [n] a single token, too, is computed as a chunk
    available: int  # blocks that can be had now
    step_tokens: int  # of one step, at most
    min_chunk_tokens: int  # of all chunks together, however many sequences decode


@dataclass(frozen=True, slots=True)
class Stake:
    """What taking a sequence out of the batch would give: each of its blocks that nobody holds then."""

    blocks: Sequence[BlockId]
    flying: bool  # a step under way has it: its blocks come later


@dataclass(frozen=True, slots=True)
class StepPlan:
    decode: I64  # rows that go on by one token
    chunks: tuple[tuple[int, int], ...]  # (row, how many tokens)
    preempt: tuple[int, ...] = ()  # rows that give their blocks back


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who holds blocks, and what each would give."""

    rows: Sequence[int]  # best first
    stakes: Mapping[int, Stake]  # of each
    going: Sequence[Sequence[BlockId]]  # blocks of those that give theirs when the steps under way are over
    holders: Mapping[BlockId, int]  # of each of these blocks


def plan_step(snapshot: Snapshot, rank: Callable[[], Ranking]) -> StepPlan:
    """Decide one step. The ranking is asked for only when blocks are short."""
    if int(snapshot.blocks_needed.sum()) <= snapshot.available:
        return _share(snapshot, snapshot.rows, ())
    fits, preempt = _fit(snapshot, rank())
    return _share(snapshot, np.array([row for row in snapshot.rows.tolist() if row in fits], np.int64), preempt)


class _Given:
    """Counts the blocks that come free as their holders give them up. One may hold a block twice, and gives both."""

    def __init__(self, available: int, ranking: Ranking) -> None:
        self.available = available  # now
        self.coming = 0  # when the steps under way are over
        self._holders = ranking.holders
        self._given: Counter[BlockId] = Counter()
        self._late: set[BlockId] = set()
        for blocks in ranking.going:
            self.give(Stake(blocks, flying=True))

    def give(self, stake: Stake) -> None:
        if stake.flying:
            self._late.update(stake.blocks)
        self._given.update(stake.blocks)
        free = [block for block in set(stake.blocks) if self._given[block] == self._holders[block]]
        late = sum(block in self._late for block in free)
        self.coming += late
        self.available += len(free) - late


def _fit(snapshot: Snapshot, ranking: Ranking) -> tuple[frozenset[int], tuple[int, ...]]:
    """Who of the ranked has its blocks in this step, best first, and who makes room for them, worst first.

    The best is never preempted, so one sequence at least always comes to its end.
    """
    needed = dict(zip(snapshot.rows.tolist(), snapshot.blocks_needed.tolist(), strict=True))
    ranked, given = ranking.rows, _Given(snapshot.available, ranking)
    fits: set[int] = set()
    preempt: list[int] = []
    worst = len(ranked) - 1
    for place, row in enumerate(ranked):
        if place > worst:
            break
        if row not in needed:
            continue
        while needed[row] > given.available + given.coming and worst > place:
            preempt.append(ranked[worst])
            given.give(ranking.stakes[ranked[worst]])
            worst -= 1
        if needed[row] <= given.available:
            given.available -= needed[row]
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
