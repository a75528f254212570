"""How each row of the batch chooses its tokens, kept from step to step."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import Sampling
from .draws import DrawRows, Way, streams_of, uniform_at, way_of
from .logit_edits import EditedPlaces, LogitEdits, places_of
from .sampler import LogprobRows, SamplingRows
from .staging import Array, Staging

Ids = npt.NDArray[np.int64]
Indices = npt.NDArray[np.integer]

_U64 = (1 << 64) - 1
_LEAST_MIN_P = float(np.finfo(np.float64).tiny)
_NO_LOGPROBS = -1
_NO_TOKENS: tuple[int, ...] = ()
_DRAW_COLUMNS = 6


class SamplingTable:
    """Parameters of R rows as columns on the host: a step takes its rows' with one index. Free rows are greedy."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._staging = Staging(device)
        self._way = np.full(max_rows, Way.GREEDY, dtype=np.int8)
        self._temperature = np.ones(max_rows, dtype=np.float32)
        self._top_k = np.ones(max_rows, dtype=np.int64)
        self._top_p = np.ones(max_rows, dtype=np.float64)
        self._min_p = np.ones(max_rows, dtype=np.float64)
        self._stream = np.zeros(max_rows, dtype=np.uint64)  # of random numbers
        self._logprobs = np.full(max_rows, _NO_LOGPROBS, dtype=np.int64)
        self._edits: dict[int, LogitEdits] = {}  # by row
        self._plain = np.ones(max_rows, dtype=bool)  # greedy, without logprobs or edits
        self._num_special = 0  # rows that are not plain

    @property
    def edited_rows(self) -> frozenset[int]:
        """Rows whose edits follow the answer: each of its tokens must be told with `add`."""
        return frozenset(self._edits)

    def put(self, row: int, sampling: Sampling, prompt: Seq[int], answer: Iterable[int] = _NO_TOKENS) -> None:
        """A sequence takes the row: its parameters, its prompt, and the answer so far."""
        self.clear(row)
        way = self._way[row] = way_of(sampling, self._vocab_size)
        if way != Way.GREEDY:
            self._temperature[row] = sampling.temperature
            self._top_k[row] = min(sampling.top_k or self._vocab_size, self._vocab_size)
            self._top_p[row] = sampling.top_p if sampling.top_p < 1 else np.inf
            self._min_p[row] = max(sampling.min_p, _LEAST_MIN_P)
            seed, branch = (np.array([part], dtype=np.uint64) for part in (sampling.seed & _U64, sampling.branch))
            self._stream[row] = streams_of(seed, branch)[0]
        self._logprobs[row] = _NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs
        edits = LogitEdits.of(sampling, prompt, answer)
        if edits is not None:
            self._edits[row] = edits
        self._set_plain(row, way == Way.GREEDY and sampling.logprobs is None and edits is None)

    def clear(self, row: int) -> None:
        """The row is free. Again: nothing."""
        self._way[row] = Way.GREEDY
        self._logprobs[row] = _NO_LOGPROBS
        self._edits.pop(row, None)
        self._set_plain(row, True)

    def add(self, row: int, token: int) -> None:
        """The answer of a row goes on with this token. Nothing to do for a row that is not among `edited_rows`."""
        edits = self._edits.get(row)
        if edits is None:
            return
        edits.add(token)
        if edits.spent:
            del self._edits[row]
            self._set_plain(row, bool(self._way[row] == Way.GREEDY and self._logprobs[row] == _NO_LOGPROBS))

    def chosen(self, rows: SamplingRows, token_ids: Tensor) -> None:
        """Nothing to do: `add` tells what a row has been given."""

    def take(self, rows: Indices, positions: Indices) -> SamplingRows:
        """How to choose for S rows of logits.    rows [S]; positions [S] of the token in its answer, from 0

        A row may stand there several times, at different positions (several tokens of a sequence in one step); its
        edits are then those after the tokens that were told, at each of them.
        """
        count = len(rows)
        assert len(positions) == count, (count, len(positions))
        if not self._num_special or self._plain[rows].all():
            return SamplingRows(count)
        # All in one copy: with a second, its buffer might be one that the step before has still to read.
        arrays: list[Array] = []
        order, ways = self._drawing(rows)
        if len(order):
            arrays += self._columns(rows[order], order, positions[order])
        edited = [index for index, row in enumerate(rows.tolist()) if row in self._edits] if self._edits else []
        if edited:
            edits = [self._edits[int(rows[index])] for index in edited]
            arrays += places_of(edits, np.array(edited, dtype=np.int64), self._vocab_size)
        wanting = np.flatnonzero(self._logprobs[rows] != _NO_LOGPROBS)
        if len(wanting):
            arrays.append(wanting)
        sent = iter(self._staging.send(arrays))
        return SamplingRows(
            count,
            self._draws(count, ways, rows[order], [next(sent) for _ in range(_DRAW_COLUMNS)]) if len(order) else (),
            edits=EditedPlaces(next(sent), next(sent)) if edited else None,
            logprobs=LogprobRows(next(sent), tuple(wanting.tolist()), tuple(self._logprobs[rows[wanting]].tolist()))
            if len(wanting)
            else None,
        )

    def _drawing(self, rows: Indices) -> tuple[Ids, npt.NDArray[np.int8]]:
        """Which of the rows draw, those of a way side by side; and their ways."""
        ways = self._way[rows]
        if ways[0] != Way.GREEDY and (ways == ways[0]).all():
            return np.arange(len(rows)), ways
        order = np.argsort(ways, kind="stable")[np.count_nonzero(ways == Way.GREEDY) :]
        return order, ways[order]

    def _columns(self, rows: Indices, order: Ids, positions: Indices) -> list[Array]:
        """What a draw takes of each row, in the order of DrawRows."""
        numbers = uniform_at(self._stream[rows], positions.astype(np.uint64))
        columns = (self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows], numbers)
        return [order, *(column[:, None] for column in columns)]

    def _draws(
        self, count: int, ways: npt.NDArray[np.int8], rows: Indices, columns: list[Tensor]
    ) -> tuple[DrawRows, ...]:
        """One for each way, of the columns of them all.    count: rows of the logits"""
        at, temperature, top_k, top_p, min_p, numbers = columns
        draws, start = [], 0
        for way in Way:
            end = start + int(np.count_nonzero(ways == way))
            if end > start:
                part = slice(start, end)
                draws.append(
                    DrawRows(
                        way,
                        at=None if end - start == count else at[part],  # all in one way: in the order of the logits
                        temperature=temperature[part],
                        top_k=top_k[part],
                        top_p=top_p[part],
                        min_p=min_p[part],
                        numbers=numbers[part],
                        most=int(self._top_k[rows[part]].max()),
                    )
                )
            start = end
        return tuple(draws)

    def _set_plain(self, row: int, plain: bool) -> None:
        self._num_special += int(self._plain[row]) - int(plain)
        self._plain[row] = plain
