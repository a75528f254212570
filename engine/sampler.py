"""Logits to tokens. The random number behind a token is a function of (seed, branch, position) alone."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.request import Sampling, TokenLogprobs
from .logit_edits import LogitEdits, edited

Numbers = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DrawRows:
    """How to draw a token for each row of logits. Tensors are on the logits' device."""

    temperature: Tensor  # [S, 1] f32; 0: greedy
    top_k: Tensor  # [S, 1] i64; at least 1
    top_p: Tensor  # [S, 1] f64
    min_p: Tensor  # [S, 1] f64
    seeds: Numbers  # [S] u64
    branches: Numbers  # [S] u64


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How to choose a token for each row of logits; the same from step to step while the rows are."""

    logprobs: tuple[int | None, ...]  # per row: None, or how many of the best
    draw: DrawRows | None  # None: all rows are greedy

    @classmethod
    def of(cls, params: Seq[Sampling], vocab_size: int, device: torch.device) -> "SamplingRows":
        logprobs = tuple(row.logprobs for row in params)
        if all(row.temperature == 0 for row in params):
            return cls(logprobs, None)

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        draw = DrawRows(
            temperature=column([row.temperature for row in params], torch.float32),
            top_k=column([min(row.top_k or vocab_size, vocab_size) for row in params], torch.int64),
            top_p=column([row.top_p for row in params], torch.float64),
            min_p=column([row.min_p for row in params], torch.float64),
            seeds=np.array([row.seed & _MASK for row in params], dtype=np.uint64),
            branches=np.array([row.branch for row in params], dtype=np.uint64),
        )
        return cls(logprobs, draw)


@dataclass(frozen=True, slots=True)
class Sampled:
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@torch.inference_mode()
def sample(logits: Tensor, rows: SamplingRows, positions: Seq[int], edits: Seq[LogitEdits | None] = ()) -> Sampled:
    """One token per row.    logits [S, V]; positions: S, which token of its answer each row chooses, from 0.

    Edits (one per row, or none at all), then temperature, then top-k, then top-p, then min-p, each on what the one
    before left; the order of transformers.
    """
    # In f32: torch's argmax of bfloat16 is three times as slow on a CPU.
    values = edited(logits, edits) if any(edits) else logits.float()
    best = values.argmax(-1)
    chosen = best if rows.draw is None else _draw(values, best, rows.draw, positions)
    token_ids: list[int] = chosen.tolist()
    if all(count is None for count in rows.logprobs):
        return Sampled(token_ids, [None] * len(token_ids))
    return Sampled(token_ids, _logprobs(logits, token_ids, rows.logprobs))


def uniform(seeds: Numbers, branches: Numbers, positions: Numbers) -> npt.NDArray[np.float64]:
    """[0, 1), 53 bits, of each (seed, branch, position).    All [S] u64 -> [S] f64.

    Three rounds of splitmix64's finaliser (Steele, Lea and Flood, 2014), one per part, so that neighbours in any part
    are as far apart as strangers.
    """
    state = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    state = _mix(state ^ (branches + np.uint64(0xD1B54A32D192ED03)))
    state = _mix(state ^ (positions + np.uint64(0x8CB92BA72F3D8DD7)))
    high: npt.NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64)
    return high * 2.0**-53


def _mix(state: Numbers) -> Numbers:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Numbers = state ^ (state >> np.uint64(31))
    return mixed


def _draw(logits: Tensor, best: Tensor, rows: DrawRows, positions: Seq[int]) -> Tensor:
    probabilities, order = _filtered(logits, rows)
    cumulative = probabilities.cumsum(-1)
    numbers = uniform(rows.seeds, rows.branches, np.array(positions, dtype=np.uint64))
    target = torch.from_numpy(numbers).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first whose running sum passes the target; never one of probability zero, for its sum equals its neighbour's.
    index = (cumulative <= target).sum(-1, keepdim=True)
    drawn = order.gather(1, index)[:, 0]
    return torch.where(rows.temperature[:, 0] == 0, best, drawn)


def _filtered(logits: Tensor, rows: DrawRows) -> tuple[Tensor, Tensor]:
    """(probabilities [S, V] f64, best first, 0 where filtered out, not normalised; their token ids [S, V]).

    logits [S, V] f32
    """
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    divisor = torch.where(rows.temperature == 0, 1.0, rows.temperature)
    scaled = ((values - values[:, :1]) / divisor).double()  # the best at 0: a tiny temperature can't overflow
    weights = torch.softmax(scaled, -1)
    rank = torch.arange(weights.shape[1], device=weights.device)[None, :]
    weights = weights.masked_fill(rank >= rows.top_k, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill((before >= rows.top_p) & (rank > 0), 0.0)
    return weights.masked_fill(weights < rows.min_p * weights[:, :1], 0.0), order


def _logprobs(logits: Tensor, token_ids: list[int], wanted: Seq[int | None]) -> list[TokenLogprobs | None]:
    """Before edits, temperature and filters."""
    rows = [row for row, count in enumerate(wanted) if count is not None]
    table = torch.log_softmax(logits[rows].float(), -1)
    most = min(max(count or 0 for count in wanted), table.shape[1])
    values, ids = (part.tolist() for part in table.topk(most, -1))
    own = table.gather(1, torch.tensor([[token_ids[row]] for row in rows], device=table.device))[:, 0].tolist()
    found: list[TokenLogprobs | None] = [None] * len(token_ids)
    for index, row in enumerate(rows):
        count = wanted[row]
        found[row] = TokenLogprobs(own[index], tuple(zip(ids[index][:count], values[index][:count], strict=True)))
    return found
