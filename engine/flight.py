"""A step that was launched and not yet taken in, and how a plan becomes one."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.ids import BlockId
from .logprobs import PendingLogprobs
from .rows import Rows
from .sampler import Pending
from .scheduler import StepPlan
from .sequence import Sequence
from .step_input import I64, StepInput


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Logits of the step that say how likely a prompt's own tokens are."""

    sequence: Sequence
    first: int  # the prompt's token that the first of these logits speaks of
    begin: int  # its first row among the step's logits
    end: int
    next_ids: I64  # [end - begin] the prompt's token after each, fewer where the prompt ends


@dataclass(slots=True)
class Flight:
    """One step under way. Its rows stay with their sequences until it is taken in."""

    num_sequences: int
    decode_rows: I64  # [S]
    decode_ends: I64  # [S] tokens whose KV is there after it
    chunk_rows: I64  # [C]
    chunk_ends: I64  # [C] the same
    sampled_rows: I64  # [S'] that get a token
    sampled_at: I64 | None  # [S'] their rows among the logits; None: all, in order
    positions: I64  # [S'] which token of its answer each gets, from 0
    lengths: I64  # [S'] tokens that each has with it
    prompt_parts: tuple[PromptPart, ...]
    chunk_tokens: int
    launched_at: float
    logits: Tensor | None = None  # until sampled from
    pending: Pending | None = None  # the tokens, on their way to the host
    prompt_logprobs: list[tuple[PromptPart, PendingLogprobs]] = field(default_factory=list)
    done: torch.cuda.Event | None = None  # on a GPU, where it samples nothing: when it is over
    copied: list[BlockId] = field(default_factory=list)  # held for it: it reads them as it copies them


def build_step(
    plan: StepPlan, rows: Rows, copies: list[tuple[BlockId, BlockId]], block_tokens: int, now: float
) -> tuple[StepInput, Flight]:
    """The step that a plan asks for. Its rows count as launched and under way from now on."""
    decode, positions = plan.decode, rows.launched[plan.decode]
    decode_ends = rows.launched[decode] = positions + 1
    chunks, sampled_rows, all_rows, of_tokens, wanted = _NO_CHUNKS, decode, decode, decode, np.arange(len(decode))
    parts: tuple[PromptPart, ...] = ()
    sampled_at: I64 | None = None
    if plan.chunks:
        chunks = _chunks(plan, rows)
        finishing = chunks.ends == rows.known[chunks.rows]
        sampled_rows = np.concatenate((decode, chunks.rows[finishing]))
        all_rows = np.concatenate((decode, chunks.rows))
        of_tokens = np.concatenate((decode, np.repeat(chunks.rows, chunks.counts)))
        positions = np.concatenate((positions, _runs(chunks.starts, chunks.counts)))
        wanted, parts, sampled_at = _wanted(len(decode), chunks, finishing)
        rows.launched[chunks.rows] = chunks.ends
    at, blocks, token_rows, token_ids = rows.changes()
    step = StepInput(
        copy_from=np.array([source for source, _ in copies], np.int64) if copies else _NONE,
        copy_to=np.array([target for _, target in copies], np.int64) if copies else _NONE,
        table_at=at,
        table_blocks=blocks,
        token_rows=token_rows,
        token_ids=token_ids,
        decode_rows=decode,
        positions=positions,
        slots=rows.slots(of_tokens, positions, block_tokens),
        chunk_rows=chunks.rows,
        chunk_starts=chunks.starts,
        chunk_counts=chunks.counts,
        chunk_ids=chunks.ids,
        wanted=wanted,
        sampled_rows=sampled_rows,
    )
    known = rows.known[sampled_rows]
    lengths = rows.known[sampled_rows] = known + 1
    rows.launch(all_rows)
    flight = Flight(
        num_sequences=len(all_rows),
        decode_rows=decode,
        decode_ends=decode_ends,
        chunk_rows=chunks.rows,
        chunk_ends=chunks.ends,
        sampled_rows=sampled_rows,
        sampled_at=sampled_at,
        positions=known - rows.prompt[sampled_rows],
        lengths=lengths,
        prompt_parts=parts,
        chunk_tokens=len(chunks.ids),
        launched_at=now,
    )
    return step, flight


@dataclass(frozen=True, slots=True)
class _Chunks:
    sequences: list[Sequence]
    rows: I64  # [C]
    starts: I64  # [C]
    counts: I64  # [C]
    ends: I64  # [C]
    ids: I64  # [sum of counts]


_NONE = np.empty(0, np.int64)
_NO_CHUNKS = _Chunks([], _NONE, _NONE, _NONE, _NONE, _NONE)


def _chunks(plan: StepPlan, rows: Rows) -> _Chunks:
    of = np.array([row for row, _ in plan.chunks], np.int64)
    counts = np.array([count for _, count in plan.chunks], np.int64)
    starts = rows.launched[of]
    ends = starts + counts
    sequences = rows.sequences_of(of)
    pieces = [seq.ids(start, end) for seq, start, end in zip(sequences, starts.tolist(), ends.tolist(), strict=True)]
    return _Chunks(sequences, of, starts, counts, ends, np.concatenate(pieces))


def _runs(starts: I64, counts: I64) -> I64:
    """start, start + 1, ... of each start, so many, one run after the other."""
    ends = np.cumsum(counts)
    runs: I64 = np.arange(int(ends[-1])) + np.repeat(starts - (ends - counts), counts)
    return runs


def _wanted(
    num_decode: int, chunks: _Chunks, finishing: npt.NDArray[np.bool_]
) -> tuple[I64, tuple[PromptPart, ...], I64 | None]:
    """(tokens of the step whose logits are wanted, parts for prompt logprobs, which of the wanted are sampled from)."""
    lasts = num_decode + np.cumsum(chunks.counts) - 1
    asking = [
        # Not of one that is computed again: they have been told, here or by who read the prompt. Nor of a chunk that is
        # but the last token, whose logits speak of the answer; what they told may not be taken in yet.
        seq.sampling.prompt_logprobs is not None
        and not (seq.prompt_logprobs or seq.tokens)
        and (start == 0 or start + 1 < len(seq.prompt))
        for seq, start in zip(chunks.sequences, chunks.starts.tolist(), strict=True)
    ]
    if not any(asking):
        return np.concatenate((np.arange(num_decode), lasts[finishing])), (), None
    wanted, parts, sampled_at = list(range(num_decode)), [], list(range(num_decode))
    of_chunk = zip(chunks.sequences, asking, chunks.starts, chunks.counts, lasts, finishing, strict=True)
    for seq, asks, start, count, last, ends in of_chunk:
        if asks:
            begin = len(wanted)
            wanted += range(last - count + 1, last + 1)
            following = seq.ids(start + 1, min(start + count + 1, len(seq.prompt)))
            parts.append(PromptPart(seq, int(start) + 1, begin, begin + len(following), following))
        elif ends:
            wanted.append(last)
        if ends:
            sampled_at.append(len(wanted) - 1)
    return np.array(wanted, np.int64), tuple(parts), np.array(sampled_at, np.int64)
