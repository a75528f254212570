"""How each row of the batch chooses its tokens, kept on a GPU for the kernels of docs/sampling.md.

As SamplingTable, but a row is sent once, when a sequence takes it. Which tokens its answer has is counted there too, so
the host need not tell them: what a step has chosen goes from one kernel to the next.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import Sampling
from ..kernels.sampling import (
    COUNTS,
    EDITS,
    IN_PROMPT,
    MAX_BEST,
    MAX_BIASES,
    MAX_VOCABULARY,
    ROW,
    RowTables,
    SamplingWorkspace,
    count_tokens,
    serves,
)
from .draws import Way, streams_of, way_of
from .logit_edits import penalises
from .sampler import DeviceRows, LogprobRows, SamplingRows
from .sampling_table import SamplingTable
from .staging import Array, Staging

Ids = npt.NDArray[np.int64]
Indices = npt.NDArray[np.integer]

_U64 = (1 << 64) - 1
_MOST_COUNTED = (1 << 15) - 1
_STOPS = 1 << 31
_NO_TOKENS: tuple[int, ...] = ()
_NO_IDS = np.empty(0, np.int64)
_FLOAT = np.finfo(np.float32)
_GREEDY = np.zeros((), ROW)
_GREEDY["top_p"], _GREEDY["repetition"], _GREEDY["logprobs"] = np.inf, 1, -1


def sampling_table(max_rows: int, vocab_size: int, device: torch.device) -> "SamplingTable | DeviceSamplingTable":
    """The one that serves this device."""
    if vocab_size <= MAX_VOCABULARY and serves(device):
        return DeviceSamplingTable(max_rows, vocab_size, device)
    return SamplingTable(max_rows, vocab_size, device)


class DeviceSamplingTable:
    """Parameters of R rows, on the device as of the last `take`. Free rows are greedy."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._staging = Staging(device)
        self._tables = RowTables.empty(max_rows, vocab_size, device)
        self._workspace = SamplingWorkspace()
        self._rows = np.full(max_rows, _GREEDY)
        self._changed: dict[int, _Touched | None] = dict.fromkeys(range(max_rows))  # what the device lacks, by row

    @property
    def edited_rows(self) -> frozenset[int]:
        """Of none must the answer be told."""
        return frozenset()

    def put(self, row: int, sampling: Sampling, prompt: Seq[int], answer: Iterable[int] = _NO_TOKENS) -> None:
        """A sequence takes the row: its parameters, its prompt, and the answer so far."""
        self.clear(row)
        its = self._rows[row]
        if way_of(sampling, self._vocab_size) != Way.GREEDY:
            its["top_k"] = min(sampling.top_k or self._vocab_size, self._vocab_size)
            its["top_p"] = sampling.top_p
            its["rate"] = min(np.log2(np.e) / np.float64(np.float32(sampling.temperature)), _FLOAT.max)
            its["least"] = np.log2(sampling.min_p) if sampling.min_p > 0 else -np.inf
            seed, branch = (np.array([part], dtype=np.uint64) for part in (sampling.seed & _U64, sampling.branch))
            its["stream"] = streams_of(seed, branch)[0]
        if sampling.logprobs is not None:
            assert sampling.logprobs <= MAX_BEST, sampling.logprobs
            its["logprobs"] = sampling.logprobs
        said = np.array(answer if isinstance(answer, Seq) else list(answer), np.int64)
        if penalises(sampling) or sampling.logit_bias or len(said) < sampling.min_tokens:
            touched = self._changed[row] = _Touched(sampling, prompt, said)
            its["repetition"], its["min_tokens"] = sampling.repetition_penalty, sampling.min_tokens
            its["presence"], its["frequency"] = sampling.presence_penalty, sampling.frequency_penalty
            its["biases"] = len(touched.biases)
            its["flags"] = EDITS | (COUNTS if penalises(sampling) else 0)

    def clear(self, row: int) -> None:
        """The row is free. Again: nothing."""
        self._rows[row] = _GREEDY
        self._changed[row] = None

    def add(self, row: int, token: int) -> None:
        """Nothing to do: no row is among `edited_rows`."""

    def take(self, rows: Indices, positions: Indices) -> SamplingRows:
        """How to choose for S rows of logits.    rows [S]; positions [S] of the token in its answer, from 0

        A row may stand there several times, as in SamplingTable; but `chosen` may then not be told.
        """
        count, of = len(rows), self._rows[rows]
        assert len(positions) == count, (count, len(positions))
        asking = of["logprobs"] >= 0
        more = bool((asking | (of["top_k"] > 0)).any())
        if not (more or of["flags"].any()):
            return SamplingRows(count, on_device=DeviceRows(self._workspace))
        changes = self._changes()
        at, its, *sent = self._staging.send([rows.astype(np.int32), positions.astype(np.int32), *changes])
        if sent:
            self._write(*sent)
        wanting = np.flatnonzero(asking)
        return SamplingRows(
            count,
            logprobs=LogprobRows(None, tuple(wanting.tolist()), tuple(of["logprobs"][wanting].tolist()))
            if len(wanting)
            else None,
            on_device=DeviceRows(self._workspace, self._tables, at, its, more, bool((of["flags"] & COUNTS).any())),
        )

    def chosen(self, rows: SamplingRows, token_ids: Tensor) -> None:
        """What these rows were given is part of their answers.    token_ids [S] i64, on the device"""
        on_device = rows.on_device
        if on_device is not None and on_device.counts and on_device.at is not None:
            count_tokens(self._tables, on_device.at, token_ids)

    def _changes(self) -> list[Array]:
        """What `_write` takes, of all rows that have changed; nothing where none has."""
        if not self._changed:
            return []
        changed, self._changed = self._changed, {}
        at = np.array(list(changed), np.int64)
        edited = {row: touched for row, touched in changed.items() if touched is not None}
        of_rows, biases = list(edited), [touched.biases for touched in edited.values()]
        places = [touched.counted + row * self._vocab_size for row, touched in edited.items()]
        bias_places = [np.arange(len(its)) + row * MAX_BIASES for row, its in zip(of_rows, biases, strict=True)]
        return [
            at,
            self._rows[at].view(np.int32).reshape(len(at), -1),
            np.array(of_rows, np.int64),
            np.array([touched.words(self._vocab_size) for touched in edited.values()], np.int32),
            np.concatenate([_NO_IDS, *places]),
            np.concatenate([_NO_IDS, *(touched.counts for touched in edited.values())]),
            np.concatenate([_NO_IDS, *bias_places]),
            np.concatenate([_NO_IDS, *biases]),
        ]

    def _write(
        self,
        at: Tensor,
        rows: Tensor,
        edited: Tensor,
        words: Tensor,
        places: Tensor,
        counts: Tensor,
        bias_places: Tensor,
        biases: Tensor,
    ) -> None:
        """Into the device's tables, behind what reads them now."""
        tables = self._tables
        tables.rows.view(torch.int32).index_copy_(0, at, rows)
        if len(edited):
            tables.touched.index_copy_(0, edited, words)
            tables.counts.index_fill_(0, edited, 0)
            tables.counts.view(-1).index_copy_(0, places, counts.to(torch.int16))
            tables.biases.view(-1).index_copy_(0, bias_places, biases)


class _Touched:
    """The tokens that one sequence's edits touch, when it takes its row."""

    def __init__(self, sampling: Sampling, prompt: Seq[int], answer: Ids) -> None:
        seen = np.unique(np.array(prompt if sampling.repetition_penalty != 1 else (), np.int64))
        said, times = np.unique(answer if penalises(sampling) else _NO_IDS, return_counts=True)
        self.counted = np.union1d(seen, said)  # [n] i64
        self.counts = np.zeros(len(self.counted), np.int64)  # [n]: as the device has them
        self.counts[np.searchsorted(self.counted, said)] = np.minimum(times, _MOST_COUNTED)
        self.counts[np.searchsorted(self.counted, seen)] += IN_PROMPT
        bias = {token: (value, 0) for token, value in sampling.logit_bias}
        if len(answer) < sampling.min_tokens:
            bias |= {token: (bias.get(token, (0.0, 0))[0], _STOPS) for token in sampling.stop_token_ids}
        assert len(bias) <= MAX_BIASES, f"{len(bias)} biases and stop tokens"
        tokens = sorted(bias)
        bits = np.array([bias[token][0] for token in tokens], np.float32).view(np.uint32).astype(np.int64)
        self._biased = np.array(tokens, np.int64)
        self.biases = bits << 32 | np.array([bias[token][1] for token in tokens], np.int64) | self._biased  # [m] i64

    def words(self, vocab_size: int) -> npt.NDArray[np.int32]:
        """A bit for each token of the vocabulary."""
        bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
        bits[self.counted] = bits[self._biased] = True
        return np.packbits(bits, bitorder="little").view(np.int32)
