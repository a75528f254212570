"""Host side of the tables that outlive a step: one row for each sequence in the batch, a column for each fact of it.

What a step needs of all its sequences is read by one indexing of a column, so its cost hardly grows with the batch.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.ids import BlockId
from .accounts import INPUT_WEIGHT, OUTPUT_WEIGHT
from .sequence import Sequence
from .step_input import I32, I64

_NO_TOKEN = -2  # never sampled: fills the unused places of `stops`
_NONE = np.empty(0, np.int64)


class Rows:
    """Owns which sequence has which row, and what the device has not been told yet. [R] rows, W blocks each."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self.sequences: list[Sequence | None] = [None] * max_rows
        self.num_blocks = np.zeros(max_rows, np.int64)  # held by the row's sequence
        self.launched = np.zeros(max_rows, np.int64)  # tokens whose KV is there or under way
        self.known = np.zeros(max_rows, np.int64)  # tokens that are there or are being sampled
        self.computed = np.zeros(max_rows, np.int64)  # tokens whose KV is there
        self.prompt = np.zeros(max_rows, np.int64)  # tokens of the prompt
        self.limit = np.zeros(max_rows, np.int64)  # tokens when the sequence leaves the batch at the latest
        self.last = np.zeros(max_rows, np.int64)  # tokens whose KV is ever computed: not that of the last one
        self.tag = np.zeros(max_rows, np.int64)  # the caller's
        self.tables = np.zeros((max_rows, max_blocks), np.int32)  # the blocks themselves, in order
        self.live = np.zeros(max_rows, np.bool_)  # its sequence takes tokens
        self.runs = np.zeros(max_rows, np.bool_)  # and may be in the next step
        self.chunked = np.zeros(max_rows, np.bool_)  # is computed in chunks even where one token lacks
        self.stops = np.full((max_rows, 1), _NO_TOKEN, np.int64)
        self._ones, self._nothing = np.ones(max_rows, np.int64), np.zeros(max_rows, np.bool_)
        self.borrowers: set[int] = set()  # rows whose last block is another's: copy before writing
        self._max_blocks = max_blocks
        self._since = np.zeros(max_rows, np.int64)  # rises from one sequence to the next
        self._taken = 0
        self._reading = True  # some row may have tokens of its prompt ahead
        self._step = np.zeros(max_rows, np.int64)  # the last one that has the row
        self._launched_steps = 0
        self._collected_steps = 0
        self._free = list(range(max_rows - 1, -1, -1))
        self._flat_tables = self.tables.reshape(-1)
        self._table_at: list[int] = []  # what the device has not been told of
        self._fresh_tokens: dict[int, int] = {}

    @property
    def free_count(self) -> int:
        return len(self._free)

    def take(self, seq: Sequence, limit: int, *, chunked: bool, borrows: bool) -> int:
        """A row for a sequence and its blocks, the KV of `seq.computed` tokens among them."""
        row = self._free.pop()
        self.sequences[row] = seq
        self.num_blocks[row] = 0
        self.launched[row] = self.computed[row] = seq.computed
        self.known[row] = seq.length
        self.prompt[row] = len(seq.prompt)
        self.limit[row] = limit
        self.last[row] = limit - 1
        self.tag[row] = seq.tag
        self._step[row] = 0
        self.live[row] = self.runs[row] = True
        self._taken += 1
        self._reading |= chunked or seq.length - seq.computed > 1
        self._since[row] = self._taken
        if borrows:
            self.borrowers.add(row)
        self.chunked[row] = chunked
        self._set_stops(row, sorted(seq.sampling.stop_token_ids))
        self.add_blocks(row, seq.blocks)
        self._fresh_tokens[row] = seq.tokens[-1] if seq.tokens else seq.prompt[-1]
        return row

    def give_back(self, row: int) -> None:
        self.sequences[row] = None
        self.live[row] = self.runs[row] = False
        self.borrowers.discard(row)
        self._fresh_tokens.pop(row, None)
        self._free.append(row)

    def add_blocks(self, row: int, blocks: Seq[BlockId]) -> None:
        """The row's sequence has these blocks too, behind those that it has."""
        self._change(row, int(self.num_blocks[row]), blocks)
        self.num_blocks[row] += len(blocks)

    def add_block_each(self, rows: I64, blocks: Seq[BlockId]) -> None:
        """Each row's sequence has one of these blocks too."""
        columns = self.num_blocks[rows]
        self.tables[rows, columns] = blocks
        self._table_at += (rows * self._max_blocks + columns).tolist()
        self.num_blocks[rows] = columns + 1

    def replace_block(self, row: int, column: int, block: BlockId) -> None:
        self._change(row, column, [block])

    def changes(self) -> tuple[I64, I32, I64, I64]:
        """(table_at, table_blocks, token_rows, token_ids) since the last call, as `StepInput` wants them."""
        at, tokens = np.array(self._table_at, np.int64), self._fresh_tokens
        self._table_at, self._fresh_tokens = [], {}
        if not tokens:
            return at, self._flat_tables[at], _NONE, _NONE
        return at, self._flat_tables[at], np.array(list(tokens), np.int64), np.array(list(tokens.values()), np.int64)

    def slots(self, rows: I64, positions: I64, block_tokens: int) -> I64:
        """Where the KV of these tokens lies: block * block_tokens + offset.    rows [T], positions [T] -> [T]"""
        columns = positions // block_tokens
        found: I64 = (self.tables[rows, columns] - columns) * block_tokens + positions
        return found

    def launch(self, rows: I64) -> None:
        """The next step has these rows. Steps are taken in, each with `collect`, in the order in which they came."""
        self._launched_steps += 1
        self._step[rows] = self._launched_steps

    def collect(self) -> None:
        """The oldest step under way is over."""
        self._collected_steps += 1

    def is_flying(self, row: int) -> bool:
        """A step under way has the row."""
        return int(self._step[row]) > self._collected_steps

    def blocks_needed(self, rows: I64, block_tokens: int) -> I64:
        """More than they hold, for the next step of each: of a prompt's blocks none lacks.    rows [n] -> [n]"""
        needed: I64 = (self.launched // block_tokens >= self.num_blocks)[rows].astype(np.int64)
        if self.borrowers:
            needed += np.isin(rows, list(self.borrowers))
        return needed

    def runnable(self) -> tuple[I64, I64, npt.NDArray[np.bool_]]:
        """Rows that have something to compute, in the order in which they were taken where chunks are among it.

        (rows [n], lacking [n] tokens, chunked [n]: it is computed in chunks even where it lacks one token alone)
        """
        lacking = np.minimum(self.known, self.last) - self.launched
        rows = (self.runs & (lacking > 0)).nonzero()[0]
        if not self._reading:  # each lacks one token, and where all decode their order does not matter
            return rows, self._ones[: len(rows)], self._nothing[: len(rows)]
        lacking = lacking[rows]
        chunked = self.chunked[rows] & (self.launched[rows] < self.prompt[rows])
        reading = bool(chunked.any() or (lacking > 1).any())
        self._reading = reading or bool((self.launched < self.prompt)[self.live].any())  # of those that give back, too
        if reading:
            order = np.argsort(self._since[rows])
            rows, lacking, chunked = rows[order], lacking[order], chunked[order]
        return rows, lacking, chunked

    def tokens_ahead(self) -> int:
        """Of prompts, still to be computed."""
        return int(np.maximum(self.prompt - self.launched, 0)[self.live].sum()) if self._reading else 0

    def unused_slots(self, block_tokens: int) -> int:
        """Places for tokens in the rows' blocks that hold none. Only last blocks have some, and these are not shared
        for longer than a step or two."""
        return int((self.num_blocks * block_tokens - self.computed)[self.live].sum())

    def costs(self, decode: I64, chunks: Seq[tuple[int, int]]) -> dict[str, int]:
        """What a step that is not launched yet does for each tenant. Tokens that are computed again cost nothing."""
        costs = Counter(seq.tenant for seq in self.sequences_of(decode))
        for tenant in costs:
            costs[tenant] *= OUTPUT_WEIGHT
        for row, count in chunks:
            seq, end = self.sequence(row), int(self.launched[row]) + count
            costs[seq.tenant] += max(end - max(seq.charged, int(self.launched[row])), 0) * INPUT_WEIGHT
            seq.charged = max(seq.charged, end)
        return {tenant: cost for tenant, cost in costs.items() if cost}

    def sequence(self, row: int) -> Sequence:
        """Of a row that is taken."""
        seq = self.sequences[row]
        assert seq is not None, row
        return seq

    def sequences_of(self, rows: I64) -> list[Sequence]:
        """Of rows that are taken."""
        found: list[Any] = self.sequences
        return [found[row] for row in rows.tolist()]

    def _change(self, row: int, column: int, blocks: Seq[BlockId]) -> None:
        self.tables[row, column : column + len(blocks)] = blocks
        begin = row * self._max_blocks + column
        self._table_at += range(begin, begin + len(blocks))

    def _set_stops(self, row: int, stops: list[int]) -> None:
        if len(stops) > self.stops.shape[1]:
            wider = np.full((len(self.stops), len(stops)), _NO_TOKEN, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[row] = _NO_TOKEN
        self.stops[row, : len(stops)] = stops
