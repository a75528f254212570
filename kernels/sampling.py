"""Tokens for rows of logits, and logprobs, without ranking the vocabulary: on a GPU alone. docs/sampling.md says how.

The specification, and what runs elsewhere, is the torch path of engine/sampler.py.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .build import DTYPES, cuda_library, multiprocessors, stream

MAX_VOCABULARY = 1 << 18
MAX_BIASES = 2048  # of a row
MAX_BEST = 1024  # whose logprobs a row may ask for
CANDIDATES = 2048  # tokens that a row's thread block sorts; where more may matter it takes the slow path
EDITS, COUNTS = 1, 2  # flags of a row: some tokens are touched; the answer's tokens are counted
IN_PROMPT = -(1 << 15)  # added to a token's count

ROW = np.dtype(
    [
        ("stream", np.uint64),  # of random numbers
        ("top_p", np.float64),  # 1 or more: all
        ("presence", np.float64),
        ("frequency", np.float64),
        ("rate", np.float32),  # log2(e) / temperature
        ("least", np.float32),  # log2(min_p); -inf: none
        ("repetition", np.float32),
        ("top_k", np.int32),  # 0: greedy; the vocabulary or more: all
        ("min_tokens", np.int32),  # before so many tokens of the answer none of its stop tokens
        ("biases", np.int32),  # how many the row has
        ("flags", np.int32),
        ("logprobs", np.int32),  # how many of the best; -1: none at all
    ]
)
"""How one row chooses, as csrc/sampling.cuh reads it."""

_MAX_PARTS = 8  # thread blocks that share a row of logits
_STATE_BYTES = 448  # of a row
_RECORD_BYTES = 4 * (3 * 2048 + 4)  # of a part's histogram


def serves(device: torch.device) -> bool:
    """There are kernels for this device. Raises as `cuda_library`."""
    return cuda_library(device) is not None


@dataclass(frozen=True, slots=True)
class RowTables:
    """What outlives a step of R rows of the batch, on the device."""

    rows: Tensor  # [R, 64] u8: a ROW each
    counts: Tensor  # [R, V] i16: how often the answer has the token; IN_PROMPT added where the prompt has it
    touched: Tensor  # [R, ceil(V / 32)] i32: bit t % 32 of word t // 32 where an edit touches token t
    biases: Tensor  # [R, MAX_BIASES] i64: by rising token; bits of the f32 << 32 | 1 << 31 where it stops | token

    @classmethod
    def empty(cls, max_rows: int, vocab_size: int, device: torch.device) -> "RowTables":
        """Of rows that are all greedy, once they are written."""
        assert vocab_size <= MAX_VOCABULARY, vocab_size
        return cls(
            torch.zeros(max_rows, ROW.itemsize, dtype=torch.uint8, device=device),
            torch.zeros(max_rows, vocab_size, dtype=torch.int16, device=device),
            torch.zeros(max_rows, -(-vocab_size // 32), dtype=torch.int32, device=device),
            torch.zeros(max_rows, MAX_BIASES, dtype=torch.int64, device=device),
        )


class SamplingWorkspace:
    """Memory that the kernels of a step hand on, at fixed addresses while batches do not outgrow it."""

    def __init__(self) -> None:
        self._states = self._histograms = self._lists = torch.empty(0, dtype=torch.uint8)

    def states(self, rows: int, device: torch.device) -> Tensor:
        """Zeros at first; each launch leaves its counters zero."""
        if self._states.numel() < rows * _STATE_BYTES or self._states.device != device:
            self._states = torch.zeros(rows * _STATE_BYTES, dtype=torch.uint8, device=device)
        return self._states

    def parts(self, rows: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Histograms and lists of candidates, not initialised."""
        histograms, lists = (0, 0) if parts == 1 else (rows * 2 * parts * _RECORD_BYTES, rows * 2 * CANDIDATES * 8)
        if self._histograms.numel() < histograms or self._histograms.device != device:
            self._histograms = torch.empty(histograms, dtype=torch.uint8, device=device)
        if self._lists.numel() < lists or self._lists.device != device:
            self._lists = torch.empty(lists, dtype=torch.uint8, device=device)
        return self._histograms, self._lists


@dataclass(frozen=True, slots=True)
class Masks:
    """Which tokens rows of the logits may choose at all."""

    bits: Tensor  # [M, ceil(V / 32)] i32: token t may be chosen where bit t % 32 of word t // 32 is 1
    of: Tensor  # [S] i32: which of the M; below 0: all tokens


@dataclass(frozen=True, slots=True)
class TokensOut:
    """Where `choose_tokens` writes, for rows of the logits that are somebody's."""

    token_ids: Tensor  # [S] i64; some token where the logits give none
    largest: Tensor  # [S] f32: the token's logit; NaN where the logits or the mask give none
    own: Tensor  # [S] f32: the token's logprob, of rows that ask
    top: Tensor  # [S, n] f32: the best logprobs, of rows that ask for so many; best first, ties by rising token
    top_ids: Tensor  # [S, n] i64

    @classmethod
    def empty(cls, rows: int, most: int, device: torch.device) -> "TokensOut":
        """most: n, the largest number of logprobs that a row asks for."""
        return cls(
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, most, dtype=torch.float32, device=device),
            torch.empty(rows, most, dtype=torch.int64, device=device),
        )


def choose_tokens(
    logits: Tensor,
    out: TokensOut,
    workspace: SamplingWorkspace,
    tables: RowTables | None = None,
    at: Tensor | None = None,
    positions: Tensor | None = None,
    masks: Masks | None = None,
    *,
    more: bool = True,
    capacity: int = CANDIDATES,
) -> None:
    """A token for each row of the logits, as the rows of the tables say; the first best where there are no tables.

    logits [S, V] f32 or bf16, rows of one run each; at [S] i32: row of the tables; below 0: nobody's, for which nothing
    is written; positions [S] i32: of the token in its answer, from 0. more: some row draws or asks for logprobs; rows
    that do are as if they did not where it is False. capacity: below CANDIDATES, more rows take the slow path.
    """
    assert (tables is None) == (at is None) == (positions is None), "tables, at and positions come together"
    most = out.top.shape[1]
    _launch(logits, out, workspace, tables, at, positions, masks, most, -1, more and tables is not None, capacity)


def token_logprobs(
    logits: Tensor, out: TokensOut, count: int, workspace: SamplingWorkspace, *, capacity: int = CANDIDATES
) -> None:
    """Writes own, top and top_ids [S, count] of the tokens out.token_ids; -1 as if it were 0.    logits [S, V]"""
    assert out.top.shape[1] == count, (out.top.shape, count)
    _launch(logits, out, workspace, None, None, None, None, count, count, True, capacity)


def count_tokens(tables: RowTables, at: Tensor, token_ids: Tensor) -> None:
    """The answers of these rows go on with these tokens.    at [S] i32, each row once, below 0: nobody's; token_ids [S]

    Only rows that count learn of it. Token -1: none.
    """
    assert at.shape == token_ids.shape, (at.shape, token_ids.shape)
    assert at.dtype == torch.int32 and token_ids.dtype == torch.int64, (at.dtype, token_ids.dtype)  # noqa: PT018
    assert at.is_contiguous()
    assert token_ids.is_contiguous()
    _library(tables.rows.device).count_tokens(
        tables.rows.data_ptr(),
        at.data_ptr(),
        token_ids.data_ptr(),
        tables.counts.data_ptr(),
        tables.touched.data_ptr(),
        len(at),
        tables.counts.shape[1],
        stream(at.device),
    )


def _launch(
    logits: Tensor,
    out: TokensOut,
    workspace: SamplingWorkspace,
    tables: RowTables | None,
    at: Tensor | None,
    positions: Tensor | None,
    masks: Masks | None,
    most: int,
    given: int,
    more: bool,
    capacity: int,
) -> None:
    rows, vocab_size = logits.shape
    words = -(-vocab_size // 32)
    assert logits.dtype in DTYPES, logits.dtype
    assert logits.stride(1) == 1, logits.stride()
    assert vocab_size <= MAX_VOCABULARY, vocab_size
    assert most <= min(MAX_BEST, capacity) or capacity < CANDIDATES, most
    _check(out.token_ids, (rows,), torch.int64, logits)
    _check(out.largest, (rows,), torch.float32, logits)
    _check(out.own, (rows,), torch.float32, logits)
    _check(out.top, (rows, most), torch.float32, logits)
    _check(out.top_ids, (rows, most), torch.int64, logits)
    if tables is not None and at is not None and positions is not None:
        assert tables.counts.shape[1] == vocab_size, (tables.counts.shape, logits.shape)
        _check(at, (rows,), torch.int32, logits)
        _check(positions, (rows,), torch.int32, logits)
    if masks is not None:
        _check(masks.bits, (len(masks.bits), words), torch.int32, logits)
        _check(masks.of, (rows,), torch.int32, logits)
    device = logits.device
    parts = parts_of(rows, vocab_size, multiprocessors(device))
    histograms, lists = workspace.parts(rows, parts, device) if more else workspace.parts(0, 1, device)
    _library(device).choose_tokens(
        logits.data_ptr(),
        None if tables is None else tables.rows.data_ptr(),
        None if at is None else at.data_ptr(),
        None if positions is None else positions.data_ptr(),
        None if tables is None else tables.counts.data_ptr(),
        None if tables is None else tables.touched.data_ptr(),
        None if tables is None else tables.biases.data_ptr(),
        None if masks is None else masks.bits.data_ptr(),
        None if masks is None else masks.of.data_ptr(),
        out.token_ids.data_ptr(),
        None if given >= 0 else out.largest.data_ptr(),
        out.own.data_ptr(),
        out.top.data_ptr(),
        out.top_ids.data_ptr(),
        workspace.states(rows, device).data_ptr(),
        histograms.data_ptr(),
        lists.data_ptr(),
        logits.stride(0),
        DTYPES[logits.dtype],
        rows,
        vocab_size,
        parts,
        most,
        given,
        capacity,
        int(more),
        stream(device),
    )


def parts_of(rows: int, vocab_size: int, processors: int) -> int:
    """Thread blocks for each row of logits: two for each multiprocessor in all, each with work for all its threads."""
    return max(1, min(_MAX_PARTS, 2 * processors // max(rows, 1), vocab_size // 4096))


def _library(device: torch.device) -> ctypes.CDLL:
    library = cuda_library(device)
    assert library is not None, f"no kernels for {device}"
    return library


def _check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, logits: Tensor) -> None:
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.device == logits.device, (tensor.device, logits.device)
    assert tensor.is_contiguous(), tensor.stride()
